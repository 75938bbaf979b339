"""Whose turn is it? Rows of each training step, prompts of each PPO iteration, in an order that a seed fixes."""

from functools import lru_cache

from ..config import PPOConfig
from .files import shuffled


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, name: str, epoch: int) -> list[int]:
    return shuffled(n, seed, name, epoch)


def rows_of_step(n: int, batch_size: int, step: int, seed: int, name: str) -> list[int]:
    """Row numbers of one step's batch: every epoch goes through all n rows in an order of its own.

    The last rows that don't fill a batch wait for a later epoch. If n < batch_size the batch is all rows.
    """
    batch_size = min(batch_size, n)
    steps_an_epoch = n // batch_size
    epoch, step_of_epoch = divmod(step, steps_an_epoch)
    first = step_of_epoch * batch_size
    return epoch_order(n, seed, name, epoch)[first : first + batch_size]


def prompts_of_iteration(n_prompts: int, config: PPOConfig, iteration: int, seed: int) -> list[int]:
    """Numbers of one iteration's prompts, group_size times each: every prompt's turn comes before any comes again."""
    prompts_at_once = config.batch_size // config.group_size
    rows = rows_of_step(n_prompts, prompts_at_once, iteration, seed, "ppo prompts")
    return [row for row in rows for _ in range(config.group_size)]


def prompt_order(n_prompts: int, config: PPOConfig, iterations: range, seed: int) -> list[int]:
    """All prompts that some iterations meet, each once, in order of first meeting."""
    order = []
    for iteration in iterations:
        order += prompts_of_iteration(n_prompts, config, iteration, seed)
    return list(dict.fromkeys(order))
