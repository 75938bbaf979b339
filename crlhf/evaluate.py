"""Did it help? Held-out prompts, one response each, a judge, and intervals.

Every method answers the same prompts from the same random stream. The judge is any reward callable: the gold
score where it is known, which removes the judge's own error; else the reward model or whatever you trust.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .config import PPOConfig, RunConfig
from .engine.checkpoint import Job
from .engine.files import slices, stream
from .engine.forward import Model
from .engine.text import Batch, Reward, Tokenizer
from .policy import generate, response_log_probs

Z = 1.959964  # two-sided 95% of the normal distribution
MOST_LOGITS = 2**26  # at once when log-probs are measured: 256 MiB in fp32


@cache
def t_quantile(df: int) -> float:
    """97.5% quantile of Student's t with df degrees of freedom, by bisection."""
    low, high = 0.0, 13.0  # it is 12.7 at df = 1 and falls from there
    for _ in range(60):
        x = (low + high) / 2
        if t_probability(x, df) < 0.95:
            low = x
        else:
            high = x
    return low


def t_probability(x: float, df: int) -> float:
    """P(|t| < x) for a whole number df: a finite sum (Abramowitz and Stegun 26.7.3 for odd df, 26.7.4 for even df)."""
    theta = math.atan(x / math.sqrt(df))
    is_odd = df % 2
    term = math.cos(theta) if is_odd else 1.0
    total = 0.0
    for n in range(1 + is_odd, df, 2):
        total += term
        term *= math.cos(theta) ** 2 * n / (n + 1)
    if is_odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


def mean_interval(values: Tensor | list[float]) -> tuple[float, float]:
    """(mean, half-width of its 95% interval) of (N,) independent values, by Student's t. nan for N = 1."""
    values = torch.as_tensor(values, dtype=torch.float64)
    n = len(values)
    if n == 1:
        return values.item(), math.nan
    half_width = t_quantile(n - 1) * values.std().item() / n**0.5
    return values.mean().item(), half_width


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval (low, high) of a share (Wilson 1927). Stays inside [0, 1], also for 0 or n successes."""
    p = successes / n
    z2 = Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(scores: Tensor | list, other_scores: Tensor | list, tolerance: float = 1e-6) -> dict:
    """Win / tie / loss of (N,) paired scores against others on the same prompts, and the mean difference.

    Returns shares 'win', 'tie', 'loss', the Wilson interval 'win_interval', and 'difference' with its
    interval's half-width.
    """
    difference = torch.as_tensor(scores, dtype=torch.float64) - torch.as_tensor(other_scores, dtype=torch.float64)
    n = len(difference)
    wins = int((difference > tolerance).sum())
    losses = int((difference < -tolerance).sum())
    return {
        "win": wins / n,
        "tie": (n - wins - losses) / n,
        "loss": losses / n,
        "win_interval": wilson_interval(wins, n),
        "difference": mean_interval(difference),
    }


@torch.no_grad()
def evaluate_policy(
    policy: Model,
    ref_policy: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    judges: dict[str, Reward],
    job: Job,
    temperature: float = PPOConfig.temperature,
) -> list[dict]:
    """Sample one response per prompt and judge it.

    judges: dict name -> reward callable. Returns one row per prompt: {prompt, response, ended, kl, and a score
    for each judge}; kl is log pi(y|x) - log pi_ref(y|x), whose mean estimates KL(pi || pi_ref) in nats.
    """
    rows = []
    for first, batch_prompts in slices(prompts, job.sampling_batch_size, job.name):
        generator = stream(job.seed, "evaluation", first, device=policy.device)
        responses, has_ended, batch = generate(
            policy, tokenizer, batch_prompts, job.max_response_tokens, temperature, generator=generator
        )
        kl = log_ratio(policy, ref_policy, batch, temperature).tolist()
        scores = {name: judge(batch_prompts, responses).tolist() for name, judge in judges.items()}
        for i, prompt in enumerate(batch_prompts):
            row = {"prompt": prompt, "response": responses[i], "ended": has_ended[i].item(), "kl": kl[i]}
            row |= {name: values[i] for name, values in scores.items()}
            rows.append(row)
    return rows


def log_ratio(policy: Model, ref_policy: Model, batch: Batch, temperature: float) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x) of whole responses: (B,).

    Some rows at a time: of a whole batch the logits alone, (B, T, V), can take more memory than the models.
    """
    n_rows = max(1, MOST_LOGITS // (batch.response_ids.shape[1] * policy.config.vocab_size))
    parts = [batch]
    if n_rows < len(batch):  # to cut a batch makes a GPU wait
        rows = torch.arange(len(batch), device=batch.response_ids.device)
        parts = [batch[some_rows] for some_rows in rows.split(n_rows)]
    ratios = []
    for part in parts:
        log_probs = response_log_probs(policy, part, temperature)
        ref_log_probs = response_log_probs(ref_policy, part, temperature)
        ratio = (log_probs - ref_log_probs) * part.response_mask
        ratios.append(ratio.sum(1))
    return torch.cat(ratios)


def column(rows: list[dict], name: str) -> Tensor:
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)


def preference_accuracy(
    reward: Reward, preferences: list[dict], group_of: Callable[[str], str] | None = None
) -> dict[str, float]:
    """Share of pairs that `reward` orders as the labels do; where rows hold gold_chosen and gold_rejected, also as
    gold does, overall and by group_of(prompt).

    Returns {'pairs': n, 'labels': share, 'gold': share, 'gold, easy': ..., ...}.
    """
    agree = []
    for _, rows in slices(preferences, RunConfig.sampling_batch_size, "reward report"):
        prompts = [row["prompt"] for row in rows]
        chosen = reward(prompts, [row["chosen"] for row in rows])
        rejected = reward(prompts, [row["rejected"] for row in rows])
        agree.append(chosen > rejected)
    agree = torch.cat(agree)
    report = {"pairs": len(preferences), "labels": agree.float().mean().item()}
    if "gold_chosen" not in preferences[0]:
        return report
    gold_agrees = torch.tensor([row["gold_chosen"] > row["gold_rejected"] for row in preferences])
    is_right = gold_agrees == agree
    report["gold"] = is_right.float().mean().item()
    groups = [group_of(row["prompt"]) for row in preferences] if group_of else []
    for name in sorted(set(groups)):
        is_member = torch.tensor([group == name for group in groups])
        report[f"gold, {name}"] = is_right[is_member].float().mean().item()
    return report
