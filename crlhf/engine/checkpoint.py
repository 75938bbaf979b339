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


@dataclass
class Job:
    """What a training function is told besides its models, its data and its config."""

    name: str  # of the stage: sft, reward, ppo, ...
    folder: Path | None = None  # receives metrics and checkpoints; None: nothing is written
    seed: int = RunConfig.seed
    max_response_tokens: int = DataConfig.max_response_tokens
    checkpoint_seconds: float = RunConfig.checkpoint_seconds
    sampling_batch_size: int = RunConfig.sampling_batch_size  # responses sampled or scored at once
    micro_batch_size: int = RunConfig.micro_batch_size  # rows of one forward and backward pass (0: of a whole step)


class Checkpoint:
    """The resumable state of one training loop, in checkpoint.pt; the rows that it logs, in metrics.jsonl.

    `parts` maps names to whatever has state_dict and load_state_dict: models, optimisers, running moments. The file
    is read back without unpickling anything but tensors and plain values. It stays after the last step: what a stage
    does then may fail, and must not cost the training. Whoever finishes the stage deletes it.
    """

    def __init__(self, job: Job, **parts: object) -> None:
        self.job = job
        self.parts = parts
        self.rows = []
        self.bar = None
        self.saved_at = 0.0  # seconds on the monotonic clock
        self.saving_took = 0.0
        if job.folder is not None:
            self.file = Path(job.folder) / "checkpoint.pt"
            self.metrics = Path(job.folder) / "metrics.jsonl"

    def steps(self, total: int) -> Iterator[int]:
        """Yield the step numbers still to do, with a progress bar, saving the state between steps."""
        start = 0
        if self.job.folder is not None:
            start = self.resume()
            write_jsonl(self.metrics, self.rows)  # without what was logged after the last checkpoint
        self.saved_at = time.monotonic()
        with Progress(total, self.job.name, start) as self.bar:
            for step in range(start, total):
                yield step
                self.bar.update()
                if self.job.folder is not None:
                    self.keep(step + 1, is_last=step + 1 == total)

    def keep(self, step: int, is_last: bool) -> None:
        """Save the state if it is time."""
        now = time.monotonic()
        wait = 0.0
        if self.job.checkpoint_seconds:
            wait = max(self.job.checkpoint_seconds, SAVING_SHARE * self.saving_took)
        if is_last or now - self.saved_at >= wait:
            self.save(step)
            self.saved_at = time.monotonic()
            self.saving_took = self.saved_at - now

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
            raise UserError(what, "delete it to start this stage again") from None

    def save(self, step: int) -> None:
        """Write the state of after `step` steps. torch copies tensors to the host one by one: no clones on a GPU."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["n_rows"] = len(self.rows)
        state["step"] = step
        temporary = self.file.with_name("checkpoint.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
            os.replace(temporary, self.file)
        except RuntimeError as error:  # torch's, for any trouble of the disk
            raise error.__context__ or error from None
        finally:
            temporary.unlink(missing_ok=True)

    def log(self, row: dict, *shown: str) -> None:
        """Keep a row of metrics, in the file too: whoever watches needn't wait for a checkpoint.

        Those named in `shown` appear beside the progress bar.
        """
        row = as_numbers(row)
        self.rows.append(row)
        if self.job.folder is not None:
            append_jsonl(self.metrics, [row])
        beside_the_bar = {name: f"{row[name]:.3g}" for name in shown if name in row}
        self.bar.set_postfix(beside_the_bar, refresh=False)


def as_numbers(row: dict) -> dict:
    """The row with numbers in place of its scalar tensors, which come from each device in one transfer."""
    names_by_device = {}
    for name, value in row.items():
        if isinstance(value, torch.Tensor):
            names_by_device.setdefault(value.device, []).append(name)
    row = dict(row)
    for names in names_by_device.values():
        values = torch.stack([row[name].float() for name in names]).tolist()
        row.update(zip(names, values))
    return row
