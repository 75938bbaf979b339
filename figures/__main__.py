"""The evidence's command line: `python -m figures NAME`, or all."""

import difflib
import sys
import time
from pathlib import Path

from crlhf.__main__ import main
from crlhf.config import UserError

from . import QUESTIONS, READERS, load

NAMES = QUESTIONS | READERS


def run(arguments: list[str]) -> None:
    """Do what the command line asks for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return
    name, *others = arguments
    if others:
        raise UserError("give one name, or all", "python -m figures lists them")
    if name not in (*NAMES, "all"):
        nearest = "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, [*NAMES, "all"], 1))
        raise UserError(f"there is no experiment '{name}'", f"{nearest}python -m figures lists all")
    for each in QUESTIONS if name == "all" else [name]:
        ask(each)


def listing() -> str:
    """The names, a line each."""
    lines = ["python -m figures NAME makes NAME.csv, NAME.md and mostly NAME.png; a run that was stopped goes on."]
    for name, (_, about) in NAMES.items():
        lines.append(f"  {name:18}{about}")
    lines.append(f"  {'all':18}all but {' and '.join(READERS)}: about four hours")
    return "\n".join(lines)


def ask(name: str, root: Path = Path("runs/experiments"), figures: Path = Path("figures")) -> None:
    """Answer one question; print its table and keep it beside the figure."""
    from crlhf.engine.files import write_atomic  # torch takes seconds to import, and a list of names should not

    from .harness import Study

    started = time.monotonic()
    seeds, _ = NAMES[name]
    text = load(name)(Study(name, seeds, root, figures))
    write_atomic(figures / f"{name}.md", text + "\n")
    minutes = (time.monotonic() - started) / 60
    print(f"\n{name} ({minutes:.1f} minutes)\n\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(command=run))
