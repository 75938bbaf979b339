"""The loop that SFT, reward model and DPO share, and the parts of it that PPO uses, too.

Every stage trains with AdamW (no weight decay), a linear learning-rate schedule and a bound on the gradient's norm.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import UserError
from .checkpoint import Checkpoint, Job, as_numbers
from .order import rows_of_step

MAX_GRAD_NORM = 1.0  # gradients longer than this are shortened to it


def fit(
    model: torch.nn.Module,
    rows: list[dict],
    loss_of: Callable,
    config: object,
    job: Job,
    warmup: float,
    head_lr: float | None = None,
) -> list[dict]:
    """Train `model` in place on rows, config.batch_size a step, for config.epochs. Returns every step's metrics.

    loss_of: some rows of a step -> dict of scalars that are summed over them: 'loss', 'count' (what it is divided by in
    the end, tokens or pairs), and further metrics.
    warmup: share of the steps over which the learning rate rises to config.lr. head_lr: peak for the head `score`.
    """
    head = None if head_lr is None else model.score
    optimizer = adamw(model, head)
    checkpoint = Checkpoint(job, model=model, optimizer=optimizer)
    total = steps_in(len(rows), config.batch_size, config.epochs)
    for step in checkpoint.steps(total):
        numbers = rows_of_step(len(rows), config.batch_size, step, job.seed, job.name)
        batch = [rows[number] for number in numbers]
        batch.sort(key=lambda row: len(str(row)))  # micro-batches of rows that are alike in length hold less padding
        sums = accumulate_gradients(batch, loss_of, job.micro_batch_size)
        count = sums.pop("count")
        divide_gradients(model, count)
        lr = learning_rate(step, total, config.lr, warmup)
        lr_of_head = None if head_lr is None else learning_rate(step, total, head_lr, warmup)
        grad_norm = gradient_step(optimizer, lr, lr_of_head)
        means = {name: value / count for name, value in sums.items()}
        row = as_numbers({"step": step, **means, "grad_norm": grad_norm, "lr": lr})
        require_finite(row["loss"] + row["grad_norm"], job.name, step, f"--{job.name}-lr", config.lr)
        checkpoint.log(row, "loss")
    return checkpoint.rows


# ------------------------------------------------------------------------------------- the parts of a step


def accumulate_gradients(batch: list[dict], loss_of: Callable, micro_batch_size: int) -> dict[str, Tensor]:
    """Backward passes through a batch, micro_batch_size rows at a time (0: all). Returns the sums of all scalars.

    Since losses are sums over rows, the gradients add up to that of the whole batch.
    """
    size = micro_batch_size or len(batch)
    sums = {}
    for first in range(0, len(batch), size):
        scalars = loss_of(batch[first : first + size])
        scalars["loss"].backward()
        for name, scalar in scalars.items():
            sums[name] = sums.get(name, 0.0) + scalar.detach().float()
    return sums


def divide_gradients(model: torch.nn.Module, count: Tensor) -> None:
    """From the gradient of a sum to that of a mean."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= count


def steps_in(n: int, batch_size: int, epochs: float) -> int:
    """Number of gradient steps in `epochs` passes over n rows."""
    return round(epochs * (n // min(batch_size, n))) if n else 0


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.0) -> float:
    """Linear rise over `warmup * total` steps, then a linear fall that would reach 0 at step `total`."""
    rise = warmup * total
    risen = (step + 1) / rise if rise else 1.0
    left = (total - step) / max(total - rise, 1)
    return peak * min(risen, left, 1.0)


def adamw(model: torch.nn.Module, head: torch.nn.Module | None = None) -> torch.optim.AdamW:
    """AdamW as in PPO for language models: eps 1e-5, no weight decay. `gradient_step` sets the learning rates.

    head: a part of the model that learns at a rate of its own, as a second group of parameters.
    """
    in_head = set() if head is None else set(head.parameters())
    groups = [{"params": [parameter for parameter in model.parameters() if parameter not in in_head]}]
    if head is not None:
        groups.append({"params": list(in_head)})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, eps=1e-5, weight_decay=0.0, fused=fused)


def gradient_step(optimizer: torch.optim.Optimizer, lr: float, head_lr: float | None = None) -> Tensor:
    """Bound the gradient's norm, step, clear the gradients. Returns the norm before it was bounded, a scalar.

    One that isn't finite spoils the weights: the caller finds it in the statistics, stops, and says so.
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    groups[0]["lr"] = lr
    if head_lr is not None:
        groups[1]["lr"] = head_lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def require_finite(value: float, stage: str, step: int, option: str, setting: float) -> None:
    """Stop with one clear line when a loss or a gradient norm is nan or infinite."""
    if not math.isfinite(value):
        raise UserError(
            f"{stage}: the loss or its gradient is {value} at step {step}",
            f"lower {option} (now {setting:g}) and run again",
        )


class PhaseClock:
    """Seconds of the three phases of a PPO iteration: rollout, scoring, update."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readings = []
        self.read()

    def read(self) -> None:
        """A phase ends here. A GPU gets its work queued: what it hasn't done yet belongs to this phase, too."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.readings.append(time.perf_counter())

    def seconds(self, n_samples: int) -> dict[str, float]:
        """Seconds of each phase, and samples a second of all three."""
        start, sampled, scored, updated = self.readings
        return {
            "seconds_rollout": sampled - start,
            "seconds_scoring": scored - sampled,
            "seconds_update": updated - scored,
            "samples_per_second": n_samples / (updated - start),
        }
