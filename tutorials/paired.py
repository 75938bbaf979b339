"""The random numbers of the library's PPO, so that a loop of your own draws the same."""

import torch
from torch import Tensor

from crlhf.config import PPOConfig
from crlhf.engine.files import stream


def rollout_noise(seed: int, iteration: int, tokens: int, rows: int, vocabulary: int) -> Tensor:
    """Exponential noise for a rollout's race of tokens, in float64: (T, B, V)."""
    draw = stream(seed, "ppo rollout", iteration)
    return -torch.stack([torch.rand(rows, vocabulary, generator=draw) for _ in range(tokens)]).log().double()


def minibatches_in_order(config: PPOConfig, seed: int, iteration: int, n: int) -> list[Tensor]:
    """The rows, of n, of each gradient step of an iteration: every minibatch once a pass, in a new order each time."""
    rows = torch.randperm(n, generator=stream(seed, "ppo minibatches", iteration))
    minibatches, order = rows.chunk(config.minibatches), stream(seed, "ppo order", iteration)
    passes = [torch.randperm(config.minibatches, generator=order).tolist() for _ in range(config.epochs)]
    return [minibatches[number] for numbers in passes for number in numbers]
