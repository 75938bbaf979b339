"""What scores of blind pairs say: shares, intervals, agreement, and a win rate at equal length.

A score is 1 where the policy wins, 1/2 for a tie, 0 where it loses. With w, t and l the shares of wins, ties and losses

    margin = w - l,     win rate = w + t / 2,     kappa = (agreement - chance) / (1 - chance)

and, since judges like long answers, a win rate at equal length: with z the difference of the two responses' lengths in
units of its own standard deviation, P(win) = sigmoid(theta + gamma z) is fitted to the scores, and sigmoid(theta) is
told beside the win rate (in the spirit of arXiv 2404.04475).
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..engine.files import stream

WIN = 1.0
EVEN = 0.5  # a tie
LOSS = 0.0
PRIOR_SD = 2.0  # of theta and gamma, so that a policy that always wins has a finite fit


def outcome_shares(scores: Tensor) -> dict[str, float]:
    """(N,) scores -> win, tie, loss, margin and win rate."""
    shares = {}
    for name, score in (("win", WIN), ("tie", EVEN), ("loss", LOSS)):
        with_score = (scores == score).double()
        shares[name] = with_score.mean().item()
    shares["margin"] = shares["win"] - shares["loss"]
    shares["win_rate"] = shares["win"] + shares["tie"] / 2
    return shares


def bootstrap(values: Tensor, statistic: Callable[[Tensor], float], seed: int, n: int = 2000) -> tuple[float, float]:
    """95% percentile interval of a statistic of (N, ...) rows, one a prompt, over n resamples of the prompts."""
    size = len(values)
    generator = stream(seed, "bootstrap")
    resamples = torch.randint(size, (n, size), generator=generator)
    results = torch.empty(n, dtype=torch.float64)
    for number, resample in enumerate(resamples):
        results[number] = statistic(values[resample])
    low = results.quantile(0.025).item()
    high = results.quantile(0.975).item()
    return low, high


def length_controlled(scores: Tensor, difference: Tensor, steps: int = 50) -> tuple[float, float]:
    """(win rate at equal length, gamma): P(win) = sigmoid(theta + gamma z), fitted by Newton's method.

    scores: (N,). difference: (N,) length of the policy's response minus the other's. theta and gamma have a normal
    prior of mean 0.
    """
    difference = difference.double()
    sd = difference.std().item() if len(difference) > 1 else 0.0
    z = difference / sd if sd > 0 else torch.zeros_like(difference)
    ones = torch.ones_like(z)
    features = torch.stack([ones, z], dim=1)  # (N, 2)
    weights = torch.zeros_like(features[0])  # theta, gamma
    prior = torch.eye(2) / PRIOR_SD**2
    for _ in range(steps):
        p = (features @ weights).sigmoid()
        errors = scores.double() - p
        variances = p * (1 - p)
        gradient = features.T @ errors - weights / PRIOR_SD**2
        curvature = features.T @ (features * variances[:, None]) + prior
        weights = weights + torch.linalg.solve(curvature, gradient)
    theta, gamma = weights
    return theta.sigmoid().item(), gamma.item()


def kappa(verdicts: list[Hashable], others: list[Hashable]) -> float:
    """Cohen's kappa (1960) of two judges on the same pairs: agreement beyond chance. nan if chance explains all."""
    n = len(verdicts)
    agreement = sum(verdict == other for verdict, other in zip(verdicts, others, strict=True)) / n
    chance = 0
    for kind in set(verdicts):
        chance += verdicts.count(kind) * others.count(kind)
    chance = chance / n**2
    if chance == 1:
        return float("nan")
    return (agreement - chance) / (1 - chance)


def accuracy(scores: Tensor, gold: Tensor, groups: int = 3) -> list[dict[str, float]]:
    """How often a judge is right, by the size of the true difference; a tie is half right.

    scores: (N,) of one policy; gold: (N,) its true reward minus the other's. Pairs that gold can't tell apart are left
    out. Groups of equal size by |gold|, smallest first: {low, high, pairs, right}.
    """
    differs = gold != 0
    scores = scores[differs]
    gold = gold[differs]
    sizes = gold.abs()
    right = torch.where(gold > 0, scores, 1 - scores)
    rows = []
    for group in sizes.argsort(stable=True).tensor_split(groups):
        if len(group):
            row = {
                "low": sizes[group].min().item(),
                "high": sizes[group].max().item(),
                "pairs": len(group),
                "right": right[group].mean().item(),
            }
            rows.append(row)
    return rows
