"""The five gaps of build.py, filled in. What they compute, and the shapes, stand in the docstrings there."""

from collections.abc import Callable

import torch
from torch import Tensor


def log_probs(logits: Tensor, response_ids: Tensor, temperature: float) -> Tensor:
    T = response_ids.shape[1]
    predicting = logits[:, -T - 1 : -1] / temperature  # (B, T, V)
    all_log_probs = torch.log_softmax(predicting, -1)
    return all_log_probs.gather(-1, response_ids[:, :, None]).squeeze(-1)


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    values = values * response_mask
    rewards = rewards * response_mask
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])  # A_{t+1}, (B,)
    next_value = torch.zeros_like(rewards[:, 0])  # V_{t+1}, (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        advantages[:, t] = advantage
    return advantages, advantages + values


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> Tensor:
    ratio = (log_probs - old_log_probs).exp()
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return (loss * response_mask).sum() / response_mask.sum()


def contrast(rewards: Tensor, baseline_rewards: Tensor) -> Tensor:
    baseline = baseline_rewards.mean(1)
    return rewards - baseline


def sample(next_logits: Callable, noise: Tensor, temperature: float, eos_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    T, B, _ = noise.shape
    response_ids = torch.full((B, T), pad_id)
    response_mask = torch.zeros(B, T, dtype=torch.bool)
    alive = torch.ones(B, dtype=torch.bool)  # rows without an EOS so far
    for t in range(T):
        logits = next_logits(response_ids[:, :t]) / temperature
        token = (logits - noise[t].log()).argmax(-1)
        response_ids[:, t] = torch.where(alive, token, pad_id)
        response_mask[:, t] = alive
        alive = alive & (token != eos_id)
    return response_ids, response_mask
