"""A world in a table, small enough for many seeds: 100 prompts with 8 responses each, and nothing to generalise.

The policy is a row of logits for each prompt. In a step it draws a response to each of them, y ~ pi = softmax(logits),
and climbs the policy gradient with whitened advantages:

    A = r - c b - V,    logits += lr * whiten(A) * (onehot(y) - pi)

where onehot(y) - pi is the gradient of log pi(y).

Rewards and logits have shape (S, P, 8): S seeds side by side, P prompts, 8 responses.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from crlhf.contrastive import leave_one_out
from crlhf.engine.files import stream
from crlhf.evaluate import mean_interval

SEEDS = 16
PROMPTS = 100
RESPONSES = 8
GROUP = 4


def qualities() -> Tensor:
    """How good each response is for its prompt, mean 0 in each prompt. (S, P, 8)"""
    quality = torch.randn(SEEDS, PROMPTS, RESPONSES, generator=stream(0, "quality"))
    return quality - quality.mean(2, keepdim=True)


def levels() -> Tensor:
    """A constant for each prompt, standard deviation 1. (S, P, 1)"""
    return torch.randn(SEEDS, PROMPTS, 1, generator=stream(0, "levels"))


def draw_responses(pi: Tensor, n: int, draw: torch.Generator) -> Tensor:
    """n responses to each prompt. (S, P, 8) -> (S, P, n)"""
    rows = pi.reshape(-1, RESPONSES)
    responses = torch.multinomial(rows, n, replacement=True, generator=draw)
    return responses.view(SEEDS, -1, n)


def adaptive_share(r: Tensor, b: Tensor) -> Tensor:
    """Cov(r, b) / Var(b) over the prompts of each seed, kept in [0, 1]. (S, P, 1) twice -> (S, 1, 1)"""
    centred = b - b.mean(1, keepdim=True)
    covariance = (r * centred).mean(1, keepdim=True)
    variance = (centred**2).mean(1, keepdim=True)
    return (covariance / variance).clamp(0, 1)


def learn(
    quality: Tensor,
    reward: Tensor,
    method: str = "plain",
    steps: int = 150,
    k: int = 4,
    lr: float = 0.3,
    critic_lr: float = 0.0,
    judge: Callable[[Tensor], Tensor] = lambda r: r,
) -> Tensor:
    """True quality after each step, exactly: sum_y pi(y) quality(y), mean over prompts. -> (steps, S)

    method: plain, contrastive, adaptive: k baselines drawn once. fresh: k from today's policy at every step.
    group: groups of 4 as each other's baseline, a quarter of the prompts in a step.
    judge: what is reported for a response of this reward; it may be noisy.
    """
    draw = stream(0, "learn", method, k)
    logits = torch.zeros_like(reward)
    values = torch.zeros(SEEDS, PROMPTS, 1)  # the critic: one number a prompt
    offline = judge(reward.gather(2, draw_responses(logits.softmax(2), k, draw))).mean(2, keepdim=True)
    curve = []
    for _ in range(steps):
        pi = logits.softmax(2)
        y = draw_responses(pi, GROUP if method == "group" else 1, draw)
        r = judge(reward.gather(2, y))  # (S, P, 1), or (S, P, GROUP)
        visited = torch.ones_like(r)
        if method == "contrastive":
            r = r - offline
        elif method == "adaptive":
            r = r - adaptive_share(r, offline) * offline
        elif method == "fresh":
            online = judge(reward.gather(2, draw_responses(pi, k, draw))).mean(2, keepdim=True)
            r = r - online
        elif method == "group":
            r = r - leave_one_out(r.flatten(), GROUP).view_as(r)
            order = torch.rand(SEEDS, PROMPTS, 1, generator=draw).argsort(1)
            visited = (order < PROMPTS // GROUP).expand_as(r).float()
        advantages = r - values
        values = values + critic_lr * advantages.mean(2, keepdim=True)
        gradient = one_hot(y, RESPONSES) - pi[:, :, None]  # of log pi(y): (S, P, n, 8)
        steps_of_responses = lr * whiten(advantages, visited)[..., None] * gradient
        logits = logits + steps_of_responses.sum(2)
        true_quality = (logits.softmax(2) * quality).sum(2)  # (S, P)
        curve.append(true_quality.mean(1))
    return torch.stack(curve)


def whiten(advantages: Tensor, visited: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over what a seed has visited, 0 elsewhere. (S, P, n) -> (S, P, n)"""
    count = visited.sum((1, 2), keepdim=True)
    mean = (advantages * visited).sum((1, 2), keepdim=True) / count
    centred = (advantages - mean) * visited
    variance = centred.square().sum((1, 2), keepdim=True) / count
    return centred / (variance + 1e-6).sqrt()


def apart(a: Tensor, b: Tensor) -> str:
    """Two methods' results, one a seed: their paired difference with its 95% interval, as text."""
    gap, half = mean_interval(a - b)
    return f"{gap:+.2f} ± {half:.2f}"
