"""What makes a run reproducible and safe to kill: random streams, atomic files, stages.

A run is a folder. Each stage builds its artefacts in `STAGE.part/` and renames the folder to `STAGE/` when
it is done, so a stage is there whole or not at all. Randomness has no state to save: step i of stage s
draws from a generator seeded by (seed, s, i), so an interrupted run and an uninterrupted one see the same
numbers.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .config import UserError
from .distributed import barrier, is_writer

# ------------------------------------------------------------------------------------ randomness, devices


def stream(seed, *names, device="cpu"):
    """A torch.Generator of its own for this (seed, names): the same names give the same numbers."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def shuffled(n, seed, *names):
    """A permutation of range(n) as a list, from a stream of its own."""
    return torch.randperm(n, generator=stream(seed, *names)).tolist()


def pick_device(name):
    """'auto' takes CUDA, then Apple's MPS, then the CPU. A device that isn't there is the user's mistake."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if there[device])
    if not there[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has no {name}; use --device cpu")
    return torch.device(name)


def autocast(device):
    """bf16 matrix products on CUDA over fp32 weights; plain fp32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()


# -------------------------------------------------------------------------------------------------- files


def write_atomic(path, text):
    """Write a text file whole or not at all: to a temporary name, flushed to disk, then renamed."""
    if not is_writer():
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path, rows):
    """Add rows to the end of a file. A kill may leave the last line unfinished: whoever reads it must expect that."""
    if is_writer():
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path):
    """Rows of a file that a stage wrote. If someone took it away, its stage has to be done again."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): delete the folder {Path(path).parent} and run the command "
                        "again") from None


# --------------------------------------------------------------------------------------- tensors on disk


def save_state(path, state):
    """Save nested dicts and lists of tensors and plain values as one safetensors file, atomically.

    Tensors are stored under their path in the nest; everything else goes as JSON into the file's header.
    """
    tensors = {}

    def strip(value, key):
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().contiguous().clone()  # clones: safetensors refuses shared memory
            return {"tensor": key}
        if isinstance(value, dict):
            return {"dict": [[name, strip(item, f"{key}/{name}")] for name, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [strip(item, f"{key}/{i}") for i, item in enumerate(value)]}
        return {"value": value}

    skeleton = json.dumps(strip(state, "state"))
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    save_file(tensors, temporary, metadata={"skeleton": skeleton})
    os.replace(temporary, path)


def load_state(path, device="cpu"):
    """Read back what `save_state` wrote."""
    with safe_open(path, "pt", device=str(device)) as file:
        def fill(node):
            (kind, content), = node.items()
            if kind == "tensor":
                return file.get_tensor(content)
            if kind == "dict":
                return {name: fill(item) for name, item in content}
            return [fill(item) for item in content] if kind == "list" else content

        return fill(json.loads(file.metadata()["skeleton"]))


# ------------------------------------------------------------------------------------------ progress bars


show_progress = True


def hide_progress():
    """From now on, no bars in this process: several processes' bars would overwrite each other."""
    global show_progress
    show_progress = False


def progress(total, title, start=0):
    """A progress bar with rate and time left; silent where the output is no terminal."""
    silent = None if show_progress and is_writer() else True  # None: silent where the output is no terminal
    return tqdm(total=total, initial=start, desc=f"  {title}", disable=silent, leave=False, dynamic_ncols=True)


def batches(rows, size, title):
    """Slices of `size` rows, with a progress bar that counts rows."""
    with progress(len(rows), title) as bar:
        for first in range(0, len(rows), size):
            yield rows[first:first + size]
            bar.update(min(size, len(rows) - first))


# ----------------------------------------------------------------------------------------- the run folder


def fingerprint(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Run:
    """A folder of finished stages. `stage` builds one, or reuses it when its inputs are unchanged."""

    def __init__(self, folder, say=print):
        self.folder, self.say = Path(folder), say
        self.prints = {}  # stage -> fingerprint of everything that went into it

    def path(self, stage):
        return self.folder / stage

    def plan(self, name, settings, needs):
        """The fingerprint of a stage: of its own settings and of all it builds on."""
        self.prints[name] = fingerprint([name, settings, [self.prints[stage] for stage in needs]])
        return self.prints[name]

    def stage(self, name, settings, needs, build):
        """Make sure stage `name` is done, and return its folder.

        settings: dict of values the result depends on. needs: names of the stages it builds on.
        build: called with the folder to fill, which may hold a checkpoint of the same settings.
        """
        self.plan(name, settings, needs)
        final, part = self.path(name), self.folder / f"{name}.part"
        if stage_print(final) == self.prints[name]:
            self.say(f"{name}: done before, reused")
            return final
        barrier()  # nobody changes the folder before all have looked at it
        if is_writer():
            self.prepare(name, part, settings)
        barrier()
        started = time.monotonic()
        summary = build(part)
        barrier()
        if is_writer():
            (part / "checkpoint.safetensors").unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
        barrier()
        self.say(f"{name}: {summary} ({time.monotonic() - started:.0f} s)")
        return final

    def prepare(self, name, part, settings):
        """An empty folder for the stage, or the one it was stopped in, if that had the same settings."""
        if stage_print(part) != self.prints[name]:
            shutil.rmtree(part, ignore_errors=True)
        elif (part / "checkpoint.safetensors").exists():
            self.say(f"{name}: going on from a checkpoint")
        part.mkdir(parents=True, exist_ok=True)
        write_json(part / "stage.json", {"fingerprint": self.prints[name], "settings": settings})


def stage_print(folder):
    """The fingerprint a stage folder was built with, or None."""
    try:
        return json.loads((folder / "stage.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
