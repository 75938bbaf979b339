"""What makes a run reproducible and safe to kill: random streams, files that are written whole, progress bars.

Randomness has no state to save: step i of stage s draws from a generator seeded by (seed, s, i), so an interrupted
run and an uninterrupted one see the same numbers.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import UserError

# ---------------------------------------------------------------------------------------------- randomness


def stream(seed: int | str, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for this (seed, names): the same names give the same numbers."""
    name = "/".join(map(str, (seed, *names)))
    digest = hashlib.sha256(name.encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator(device).manual_seed(number)


def shuffled(n: int, seed: int | str, *names: object) -> list[int]:
    """A permutation of range(n), from a stream of its own."""
    return torch.randperm(n, generator=stream(seed, *names)).tolist()


# --------------------------------------------------------------------------------------------------- files


def write_atomic(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: to a temporary name, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: str | Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def json_lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_atomic(path, json_lines(rows))


def append_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Add rows to a file. A kill may leave the last line unfinished: whoever reads it must expect that."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def read_json(path: str | Path) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def json_object(path: str | Path) -> dict:
    """The object in a JSON file; {} where there is no such file, or something else in it."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_jsonl(path: str | Path) -> list[dict]:
    """Rows of a file that a stage wrote. If someone took it away, its stage has to be done again."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (FileNotFoundError, json.JSONDecodeError) as error:
        mend = f"delete the folder {Path(path).parent} and run the command again"
        raise UserError(f"{path} is missing or damaged ({error})", mend) from None


def whole_batches(partial: Path, group: int, prompts: list[str]) -> list[dict]:
    """Rows {prompt, ...} of an interrupted sampling, up to the last whole batch; cuts the file there."""
    rows = []
    try:
        for line, prompt in zip(partial.read_bytes().split(b"\n"), prompts):  # bytes: a kill may cut a letter in two
            row = json.loads(line)
            if row["prompt"] != prompt:
                break
            rows.append(row)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass  # what comes after a line that is not ours is sampled again
    rows = rows[: len(rows) // group * group]
    write_jsonl(partial, rows)
    return rows


def first_line(error: Exception) -> str:
    """What a library's error says, fit for one line of ours."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line[:200].rstrip(". ")


# ------------------------------------------------------------------------------------------- progress bars


class Progress(tqdm):
    """A bar with rate and time left. Where the output is no terminal it is a line every minute instead."""

    hidden = False  # True in worker processes

    def __init__(self, total: int, title: str, start: int = 0) -> None:
        self.moves = sys.stderr.isatty()
        pace = {"mininterval": 60, "delay": 60, "miniters": 1, "ncols": 100}
        if self.moves:
            pace = {"dynamic_ncols": True}
        super().__init__(total=total, initial=start, desc=f"  {title}", disable=self.hidden, leave=False, **pace)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        """tqdm's own way to the screen; `msg` is empty when the bar has to vanish, which a line in a file can't."""
        if self.moves:
            return super().display(msg, pos)
        if msg != "":
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return None


def slices(rows: list, size: int, title: str, start: int = 0) -> Iterator[tuple[int, list]]:
    """(number of its first row, rows) of every piece of `size` rows, with a bar that counts rows."""
    with Progress(len(rows), title, start) as bar:
        for first in range(start, len(rows), size):
            yield first, rows[first : first + size]
            bar.update(min(size, len(rows) - first))
