"""Step 2 of contrastive rewards: compare with the baseline instead of trusting the score (arXiv 2403.07708).

    r_CR(x, y) = alpha * (r(x, y) - c * b(x)),   b(x) = mean of r(x, y_j) over the k offline responses y_j

The paper's method is c = 1; alpha is its dynamic scale, there lambda. It removes whatever is common to a prompt and
rewards improvement over the SFT policy.

Does a baseline leave the goal alone? b depends on x alone, so with REINFORCE, with lambda = 1, or with a critic that
knows b, the expected policy gradient is the same as with r. What changes is its variance, and everything in PPO that is
not shift-invariant: a critic that lags, whitening over prompts, clipping, the size of the reward beside the KL penalty.
With lambda < 1 and a critic that doesn't know b it is *not* the same. A_t then holds (gamma lambda)^(T-t) b, see `gae`:
a level b > 0 pays for stopping early, b < 0 for going on, since T depends on y. That is bias, not variance. Contrast
takes it away, and so do lambda = 1, a critic that starts at the level, or, for what is common to all prompts,
subtracting one number. With c < 1 a share of it stays.

c = 1 is not always the best share. Among r - c * b the variance is least at

    c* = Cov(r, b) / Var(b),   and is then (1 - corr(r, b)^2) Var(r),

near 1 while the baseline explains the reward, near 0 once it is stale. 'adaptive' follows c* as PPO goes on.

Two relatives are one setting away. source = 'running' takes a prompt's k latest rewards as its baselines, the offline
ones first and then what PPO earned on it: a tracker, as in SPO (arXiv 2509.13232). scale = 'sigmoid' squeezes r - c * b
into (0, 1), as PAR does (arXiv 2502.18770), which bounds what a reward model's error can pay.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import ContrastiveConfig, UserError

DECAY = 0.9  # of the running moments, per iteration

# ------------------------------------------------------------------------------------------ pure functions


def aggregate(baseline_rewards: Tensor, how: str = "mean") -> Tensor:
    """One baseline a prompt from k of them: (B, k) -> (B,).

    'mean' is the paper's. 'median' withstands an outlier among the k; 'max' asks for more than the best of
    k, 'min' only for more than the worst. All four remove a constant of the prompt exactly.
    """
    if how == "mean":
        return baseline_rewards.mean(1)
    quantiles = {"median": 0.5, "max": 1.0, "min": 0.0}
    return baseline_rewards.quantile(quantiles[how], 1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Each reward's baseline is the mean of the others of its group: (B,), groups in a row -> (B,).

    RLOO (Kool et al. 2019, Ahmadian et al. 2024): contrastive rewards whose k = group_size - 1 baselines come from
    the current policy in every step. They are never stale, and cost k generations a prompt every time.
    """
    groups = rewards.view(-1, group_size)
    sum_of_others = groups.sum(1, keepdim=True) - groups
    return (sum_of_others / (group_size - 1)).flatten()


def contrast(rewards: Tensor, baseline: Tensor, coefficient: float = ContrastiveConfig.coefficient) -> Tensor:
    """r - c * b: (B,), (B,) -> (B,)."""
    return rewards - coefficient * baseline


def best_coefficient(mean_r: float, mean_b: float, mean_rb: float, mean_bb: float) -> float:
    """c* = Cov(r, b) / Var(b) from four moments, kept in [0, 1]; 1 if the baselines don't vary at all."""
    variance = mean_bb - mean_b**2
    if variance <= 1e-12:
        return 1.0
    covariance = mean_rb - mean_r * mean_b
    return min(max(covariance / variance, 0.0), 1.0)


def magnitude_scale(mean_abs_raw: float, mean_abs_contrastive: float) -> float:
    """alpha = E|r| / E|r - c b|, which gives the contrastive reward the raw reward's typical size.

    The paper scales by a ratio of running means of both rewards; its exact formula wasn't available to us, and this is
    our reading. A raw reward with a large constant offset makes alpha large for no good reason.
    """
    return mean_abs_raw / mean_abs_contrastive if mean_abs_contrastive > 1e-8 else 1.0


def merge_moments(count: int, mean: float, m2: float, values: Tensor) -> tuple[int, float, float]:
    """Add a batch to (count, mean, sum of squared deviations), exactly (Chan et al. 1979)."""
    n = len(values)
    batch_mean = values.mean().item()
    batch_m2 = ((values - batch_mean) ** 2).sum().item()
    delta = batch_mean - mean
    total = count + n
    between = delta**2 * count * n / total
    return total, mean + delta * n / total, m2 + (batch_m2 + between)


def decayed(old: list[float] | None, values: list[Tensor]) -> list[float]:
    """Exponentially decaying means over batches: DECAY * old + (1 - DECAY) * the means of this batch."""
    means = [value.mean().item() for value in values]
    if old is None:
        return means
    return [DECAY * before + (1 - DECAY) * now for before, now in zip(old, means)]


