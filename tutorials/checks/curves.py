"""A learner's curve on the one of one_file.py."""

import math
import os
import types
from pathlib import Path

import matplotlib.pyplot as plt

from crlhf.config import UserError
from tutorials import one_file
from tutorials.checks.learner import in_words, place_of
from tutorials.checks.recorder import WATCHED, shared_start, silent, train
from tutorials.start import show

CLOSE = 0.1  # mean gap in gold of two curves that differ by a few tokens only
TEMPERATURES = {"build": 1.0, "broken": 0.8}
PANELS = ("gold", "kl", "used")


def known_curve(temperature: float, iterations: int = 0) -> tuple[list[dict], list[dict]]:
    """What one_file.py logs with the settings of the checks, and what was recorded: see `recorder.train`."""
    with silent(one_file):
        return train(one_file, temperature, iterations)


def trained(module: types.ModuleType, temperature: float, iterations: int = 0) -> tuple[list[dict], list[dict]]:
    """The learner's log, with the numbers that are needed, and what was recorded: see `recorder.train`."""
    path = Path(module.__file__)
    shared_start()  # before the learner's code, whose mistakes are caught
    try:
        log, recorded = train(module, temperature, iterations)
        numbers = [row[name] for row in log for name in PANELS]
    except Exception as error:
        raise UserError(f"{place_of(error, path)}: {in_words(error)}", "mend that line") from None
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{path.name}: train_ppo logs a number that isn't finite", "compare it with one_file.py")
    for calls in recorded:
        for name in WATCHED:
            n_calls = len(calls[name])
            if n_calls == 0 or (n_calls == 1) == name.endswith("_loss"):
                what = f"{path.name}: {name} is called {n_calls} times in an iteration of train_ppo"
                raise UserError(what, "call it as often as tutorials/one_file.py does")
    return log, recorded


def compare_curves(module: types.ModuleType, iterations: int, name: str) -> int:
    """Train the learner's loop and one_file.py's, draw both, and say whether they agree."""
    log, _ = trained(module, TEMPERATURES[name], iterations)
    known, _ = known_curve(TEMPERATURES[name], iterations)
    draw_curves(log, known, name)
    gaps = [abs(mine["gold"] - right["gold"]) for mine, right in zip(log, known)]
    gold = f"gold {log[0]['gold']:+.2f} -> {log[-1]['gold']:+.2f}"
    print(f"{gold}; largest gap to one_file.py's {max(gaps):.3f}", end="")
    if len(log) != len(known):
        print(f": {len(log)} iterations, where one_file.py has {len(known)}")
        return 1
    parted = [i for i, gap in enumerate(gaps) if gap > 1e-5]
    if not parted:
        print(": the curves agree")
        return 0
    if parted[0] >= 5 and sum(gaps) / len(gaps) < CLOSE:
        print(f": the same up to iteration {parted[0] - 1}; then rounding let one token fall otherwise. They agree")
        return 0
    print(f": they part at iteration {parted[0]}. Is anything changed in the part that was given?")
    return 1


def draw_curves(log: list[dict], known: list[dict], name: str) -> None:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(10, 3))
    for axis, key in zip(axes, PANELS):
        axis.plot([row[key] for row in known], label="one_file.py", color="#999999", linewidth=5)
        axis.plot([row[key] for row in log], label="yours", color="#0072B2", linewidth=1.5)
        axis.set(title="variance of rewards, as used" if key == "used" else key, xlabel="iteration")
    axes[0].legend()
    show(figure, name)
    folder = os.environ.get("TUTORIAL_FIGURES", "runs/tutorial_figures")
    print(f"drew {folder}/tutorial_{name}.png: your curve on one_file.py's")
