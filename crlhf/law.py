"""The law of contrast: what subtracting a baseline does to the variance of the reward, before PPO has changed anything.

A reward model's scores of the SFT policy's responses vary between prompts and within a prompt:

    between = Var_x E[r | x],   within = E_x Var(r | x),   rho = between / (between + within)

A baseline of k responses removes the first part and adds noise of its own. With y and y_1 ... y_k from one policy:

    Var(r - c b) / Var(r) = rho (1 - c)^2 + (1 - rho) (1 + c^2 / k)

For c = 1 that is (1 - rho) (1 + 1/k): contrast pays once rho > 1 / (k + 1). The best share is
c* = between / (between + within / k), the shrinkage factor of James and Stein, and then the ratio is 1 - rho c*.

Later the baselines are stale. If today's mean of a prompt is `slope` times what it was under SFT, the first term is
rho (slope - c)^2, Var(r) has rho slope^2, c* is slope times as large, and below a slope of 1/2 no k makes c = 1 pay.
"""

import torch
from torch import Tensor

from .evaluate import Z


def variance_parts(rewards: Tensor) -> tuple[float, float]:
    """Split the variance of (N, k) rewards into between prompts and within a prompt (one-way ANOVA).

    Returns (between, within), both unbiased: E[within] = E_x Var(r|x), E[between] = Var_x E[r|x]; their
    sum estimates Var(r). The estimate of `between` can fall below zero when there is none.
    """
    k = rewards.shape[1]
    within = rewards.var(1, correction=1).mean()
    between = rewards.mean(1).var(correction=1) - within / k
    return between.item(), within.item()


def variance_ratio(rho: float, k: int, c: float = 1.0, slope: float = 1.0) -> float:
    """Var(r - c b) / Var(r) with k baseline responses of the SFT policy, as the module says."""
    return (rho * (slope - c) ** 2 + (1 - rho) * (1 + c**2 / k)) / (rho * slope**2 + 1 - rho)


def best_share(rho: float, k: int, slope: float = 1.0) -> float:
    """c*: slope between / (between + within / k); at the start in [0, 1]."""
    return slope * rho / (rho + (1 - rho) / k) if rho > 0 else 0.0


def break_even(rho: float, slope: float = 1.0) -> float:
    """The k above which c = 1 lowers the variance; infinite where none does."""
    return (1 - rho) / (rho * (2 * slope - 1)) if rho > 0 and slope > 0.5 else float("inf")


def measured_law(rewards: Tensor) -> dict[str, float]:
    """(N, k) rewards of the SFT policy's responses -> between, within and rho with their standard errors.

    Each is a smooth function of means over N independent prompts, so its standard error is that of a mean: of what
    each prompt contributes to it (the delta method).
    """
    rewards = rewards.double()
    N, k = rewards.shape
    between, within = variance_parts(rewards)
    total = between + within
    rho = between / total if total > 0 else 0.0
    within_of_prompt = rewards.var(1, correction=1)
    distance = (rewards.mean(1) - rewards.mean()) ** 2
    between_of_prompt = distance * N / (N - 1) - within_of_prompt / k
    if total > 0:
        rho_of_prompt = (between_of_prompt * (1 - rho) - within_of_prompt * rho) / total
    else:
        rho_of_prompt = torch.zeros(N)
    return {
        "between": between,
        "within": within,
        "rho": rho,
        "sd": max(total, 0.0) ** 0.5,
        "between_se": standard_error(between_of_prompt),
        "within_se": standard_error(within_of_prompt),
        "rho_se": standard_error(rho_of_prompt),
    }


def standard_error(contributions: Tensor) -> float:
    """Of the mean of N independent prompts' contributions, (N,)."""
    return (contributions.std() / len(contributions) ** 0.5).item()


def within_correlation(rewards: Tensor, feature: Tensor) -> float:
    """Correlation of (N, k) rewards with a feature of the responses, both taken from their prompt's mean. 0 where one
    of them doesn't vary."""
    r = rewards.double() - rewards.double().mean(1, keepdim=True)
    f = feature.double() - feature.double().mean(1, keepdim=True)
    size = (r.square().sum() * f.square().sum()).sqrt()
    return ((r * f).sum() / size).item() if size > 0 else 0.0


def advice(rho: float, rho_se: float, k: int) -> str:
    """What to do with the baseline: "leave", "adapt" or "subtract". figures/rule.py asks how often that is right."""
    if rho + Z * rho_se < 1 / (k + 1):
        return "leave"
    return "subtract" if rho - Z * rho_se > 0.5 else "adapt"


def verdict(law: dict[str, float], k: int) -> str:
    """The advice, and what to expect of contrast with k baseline responses, in words."""
    rho = law["rho"]
    rho_in_words = f"rho is {rho:.2f} ± {Z * law['rho_se']:.2f}, break-even at k = {k} is {1 / (k + 1):.2f}"
    whole = f"subtracting all of the baseline leaves {variance_ratio(rho, k):.0%} of the reward's variance"
    share = f"'adaptive' would subtract a share of {best_share(rho, k):.2f}"
    word = advice(rho, law["rho_se"], k)
    if word == "leave":
        return f"{rho_in_words}: leave it, there is little to gain ({whole}; {share})"
    if word == "adapt":
        return f"{rho_in_words}: adapt ({share}; {whole})"
    return f"{rho_in_words}: subtract, or compare with a group ({whole})"


def law_in_words(law: dict[str, float], k: int) -> list[str]:
    """The lines that a run prints after its baselines. law: of `measured_law`, and the two correlations."""
    rho = law["rho"]
    ratios = ", ".join(f"{variance_ratio(rho, n):.3g} (k = {n})" for n in (1, 2, 4, 8))
    between = f"{law['between']:.3g} ± {Z * law['between_se']:.2g}"
    within = f"{law['within']:.3g} ± {Z * law['within_se']:.2g}"
    ended = law["ended_correlation"]
    length = law["length_correlation"]
    return [
        f"within a prompt, the score correlates {ended:.2f} with having ended, {length:.2f} with length",
        f"variance of the reward between prompts {between}, within a prompt {within}",
        f"predicted Var(r - b) / Var(r): {ratios}; best share c* = {best_share(rho, k):.2g}",
        verdict(law, k),
    ]
