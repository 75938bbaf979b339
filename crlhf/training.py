"""The training loop's plumbing, shared by SFT, reward model, DPO and PPO: batches, optimiser, checkpoints.

Every stage trains with AdamW (no weight decay), a linear learning-rate schedule and a bound on the gradient's
norm. While it trains, its state is saved now and then; the same command goes on from there and ends, on a
CPU, with the same bits as a run that was never stopped.
"""

import math
import time
from pathlib import Path

import torch
from safetensors import SafetensorError

from .config import UserError
from .distributed import add_gradients, is_writer
from .runs import load_state, progress, save_state, shuffled, write_jsonl


def rows_of_step(n, batch_size, step, seed, name):
    """Row numbers of one step's batch: every epoch goes through all n rows in an order of its own.

    The last rows that don't fill a batch wait for a later epoch. If n < batch_size the batch is all rows.
    """
    batch_size = min(batch_size, n)
    epoch, place = divmod(step, n // batch_size)
    return shuffled(n, seed, name, epoch)[place * batch_size:(place + 1) * batch_size]


def steps_in(n, batch_size, epochs):
    """Number of gradient steps in `epochs` passes over n rows."""
    return round(epochs * (n // min(batch_size, n)))


def learning_rate(step, total, peak, warmup=0.0):
    """Linear rise over `warmup * total` steps, then a linear fall that would reach 0 at step `total`."""
    rise = warmup * total
    return peak * min((step + 1) / rise if rise else 1.0, (total - step) / max(total - rise, 1))


def adamw(model, device):
    """AdamW as in PPO for language models: eps 1e-5, no weight decay. The step sets the learning rate."""
    fused = torch.device(device).type in ("cpu", "cuda")
    return torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-5, weight_decay=0.0, fused=fused)


def gradient_step(optimizer, lr, max_grad_norm):
    """Bound the gradient's norm, step, clear the gradients. Returns the norm before it was bounded.

    A norm that isn't finite leaves the weights as they are; the caller decides what to say.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    add_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def require_finite(value, stage, step, option, setting):
    """Stop with one clear line when a loss or a gradient norm is nan or infinite."""
    if not math.isfinite(value):
        raise UserError(f"{stage}: the loss or its gradient is {value} at step {step}: lower {option} (now {setting:g}) "
                        "and run again")


class Checkpoint:
    """The resumable state of one training loop: tensors in checkpoint.safetensors, rows in metrics.jsonl.

    `parts` maps names to whatever has state_dict and load_state_dict: models, optimisers, running moments.

        checkpoint = Checkpoint(folder, seconds, policy=policy, optimizer=optimizer)
        for step in checkpoint.steps(total, "sft"):
            ...
            checkpoint.log({"loss": ...})
    """

    def __init__(self, folder, seconds=20.0, device="cpu", **parts):
        self.folder, self.seconds, self.device, self.parts = Path(folder), seconds, device, parts
        self.file, self.metrics_file = self.folder / "checkpoint.safetensors", self.folder / "metrics.jsonl"
        self.rows = []

    def resume(self):
        """Load the last checkpoint, if there is one, and return the step to go on from."""
        if not self.file.exists():
            return 0
        try:
            state = load_state(self.file, self.device)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{self.file} can't be read ({error}): delete it to start this stage again") from None
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.rows = state["rows"]
        return state["step"]

    def steps(self, total, title):
        """Yield the step numbers still to do, with a progress bar, saving the state between steps."""
        start = self.resume()
        self.bar = progress(total, title, start)
        last_save = time.monotonic()
        for step in range(start, total):
            yield step
            self.bar.update()
            if is_writer() and time.monotonic() - last_save >= self.seconds:
                self.save(step + 1)
                last_save = time.monotonic()
        self.bar.close()
        write_jsonl(self.metrics_file, self.rows)
        if is_writer():
            self.file.unlink(missing_ok=True)

    def save(self, step):
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_state(self.file, {**state, "rows": self.rows, "step": step})
        write_jsonl(self.metrics_file, self.rows)

    def log(self, row, **shown):
        """Keep a row of metrics; `shown` appears beside the progress bar."""
        self.rows.append({name: as_float(value) for name, value in row.items()})
        self.bar.set_postfix({name: f"{as_float(value):.2f}" for name, value in shown.items()}, refresh=False)


def as_float(value):
    return value.item() if isinstance(value, torch.Tensor) else value
