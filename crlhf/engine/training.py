"""The loop that SFT, reward model and DPO share, and the parts of it that PPO uses, too.

Every stage trains with AdamW (no weight decay), a linear learning-rate schedule and a bound on the gradient's norm.
"""

import math
from collections.abc import Callable

import torch

from ..config import UserError
from .checkpoint import Checkpoint, Job
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
    the end, tokens or pairs), and further metrics. Summed, the pieces of a step give the gradient of the whole.
    warmup: share of the steps over which the learning rate rises to config.lr. head_lr: peak for the head `score`.
    """
    optimizer = adamw(model) if head_lr is None else adamw(model, model.score, head_lr / max(config.lr, 1e-12))
    checkpoint = Checkpoint(job, model=model, optimizer=optimizer)
    total = steps_in(len(rows), config.batch_size, config.epochs)
    for step in checkpoint.steps(total):
        batch = [rows[i] for i in rows_of_step(len(rows), config.batch_size, step, job.seed, job.name)]
        size, sums = job.micro_batch_size or len(batch), []
        batch.sort(key=lambda row: len(str(row)))  # pieces of rows that are alike in length hold less padding
        for first in range(0, len(batch), size):
            scalars = loss_of(batch[first : first + size])
            scalars["loss"].backward()
            sums.append(torch.stack([scalar.detach().float() for scalar in scalars.values()]))
        sums = dict(zip(scalars, torch.stack(sums).sum(0)))
        count, lr = sums.pop("count"), learning_rate(step, total, config.lr, warmup)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        sums["grad_norm"] = gradient_step(optimizer, lr) * count
        means = torch.stack([*sums.values()]) / count
        row = dict(zip(sums, means.tolist()))  # a GPU has to wait for this, so it is done once
        require_finite(row["loss"] + row["grad_norm"], job.name, step, f"--{job.name}-lr", config.lr)
        checkpoint.log({"step": step, **row, "lr": lr}, "loss")
    return checkpoint.rows


# ------------------------------------------------------------------------------------- the parts of a step


def steps_in(n: int, batch_size: int, epochs: float) -> int:
    """Number of gradient steps in `epochs` passes over n rows."""
    return round(epochs * (n // min(batch_size, n))) if n else 0


def learning_rate(step: int, total: int, peak: float, warmup: float = 0.0) -> float:
    """Linear rise over `warmup * total` steps, then a linear fall that would reach 0 at step `total`."""
    rise = warmup * total
    return peak * min((step + 1) / rise if rise else 1.0, (total - step) / max(total - rise, 1), 1.0)


def adamw(model: torch.nn.Module, head: torch.nn.Module | None = None, times: float = 1.0) -> torch.optim.AdamW:
    """AdamW as in PPO for language models: eps 1e-5, no weight decay. The step sets the learning rate.

    times: how many times as fast a new head learns as the rest.
    """
    new = set() if head is None else set(head.parameters())
    groups = [{"params": [p for p in model.parameters() if p not in new], "times": 1.0}]
    groups += [{"params": list(new), "times": times}] if new else []
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, eps=1e-5, weight_decay=0.0, fused=fused)


def gradient_step(optimizer: torch.optim.Optimizer, lr: float) -> torch.Tensor:
    """Bound the gradient's norm, step, clear the gradients. Returns the norm before it was bounded, a scalar.

    One that isn't finite spoils the weights: the caller finds it in the statistics, stops, and says so.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def require_finite(value: float, stage: str, step: int, option: str, setting: float) -> None:
    """Stop with one clear line when a loss or a gradient norm is nan or infinite."""
    if not math.isfinite(value):
        mend = f"lower {option} (now {setting:g}) and run again"
        raise UserError(f"{stage}: the loss or its gradient is {value} at step {step}: {mend}")


def phase_seconds(clock: list[float], n_samples: int) -> dict[str, float]:
    """Seconds of each phase, and samples a second, from four readings of the clock."""
    names = ("seconds_rollout", "seconds_scoring", "seconds_update")
    seconds = {name: end - start for name, start, end in zip(names, clock, clock[1:])}
    return {**seconds, "samples_per_second": n_samples / (clock[-1] - clock[0])}
