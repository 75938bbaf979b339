"""What a constant in all rewards does to the gradient: nothing, if lambda is 1 or the critic knows it."""

import pytest
import torch
from torch import nn

from crlhf import ppo
from crlhf.engine.files import stream

STOP = 0.2  # probability of stopping, at every step


def episodes(longest):
    """Every response of a policy that stops with probability STOP at each step: (length, has it stopped, probability).
    At `longest` it is cut off."""
    for length in range(1, longest + 1):
        reached = (1 - STOP) ** (length - 1)
        yield length, True, reached * STOP
    yield longest, False, (1 - STOP) ** longest


def stop_gradient(level, lam, value, longest=20):
    """E[sum_t A_t d log pi(a_t) / d theta] by enumeration, where STOP = sigmoid(theta), the reward is `level` whatever
    was written, and the critic says `value` everywhere."""
    total = 0.0
    for length, has_stopped, probability in episodes(longest):
        mask = torch.ones(1, length, dtype=torch.bool)
        rewards = torch.zeros(1, length, dtype=torch.float64)
        rewards[0, -1] = level
        values = torch.full((1, length), value, dtype=torch.float64)
        advantages, _ = ppo.gae(rewards, values, mask, 1.0, lam)
        scores = torch.full((length,), -STOP, dtype=torch.float64)  # d log(1 - STOP) / d theta
        if has_stopped:
            scores[-1] = 1 - STOP
        total += probability * (advantages[0] @ scores).item()
    return total


@pytest.mark.parametrize("level", [3.0, -3.0])
def test_a_level_that_the_critic_does_not_know_pays_for_stopping_unless_lambda_is_1(level):
    assert stop_gradient(level, 1.0, 0.0) == pytest.approx(0.0, abs=1e-12)
    assert stop_gradient(level, 0.95, 0.0) == pytest.approx(0.1586 * level, rel=1e-3)
    assert stop_gradient(level, 0.0, 0.0) == pytest.approx(0.7885 * level, rel=1e-3)  # STOP (1 - STOP) a step


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_a_level_that_the_critic_knows_changes_nothing(lam):
    assert stop_gradient(3.0, lam, 3.0) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_at_lambda_0_is_known_in_closed_form():
    """Then only the last token is paid: p (1 - p) sum_t (1 - p)^(t - 1), less what the cut takes."""
    reached = [(1 - STOP) ** t for t in range(20)]
    expected = sum(STOP * (1 - STOP) * share for share in reached) - STOP * (1 - STOP) ** 20
    assert stop_gradient(1.0, 0.0, 0.0) == pytest.approx(expected, rel=1e-9)


def loss_gradient(level, lam, value):
    """The stop logit's gradient in PPO's own clipped loss, before whitening, on many sampled responses."""
    n, longest = 4000, 20
    uniform = torch.rand(n, longest, generator=stream(0, "stops"), dtype=torch.float64)
    stops = uniform < STOP
    stops_before = stops.cumsum(1) - stops.long()
    mask = stops_before == 0
    rewards = torch.full((n,), level, dtype=torch.float64)
    theta = torch.tensor(STOP, dtype=torch.float64).logit().requires_grad_()
    log_probs = torch.where(stops, nn.functional.logsigmoid(theta), nn.functional.logsigmoid(-theta))
    old_log_probs = log_probs.detach()
    R = ppo.token_rewards(rewards, old_log_probs, old_log_probs, mask, 0.05)
    values = torch.full((n, longest), value, dtype=torch.float64)
    advantages, _ = ppo.gae(R, values, mask, 1.0, lam)
    loss, _ = ppo.policy_loss(log_probs, old_log_probs, advantages, mask, 0.2)
    (loss / n).backward()
    return -theta.grad.item()


def test_ppos_own_loss_pushes_the_stop_logit_as_the_enumeration_says():
    assert loss_gradient(3.0, 0.95, 0.0) == pytest.approx(stop_gradient(3.0, 0.95, 0.0), abs=0.12)
    assert abs(loss_gradient(3.0, 1.0, 0.0)) < 0.15 and abs(loss_gradient(3.0, 0.95, 3.0)) < 1e-9
