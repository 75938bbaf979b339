"""Step 2 of contrastive rewards: compare with the baseline instead of trusting the score (arXiv 2403.07708).

    r_CR(x, y) = lambda * (r(x, y) - c * b(x)),   b(x) = mean of r(x, y_j) over the k offline responses y_j

The paper's method is c = 1. It removes whatever is common to a prompt and rewards improvement over the SFT
policy. Since b depends on x alone, the expected policy gradient is the same as with r: what changes is its
variance, and everything in PPO that is not shift-invariant (a critic that lags, whitening over prompts,
clipping, the size of the reward beside the KL price).

c = 1 is not always the best share. Among r - c * b the variance is least at

    c* = Cov(r, b) / Var(b),   and is then (1 - rho^2) Var(r),

near 1 while the baseline explains the reward, near 0 once it is stale. 'adaptive' follows c* as PPO goes on.

Pure tensor functions first; the running state last.
"""

import torch

from .config import UserError

# ------------------------------------------------------------------------------------------ pure functions


def aggregate(baseline_rewards, how="mean"):
    """One baseline a prompt from k of them: (B, k) -> (B,).

    'mean' is the paper's. 'median' withstands an outlier among the k; 'max' asks for more than the best of
    k, 'min' only for more than the worst. All four remove a constant of the prompt exactly.
    """
    return {"mean": lambda b: b.mean(1), "median": lambda b: b.quantile(0.5, 1), "max": lambda b: b.amax(1),
            "min": lambda b: b.amin(1)}[how](baseline_rewards)


def leave_one_out(rewards, group_size):
    """Each reward's baseline is the mean of the others of its group: (B,), groups in a row -> (B,).

    RLOO (Kool et al. 2019, Ahmadian et al. 2024): contrastive rewards whose k = group_size - 1 baselines are drawn
    from the current policy in every step. They are never stale, and cost k generations a prompt every time.
    """
    groups = rewards.view(-1, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).flatten()


def contrast(rewards, baseline, coefficient=1.0):
    """r - c * b: (B,), (B,) -> (B,)."""
    return rewards - coefficient * baseline


def best_coefficient(mean_r, mean_b, mean_rb, mean_bb):
    """c* = Cov(r, b) / Var(b) from four moments, kept in [0, 1]; 1 if the baselines don't vary at all."""
    variance = mean_bb - mean_b**2
    if variance <= 1e-12:
        return 1.0
    return min(max((mean_rb - mean_r * mean_b) / variance, 0.0), 1.0)


def magnitude_scale(mean_abs_raw, mean_abs_contrastive):
    """lambda = E|r| / E|r - c b|, which gives the contrastive reward the raw reward's typical size.

    The paper scales by a ratio between running means of the contrastive and the original rewards; its exact
    formula wasn't available to us, and this is our reading: means of magnitudes. A raw reward with a large
    constant offset makes lambda large for no good reason.
    """
    return mean_abs_raw / mean_abs_contrastive if mean_abs_contrastive > 1e-8 else 1.0


def merge_moments(count, mean, m2, values):
    """Add a batch to (count, mean, sum of squared deviations), exactly (Chan et al. 1979)."""
    n, batch_mean = len(values), values.mean().item()
    total, delta = count + n, batch_mean - mean
    m2 += ((values - batch_mean) ** 2).sum().item() + delta**2 * count * n / total
    return total, mean + delta * n / total, m2


# ------------------------------------------------------------------------------------------- running state


class ContrastiveReward:
    """Turns raw rewards of a batch into contrastive ones, and keeps the running moments this needs.

    baselines: dict prompt -> (k,) rewards of its offline responses; with config.source 'group' they aren't needed,
    and the prompts of a batch come in groups of group_size. adaptive: follow c* from exponentially
    decaying moments over batches, instead of config.coefficient. The current batch enters the moments first,
    so the very first batch has a coefficient; with B rewards that correlates c with one reward by order 1/B.
    """

    def __init__(self, baselines, config, adaptive=False, group_size=1):
        self.baselines, self.config, self.adaptive, self.group_size = baselines, config, adaptive, group_size
        self.coefficient, self.scale = config.coefficient, 1.0
        self.moments, self.sizes = None, None     # decaying means of (r, b, rb, bb) and of (|r|, |r - c b|)
        self.spread = (0, 0.0, 0.0)               # count, mean, m2 of r - c b

    def __call__(self, prompts, rewards):
        """B prompts and their (B,) raw rewards -> (B,) contrastive rewards."""
        grouped = self.config.source == "group"
        baseline = leave_one_out(rewards, self.group_size) if grouped else self.baseline_of(prompts)
        if self.adaptive:
            self.moments = self.decayed(self.moments, [rewards, baseline, rewards * baseline, baseline**2])
            self.coefficient = best_coefficient(*self.moments)
        contrastive = contrast(rewards, baseline, self.coefficient)
        if self.config.scale == "magnitude":
            self.sizes = self.decayed(self.sizes, [rewards.abs(), contrastive.abs()])
            self.scale = magnitude_scale(*self.sizes)
        elif self.config.scale == "std":
            self.spread = merge_moments(*self.spread, contrastive)
            count, _, m2 = self.spread
            self.scale = (count / m2) ** 0.5 if m2 > 1e-12 else 1.0
        return self.scale * contrastive

    def baseline_of(self, prompts):
        """(B,) baselines b(x)."""
        try:
            return aggregate(torch.stack([self.baselines[prompt] for prompt in prompts]), self.config.aggregate)
        except KeyError as error:
            raise UserError(f"prompt {error} has no baselines: sample them for every training prompt") from None

    def decayed(self, old, values):
        means = [value.mean().item() for value in values]
        decay = self.config.decay
        return means if old is None else [decay * o + (1 - decay) * m for o, m in zip(old, means)]

    def state_dict(self):
        refreshed = ("baselines",) if self.config.refresh else ()
        return {name: getattr(self, name) for name in ("coefficient", "scale", "moments", "sizes", "spread", *refreshed)}

    def load_state_dict(self, state):
        vars(self).update(state)
