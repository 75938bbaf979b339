"""What a training function is told (`Job`), and the state from which it goes on after a stop (`Checkpoint`).

While a stage trains, its state is saved now and then; the same command goes on from there and ends, on a CPU, with the
same bits as a run that was never stopped.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import DataConfig, RunConfig, UserError
from .files import Progress, append_jsonl, write_jsonl

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
