"""Evidence: one question a function, several seeds, one figure and one CSV each.

    python -m figures NAME      (or all)

Every function states its prediction before its result: what theory says should come out, and how large. What came
out stands in figures/README.md. `harness.py` runs the variants, `tables.py` and `plotting.py` show their results;
each other file asks one question or two.
"""

import time
from pathlib import Path

from crlhf.config import UserError
from crlhf.engine.files import write_atomic

from .choices import samples, scale
from .comparison import compare, uncentred
from .critics import critic
from .difficulty import difficulty
from .dose import dose
from .hacking import adversary, overoptimisation
from .judged import judged
from .judges import judges
from .labels import labels
from .natural import natural
from .pairing import pairing
from .real import real
from .real_seeds import real_seeds
from .rule import rule
from .sweep import sweep
from .theorem import theorem
from .variance import variance

QUESTIONS = (natural, sweep, dose, critic, compare, uncentred, samples, labels, judged, rule)
QUESTIONS += (variance, difficulty, theorem, adversary, scale, overoptimisation, judges)
READERS = (real, real_seeds, pairing)  # of runs that take hours and a pretrained model: no part of `all`
EXPERIMENTS = {function.__name__: function for function in (*QUESTIONS, *READERS)}


def main(name: str, root: str = "runs/experiments", figures: str = "figures") -> None:
    """Run one experiment, or all; print its table and keep it beside the figure."""
    if name not in (*EXPERIMENTS, "all"):
        raise UserError(f"there is no experiment '{name}': choose from all, {', '.join(EXPERIMENTS)}")
    names = [question.__name__ for question in QUESTIONS] if name == "all" else [name]
    for each in names:
        started = time.monotonic()
        text = EXPERIMENTS[each](Path(root), Path(figures))
        write_atomic(Path(figures) / f"{each}.md", text + "\n")
        print(f"\n{each} ({(time.monotonic() - started) / 60:.1f} minutes)\n\n{text}", flush=True)
