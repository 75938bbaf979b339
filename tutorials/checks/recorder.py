"""A dashboard for one_file.py and its copies: rows of numbers from what their functions are given during training.

The file itself logs three numbers an iteration. Here its functions are watched from outside, so any copy of it shows
the same fourteen.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps

import torch
from torch import Tensor

from tutorials import one_file
from tutorials.checks.learner import remaining_shares

WATCHED = ("rewards_of", "token_rewards", "gae", "policy_loss", "value_loss", "decode")

# A small start: seconds on one core. Raters without mistakes, so that few pairs are enough.
SIZES = {"sft_steps": 120, "pairs": 800, "label_flips": 0.0, "reward_steps": 80}
SIZES |= {"reward_lr": 3e-3, "n_prompts": 128, "batch_size": 32, "minibatch_size": 16, "iterations": 20, "lr": 2e-3}


@contextmanager
def settings_of(module: types.ModuleType, **changes: object) -> Iterator[None]:
    """While this lasts, a copy of one_file.py has the small settings of the checks, and these changes."""
    before = module.settings
    module.settings = module.Settings(**SIZES | changes)
    try:
        yield
    finally:
        module.settings = before


@contextmanager
def silent(module: types.ModuleType) -> Iterator[None]:
    """While this lasts, the module says nothing of its progress."""
    progress = module.progress
    module.progress = remaining_shares
    try:
        yield
    finally:
        module.progress = progress


@cache
def shared_start() -> one_file.Start:
    """What every training of the checks starts from, in float64, so that two right solutions draw the same tokens."""
    with settings_of(one_file), silent(one_file):
        start = one_file.prepare()
    return one_file.Start(start.policy.double(), start.reward_model.double(), start.prompts, start.bias.double())


def train(module: types.ModuleType, temperature: float, iterations: int = 0) -> tuple[list[dict], list[dict]]:
    """Contrastive PPO as this copy of one_file.py does it -> its log, and what was recorded, a dict an iteration.

    iterations: how many, with learning rates that fall to 0 at their end (0: all).
    """
    start = shared_start()
    changes = {"iterations": iterations} if iterations else {}
    with settings_of(module, temperature=temperature, **changes):
        torch.manual_seed(0)
        baseline_rewards = module.sample_baselines(start)
        with recorded(module) as calls:
            _, log = module.train_ppo("contrastive PPO", start, baseline_rewards)
    return log, by_iteration(calls)


@contextmanager
def recorded(module: types.ModuleType) -> Iterator[list[tuple]]:
    """While this lasts, a list receives (name, arguments, result) of every call of a watched function."""
    calls = []
    functions = {name: getattr(module, name) for name in WATCHED}
    for name, function in functions.items():
        setattr(module, name, recording(name, function, calls))
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def recording(name: str, function: Callable, calls: list[tuple]) -> Callable:
    @wraps(function)
    def recorder(*arguments: object) -> object:
        result = function(*arguments)
        calls.append((name, [detached(argument) for argument in arguments], detached(result)))
        return result

    return recorder


def detached(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def by_iteration(calls: list[tuple]) -> list[dict]:
    """For each iteration {name: [(arguments, result), ...]}. `rewards_of` is the first watched function in each."""
    iterations = []
    for name, arguments, result in calls:
        if name == "rewards_of":
            iterations.append({watched: [] for watched in WATCHED})
        iterations[-1][name].append((arguments, result))
    return iterations


def row_of(calls: dict) -> dict[str, float]:
    """An iteration on the dashboard."""
    [(_, raw)] = calls["rewards_of"]
    [((rewards, log_probs, ref_log_probs, mask, _), _)] = calls["token_rewards"]
    [((batch,), texts)] = calls["decode"]
    values, returns = targets_of(calls)
    ratios = [ratios_of(*arguments) for arguments, _ in calls["policy_loss"]]
    clip_range = one_file.Settings.clip_range
    clipped = torch.stack([(distances > clip_range).double().mean() for distances in ratios])
    row = {
        "reward": raw.mean(),
        "reward_std": raw.std(),
        "contrastive_reward": rewards.mean(),
        "contrastive_std": rewards.std(),
        "kl": ((log_probs - ref_log_probs) * mask).sum(1).mean(),
        "length": mask.sum(1).double().mean(),
        "words": sum(len(text.split()) for text in texts) / len(texts),
        "ended": (batch.response_ids == one_file.EOS).any(1).double().mean(),
        "value": values.mean(),
        "return": returns.mean(),
        "return_std": returns.std(),
        "first_ratio": ratios[0].max(),
        "clip_fraction": clipped.mean(),
    }
    return {name: float(value) for name, value in row.items()}


def targets_of(calls: dict) -> tuple[Tensor, Tensor]:
    """What the critic said before the iteration's first step, and its targets, of all response tokens: (n,) each."""
    n_minibatches = one_file.Settings(**SIZES).batch_size // one_file.Settings(**SIZES).minibatch_size
    values = []
    returns = []
    for (_, old_values, minibatch_returns, mask, _), _ in calls["value_loss"][:n_minibatches]:
        values.append(old_values[mask])
        returns.append(minibatch_returns[mask])
    return torch.cat(values), torch.cat(returns)


def ratios_of(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, _: float) -> Tensor:
    """|pi / pi_old - 1| of a minibatch's response tokens: (n,)."""
    ratio = (log_probs - old_log_probs).exp()
    return (ratio - 1).abs()[mask]


def dashboard(module: types.ModuleType, temperature: float, iterations: int = 0) -> list[dict]:
    """A training's rows of numbers: gold, which the file logs, and what was seen from outside."""
    log, iterations_seen = train(module, temperature, iterations)
    return [{"gold": row["gold"], **row_of(calls)} for row, calls in zip(log, iterations_seen)]
