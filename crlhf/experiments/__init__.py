"""Evidence: one question a function, several seeds, one figure and one CSV each.

    python -m crlhf experiment NAME      (or all)

Every function states its prediction before its result: what theory says should come out, and how large. What came
out stands in figures/README.md. `harness.py` runs the variants; each other file asks one question or two.
"""

import time
from pathlib import Path

from ..config import UserError
from .choices import samples, sampling, scale
from .critics import critic, online
from .difficulty import difficulty
from .hacking import adversary, overoptimisation
from .improvement import compare, frontier
from .limits import limits
from .noise import noise
from .sweep import sweep
from .theorem import theorem
from .variance import variance

EXPERIMENTS = {function.__name__: function for function in (
    sweep, variance, difficulty, theorem, compare, noise, critic, samples, online, sampling, frontier, adversary, scale,
    overoptimisation, limits)}


def main(name, root="runs/experiments", figures="figures"):
    """Run one experiment, or all; print its table and keep it beside the figure."""
    from ..runs import write_atomic

    if name not in (*EXPERIMENTS, "all"):
        raise UserError(f"there is no experiment '{name}': choose from all, {', '.join(EXPERIMENTS)}")
    for each in EXPERIMENTS if name == "all" else [name]:
        started = time.monotonic()
        text = EXPERIMENTS[each](Path(root), Path(figures))
        write_atomic(Path(figures) / f"{each}.md", text + "\n")
        print(f"\n{each} ({(time.monotonic() - started) / 60:.1f} minutes)\n\n{text}", flush=True)