# ------------------------------------------------------------------------------------------- running state


class ContrastiveReward:
    """Turns raw rewards of a batch into contrastive ones, and keeps the running moments this needs.

    baselines: dict prompt -> (k,) rewards of its offline responses; with config.source 'group' they aren't needed,
    and the prompts of a batch come in groups of group_size. adaptive: follow c* from exponentially
    decaying moments over batches, instead of config.coefficient. The current batch enters the moments first,
    so the very first batch has a coefficient; with B rewards that correlates c with one reward by order 1/B.
    resample: (policy, iteration) -> new baselines for the prompts that come next; config.refresh needs it.
    """

    RUNNING = ("coefficient", "scale", "origin", "moments", "sizes", "spread")

    def __init__(
        self,
        baselines: dict[str, Tensor],
        config: ContrastiveConfig,
        adaptive: bool = False,
        group_size: int = 1,
        resample: Callable | None = None,
    ) -> None:
        if config.refresh and resample is None:
            raise ValueError("config.refresh samples new baselines: give `resample`, or leave refresh at 0")
        self.baselines = dict(baselines)
        self.config = config
        self.adaptive = adaptive
        self.group_size = group_size
        self.resample = resample
        self.coefficient = config.coefficient
        self.scale = 1.0
        self.origin = None  # means of r and b in the first batch: far from them the moments would lose their digits
        self.moments = None  # decaying means of (r, b, rb, bb), from the origin
        self.sizes = None  # decaying means of (|r|, |r - c b|)
        self.spread = (0, 0.0, 0.0)  # count, mean, m2 of r - c b

    def __call__(self, prompts: list[str], rewards: Tensor) -> Tensor:
        """B prompts and their (B,) raw rewards -> (B,) contrastive rewards."""
        if self.config.source == "group":
            baseline = leave_one_out(rewards, self.group_size)
        else:
            baseline = self.baseline_of(prompts)
        if self.config.source == "running":
            self.remember(prompts, rewards)
        if self.adaptive:
            self.coefficient = self.followed_coefficient(rewards, baseline)
        contrastive = contrast(rewards, baseline, self.coefficient)
        return self.rescaled(rewards, contrastive)

    def baseline_of(self, prompts: list[str]) -> Tensor:
        """(B,) baselines b(x)."""
        missing = [prompt for prompt in prompts if prompt not in self.baselines]
        if missing:
            raise UserError(f"prompt {missing[0]!r} has no baselines", "sample them for every training prompt")
        baseline_rewards = torch.stack([self.baselines[prompt] for prompt in prompts])
        return aggregate(baseline_rewards, self.config.aggregate)

    def remember(self, prompts: list[str], rewards: Tensor) -> None:
        """A prompt's newest reward takes the place of its oldest baseline."""
        for prompt, reward in zip(prompts, rewards):
            self.baselines[prompt] = torch.cat([self.baselines[prompt][1:], reward[None]])

    def followed_coefficient(self, rewards: Tensor, baseline: Tensor) -> float:
        """c* from the decaying moments, of which this batch is now a part."""
        if self.origin is None:
            self.origin = (rewards.mean().item(), baseline.mean().item())
        r = rewards.double() - self.origin[0]
        b = baseline.double() - self.origin[1]
        self.moments = decayed(self.moments, [r, b, r * b, b**2])
        return best_coefficient(*self.moments)

    def rescaled(self, rewards: Tensor, contrastive: Tensor) -> Tensor:
        """The contrastive rewards times the dynamic scale alpha, or squeezed into (0, 1): (B,), (B,) -> (B,)."""
        if self.config.scale == "sigmoid":
            return contrastive.sigmoid()
        if self.config.scale == "magnitude":
            self.sizes = decayed(self.sizes, [rewards.abs(), contrastive.abs()])
            self.scale = magnitude_scale(*self.sizes)
        elif self.config.scale == "std":
            self.spread = merge_moments(*self.spread, contrastive)
            count, _, m2 = self.spread
            self.scale = (count / m2) ** 0.5 if m2 > 1e-12 else 1.0
        return self.scale * contrastive

    def refresh(self, policy: nn.Module, iteration: int) -> None:
        """Every config.refresh iterations: baselines from the current policy, where they are wanted at all."""
        if self.config.refresh and iteration and iteration % self.config.refresh == 0:
            self.baselines |= self.resample(policy, iteration)

    def state_dict(self) -> dict:
        """What a checkpoint keeps: the running state, and the baselines where PPO changes them."""
        state = {name: getattr(self, name) for name in self.RUNNING}
        if self.config.refresh or self.config.source == "running":
            state["baselines"] = self.baselines
        return state

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)
