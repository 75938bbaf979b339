"""The loop that SFT, reward model and DPO share, and the parts of it that PPO uses, too.

Every stage trains with AdamW (no weight decay), a linear learning-rate schedule and a bound on the gradient's
norm. While it trains, its state is saved now and then; the same command goes on from there and ends, on a
CPU, with the same bits as a run that was never stopped.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from ..config import DataConfig, PPOConfig, RunConfig, UserError
from .files import Progress, append_jsonl, shuffled, write_jsonl

MAX_GRAD_NORM = 1.0  # gradients longer than this are shortened to it
SAVING_SHARE = 20  # saving takes at most one part in so many of the time
METRICS_SECONDS = 5  # after so many, metrics.jsonl gets the rows that are new


@dataclass
class Job:
    """What a training function is told besides its models, its data and its config."""

    name: str  # of the stage: sft, reward, ppo, ...
    folder: Path  # receives what it writes: metrics, and checkpoints while it goes on
    seed: int = RunConfig.seed
    max_response_tokens: int = DataConfig.max_response_tokens
    checkpoint_seconds: float = RunConfig.checkpoint_seconds
    sampling_batch_size: int = RunConfig.sampling_batch_size  # responses sampled or scored at once
    micro_batch_size: int = RunConfig.micro_batch_size  # rows of one forward and backward pass (0: of a whole step)


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


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, name: str, epoch: int) -> list[int]:
    return shuffled(n, seed, name, epoch)


def rows_of_step(n: int, batch_size: int, step: int, seed: int, name: str) -> list[int]:
    """Row numbers of one step's batch: every epoch goes through all n rows in an order of its own.

    The last rows that don't fill a batch wait for a later epoch. If n < batch_size the batch is all rows.
    """
    batch_size = min(batch_size, n)
    epoch, place = divmod(step, n // batch_size)
    return epoch_order(n, seed, name, epoch)[place * batch_size : (place + 1) * batch_size]


def prompts_of_iteration(n_prompts: int, config: PPOConfig, iteration: int, seed: int) -> list[int]:
    """Numbers of one iteration's prompts, group_size times each: every prompt's turn comes before any comes again."""
    rows = rows_of_step(n_prompts, config.batch_size // config.group_size, iteration, seed, "ppo prompts")
    return [row for row in rows for _ in range(config.group_size)]


def prompt_order(n_prompts: int, config: PPOConfig, iterations: range, seed: int) -> list[int]:
    """All prompts that some iterations meet, each once, in order of first meeting."""
    return list(dict.fromkeys(row for i in iterations for row in prompts_of_iteration(n_prompts, config, i, seed)))


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


# --------------------------------------------------------------------------------------------- checkpoints


class Checkpoint:
    """The resumable state of one training loop, in checkpoint.pt; the rows that it logs, in metrics.jsonl.

    `parts` maps names to whatever has state_dict and load_state_dict: models, optimisers, running moments. The file
    is read back without unpickling anything but tensors and plain values.
    """

    def __init__(self, job: Job, **parts: object) -> None:
        self.job, self.parts, self.rows, self.n_written = job, parts, [], 0
        self.file, self.metrics = Path(job.folder) / "checkpoint.pt", Path(job.folder) / "metrics.jsonl"

    def steps(self, total: int) -> Iterator[int]:
        """Yield the step numbers still to do, with a progress bar, saving the state between steps."""
        start = self.resume()
        write_jsonl(self.metrics, self.rows)  # without what was logged after the last checkpoint
        self.n_written = len(self.rows)
        last_save, cost, last_metrics = time.monotonic(), 0.0, time.monotonic()
        with Progress(total, self.job.name, start) as self.bar:
            for step in range(start, total):
                yield step
                self.bar.update()
                wait = max(self.job.checkpoint_seconds, SAVING_SHARE * cost) if self.job.checkpoint_seconds else 0.0
                if time.monotonic() - last_save >= wait:
                    started = time.monotonic()
                    self.save(step + 1)
                    last_save = last_metrics = time.monotonic()
                    cost = last_save - started
                elif time.monotonic() - last_metrics > METRICS_SECONDS:  # whoever watches needn't wait for a checkpoint
                    self.write_metrics()
                    last_metrics = time.monotonic()
        self.write_metrics()
        self.file.unlink(missing_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and return the step to go on from."""
        if not self.file.exists():
            return 0
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            lines = self.metrics.read_bytes().split(b"\n")
            self.rows = [json.loads(line) for line in lines[: state["n_rows"]]]
            return state["step"]
        except Exception:  # a damaged file makes torch raise many kinds
            what = f"{self.file} can't be read, or is none of this stage's checkpoints"
            raise UserError(f"{what}: delete it to start this stage again") from None

    def save(self, step: int) -> None:
        """Write the state of after `step` steps. torch copies tensors to the host one by one: no clones on a GPU."""
        self.write_metrics()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.file.with_name("checkpoint.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save({**state, "n_rows": len(self.rows), "step": step}, file)
            os.replace(temporary, self.file)
        except RuntimeError as error:  # torch's, for any trouble of the disk
            raise error.__context__ or error from None
        finally:
            temporary.unlink(missing_ok=True)

    def write_metrics(self) -> None:
        append_jsonl(self.metrics, self.rows[self.n_written :])
        self.n_written = len(self.rows)

    def log(self, row: dict, *shown: str) -> None:
        """Keep a row of metrics; those named in `shown` appear beside the progress bar."""
        row = read(row)
        self.rows.append(row)
        self.bar.set_postfix({name: f"{row[name]:.3g}" for name in shown if name in row}, refresh=False)


def read(row: dict) -> dict:
    """The row with numbers in place of its scalar tensors, which come from each device in one transfer."""
    tensors = {name: value for name, value in row.items() if isinstance(value, torch.Tensor)}
    for device in {tensor.device for tensor in tensors.values()}:
        its = {name: tensor.float() for name, tensor in tensors.items() if tensor.device == device}
        row = row | dict(zip(its, torch.stack([*its.values()]).tolist()))
    return row
