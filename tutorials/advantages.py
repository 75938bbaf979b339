"""What a baseline per prompt changes in each estimator of advantages, and where it cancels.

With m responses to each of N prompts and rewards r of shape (N, m), take r - b(x) in place of r:

    PPO with GAE          A = whiten(GAE(r, V))                      V doesn't know b yet: A changes
    REINFORCE(++)         A = (r - mean of the batch) / its sd       A changes
    RLOO                  A = r - mean of the prompt's others        b cancels
    group mean, Dr. GRPO  A = r - mean of the prompt                 b cancels
    GRPO                  A = (r - mean of the prompt) / its sd      b cancels
    ReMax                 A = r - reward of the greedy response      b cancels

Two doors stay open: a scale taken over the batch (GRPO with scale_rewards = "batch": the deviation of all rewards holds
the differences between prompts) and a clip of the reward (it cuts levels before a mean is taken away).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crlhf.config import PPOConfig
from crlhf.contrastive import contrast, leave_one_out
from crlhf.ppo import gae, whiten


def ppo_gae(rewards: Tensor, values: Tensor) -> Tensor:
    """Whitened GAE of responses with T tokens, paid at the last: (N, m), values (N, m, T) of a critic -> (N, m, T)."""
    flat_values = values.flatten(0, 1)  # (N m, T)
    mask = torch.ones_like(flat_values, dtype=torch.bool)
    token_rewards = torch.zeros_like(flat_values)
    token_rewards[:, -1] = rewards.flatten()
    advantages, _ = gae(token_rewards, flat_values, mask, 1.0, PPOConfig.lam)
    return whiten(advantages, mask).view_as(values)


def reinforce(rewards: Tensor) -> Tensor:
    """REINFORCE and REINFORCE++: centred and scaled over the whole batch."""
    everywhere = torch.ones_like(rewards, dtype=torch.bool)
    return whiten(rewards, everywhere)


def batch_mean(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


def rloo(rewards: Tensor) -> Tensor:
    mean_of_others = leave_one_out(rewards.flatten(), rewards.shape[1])
    return rewards - mean_of_others.view_as(rewards)


def group_mean(rewards: Tensor) -> Tensor:
    """Dr. GRPO, and REINFORCE++ with a baseline before its scale."""
    return rewards - rewards.mean(1, keepdim=True)


def grpo(rewards: Tensor) -> Tensor:
    deviation = rewards.std(1, keepdim=True)
    return group_mean(rewards) / (deviation + 1e-4)


def grpo_batch_scale(rewards: Tensor) -> Tensor:
    return group_mean(rewards) / (rewards.std() + 1e-4)


def remax(rewards: Tensor, greedy: Tensor) -> Tensor:
    """greedy: (N,) rewards of each prompt's greedy response. They are contrasted, too: same prompt, same reward."""
    return rewards - greedy[:, None]


def clipped(estimator: Callable, limit: float) -> Callable:
    """The estimator after a clip of rewards to [-limit, limit]."""

    def after_clip(rewards: Tensor) -> Tensor:
        return estimator(rewards.clamp(-limit, limit))

    return after_clip


# ------------------------------------------------------------------------------------------------- the table


def relative_changes(rewards: Tensor, baseline: Tensor, greedy: Tensor, values: Tensor) -> dict[str, float]:
    """Estimator -> root mean square change of the advantages, in units of their own, when r - b takes the place of r.

    rewards (N, m), baseline (N,), greedy (N,), values (N, m, T) of a critic that has learned nothing of b yet.
    """
    limit = rewards.abs().quantile(0.9).item()
    estimators = {
        "PPO, GAE with a critic": lambda r, g: ppo_gae(r, values),
        "REINFORCE, REINFORCE++": lambda r, g: reinforce(r),
        "mean of the batch": lambda r, g: batch_mean(r),
        "RLOO": lambda r, g: rloo(r),
        "mean of the group, Dr. GRPO": lambda r, g: group_mean(r),
        "GRPO": lambda r, g: grpo(r),
        "ReMax": remax,
        "GRPO, scaled over the batch": lambda r, g: grpo_batch_scale(r),
        "RLOO, rewards clipped": lambda r, g: clipped(rloo, limit)(r),
    }
    contrastive_rewards = contrast(rewards, baseline[:, None].expand_as(rewards), 1.0)
    contrastive_greedy = contrast(greedy, baseline, 1.0)
    table = {}
    for name, estimator in estimators.items():
        raw = estimator(rewards, greedy)
        change = estimator(contrastive_rewards, contrastive_greedy) - raw
        mean_square = change.square().mean() / raw.square().mean()
        table[name] = mean_square.sqrt().item()
    return table
