"""Estimators that the experiments rest on: pure functions, each tested against a closed form or an exact enumeration.

Rewards come as (N, m): m independent responses to each of N prompts. The prompts are taken as they are: "between
prompts" is the variance, with divisor N - 1, over these N.
"""

import torch
from torch import Tensor

from crlhf.contrastive import best_coefficient
from crlhf.engine.forward import Model
from crlhf.engine.text import Batch
from crlhf.law import variance_parts
from crlhf.policy import response_log_probs
from crlhf.ppo import whiten

# ----------------------------------------------------------------------------------------- the variance law


def components(r: Tensor, b: Tensor) -> dict[str, float]:
    """Unbiased terms of the law from (N, m) rewards of a policy and (N, k) independent rewards of baselines.

    moved: Var_x(m_pi - m_ref). The variance of the difference of two means holds their noise too, which is taken off.
    """
    between, within = variance_parts(r)
    between_ref, within_ref = variance_parts(b)
    noise = within / r.shape[1] + within_ref / b.shape[1]
    return {
        "between": between,
        "within": within,
        "between_ref": between_ref,
        "within_ref": within_ref,
        "moved": (r.mean(1) - b.mean(1)).var().item() - noise,
    }


def law(parts: dict[str, float], k: int) -> float:
    """Var(r - b_k)."""
    return parts["moved"] + parts["within"] + parts["within_ref"] / k


def covariance(parts: dict[str, float]) -> float:
    """Cov_x(m_pi, m_ref), by polarisation."""
    return (parts["between"] + parts["between_ref"] - parts["moved"]) / 2


def best_share(parts: dict[str, float], k: int) -> float:
    """c* = Cov(r, b_k) / Var(b_k), kept in [0, 1] as in training."""
    spread = parts["between_ref"] + parts["within_ref"] / k
    return best_coefficient(0.0, 0.0, covariance(parts), spread)


def windows(values: Tensor, k: int, first: int = 0) -> Tensor:
    """Means of k columns of (N, m) values: column j of the result averages columns j + first, ..., cyclically."""
    return sum(values.roll(-first - i, 1) for i in range(k)) / k


def batch_variance(values: Tensor) -> float:
    """Variance over prompts with one response each, as in a rollout batch, averaged over the columns of (N, m)."""
    return values.var(0).mean().item()


# -------------------------------------------------------------------------- the variance of a policy gradient


def gradient_trace(square_norms: Tensor, advantages: Tensor, mean_gradient: Tensor, n: int) -> float:
    """Trace of the covariance of the gradient (1/n) sum_i A_i s_i of a minibatch of n independent samples.

    s_i is the score, grad log pi(y_i | x_i). tr Cov = (E|A s|^2 - |E A s|^2) / n, here without bias from N >= n
    samples: square_norms |s_i|^2 and advantages A_i, both (N,), and the mean (P,) of A_i s_i over all N. No
    covariance matrix and no second pass over the samples are needed.
    """
    N = len(advantages)
    second_moment = (advantages**2 * square_norms).mean()
    variance = (second_moment - mean_gradient @ mean_gradient) * N / (N - 1)
    return variance.item() / n


def score_gradients(policy: Model, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scores s_i of N responses, one at a time: their (N,) squared norms, and the (V, P) means of weights[v, i] s_i.

    weights: (V, N), V kinds of advantages. One backward pass a response serves all kinds.
    """
    parameters = list(policy.parameters())
    square_norms = torch.zeros(len(batch))
    means = 0.0
    for i in range(len(batch)):
        row = batch[[i]]
        log_prob = (response_log_probs(policy, row) * row.response_mask).sum()
        gradients = torch.autograd.grad(log_prob, parameters)
        score = torch.cat([gradient.flatten() for gradient in gradients])  # (P,)
        square_norms[i] = score @ score
        means = means + weights[:, i, None] * score / len(batch)
    return square_norms, means


# ------------------------------------------------------------------------------------ lines, shares, groups


def fit_line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Least squares of (N,) y on (N,) x: (slope, intercept)."""
    dx = x - x.mean()
    dy = y - y.mean()
    slope = (dx * dy).mean() / (dx**2).mean()
    intercept = y.mean() - slope * x.mean()
    return slope.item(), intercept.item()


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of two (N,)."""
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def quantile_groups(values: Tensor, n: int) -> Tensor:
    """(N,) group numbers 0 ... n - 1 of nearly equal size, in order of the values; ties in order of appearance."""
    ranks = values.argsort(stable=True).argsort()
    return ranks * n // len(values)


def gradient_shares(rewards: Tensor, groups: Tensor, n: int) -> Tensor:
    """Share of the squared whitened advantages that each of n groups of prompts takes: (N, m), (N,) -> (n,).

    Without a critic the whitened reward is the advantage of every token, so these are the weights with which the
    squared scores enter the gradient.
    """
    everywhere = torch.ones_like(rewards, dtype=torch.bool)
    squares = whiten(rewards, everywhere).square().sum(1)  # (N,)
    by_group = torch.zeros(n, dtype=squares.dtype).index_add(0, groups, squares)
    return by_group / squares.sum()
