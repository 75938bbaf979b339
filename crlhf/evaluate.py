"""Did it help? Held-out prompts, one response each, a judge, and intervals.

Every method answers the same prompts from the same random stream. The judge is any reward callable: the gold
score where it is known, which removes the judge's own error; else the reward model or whatever you trust.
"""

import math

import torch

from .distributed import shared_map
from .policy import Batch, generate, response_log_probs
from .runs import progress, stream

Z = 1.959964  # two-sided 95% of the normal distribution
MOST_LOGITS = 2**26  # at once when log-probs are measured: 256 MiB in fp32


def t_quantile(df):
    """97.5% quantile of Student's t by its expansion in 1/df (Abramowitz and Stegun 26.7.5): within 1% from df = 3."""
    z = Z
    return (z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3))


def mean_interval(values):
    """(mean, half-width of its 95% interval) of (N,) independent values, by Student's t. nan for N = 1."""
    values = torch.as_tensor(values, dtype=torch.float64)
    n = len(values)
    return values.mean().item(), t_quantile(n - 1) * values.std().item() / n**0.5 if n > 1 else math.nan


def wilson_interval(successes, n):
    """95% interval (low, high) of a share (Wilson 1927). Stays inside [0, 1], also for 0 or n successes."""
    p, z2 = successes / n, Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(scores, other_scores, tolerance=1e-6):
    """Win / tie / loss of (N,) paired scores against others on the same prompts, and the mean difference.

    Returns shares 'win', 'tie', 'loss', the Wilson interval 'win_interval', and 'difference' with its
    interval's half-width.
    """
    difference = torch.as_tensor(scores, dtype=torch.float64) - torch.as_tensor(other_scores, dtype=torch.float64)
    n, wins, losses = len(difference), int((difference > tolerance).sum()), int((difference < -tolerance).sum())
    return {"win": wins / n, "tie": (n - wins - losses) / n, "loss": losses / n,
            "win_interval": wilson_interval(wins, n), "difference": mean_interval(difference)}


@torch.no_grad()
def evaluate_policy(policy, ref_policy, tokenizer, prompts, judges, max_response_tokens, seed, batch_size=256,
                    temperature=1.0, title="evaluation"):
    """Sample one response per prompt and judge it.

    judges: dict name -> reward callable. Returns one row per prompt: {prompt, response, ended, kl, and a score
    for each judge}; kl is log pi(y|x) - log pi_ref(y|x), whose mean estimates KL(pi || pi_ref) in nats.
    """
    device = next(policy.parameters()).device

    def judge_batch(first):
        some = prompts[first:first + batch_size]
        texts, has_ended, batch = generate(policy, tokenizer, some, max_response_tokens, temperature,
                                           generator=stream(seed, "evaluation", first, device=device))
        kl = log_ratio(policy, ref_policy, batch, temperature).tolist()
        scores = {name: judge(some, texts).tolist() for name, judge in judges.items()}
        return [{"prompt": some[i], "response": texts[i], "ended": bool(has_ended[i]), "kl": kl[i],
                 **{name: values[i] for name, values in scores.items()}} for i in range(len(some))]

    rows = []
    with progress(len(prompts), title) as bar:
        for new in shared_map(judge_batch, range(0, len(prompts), batch_size)):
            rows += new
            bar.update(len(new))
    return rows


def log_ratio(policy, ref_policy, batch: Batch, temperature):
    """log pi(y|x) - log pi_ref(y|x) of whole responses: (B,)."""
    # some rows at a time: of whole batches the logits alone, (B, T, V), can take more memory than the models
    n_rows = max(1, MOST_LOGITS // (batch.response_ids.shape[1] * policy.config.vocab_size))
    ratios = []
    for rows in torch.arange(len(batch)).split(n_rows):
        piece = batch[rows]
        ratio = response_log_probs(policy, piece, temperature) - response_log_probs(ref_policy, piece, temperature)
        ratios.append((ratio * piece.response_mask).sum(1))
    return torch.cat(ratios)


def column(rows, name):
    return torch.tensor([row[name] for row in rows], dtype=torch.float64)
