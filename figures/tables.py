"""Rows of results: choosing them, means over seeds, and tables.

A row is a dict. Most hold a setting, a method, a seed and what was measured; others a place (columns that say what of),
a seed and one value. A pair (mean, half) is a mean over seeds and the half-width of its 95% interval.
"""

import csv
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from crlhf.config import UserError
from crlhf.evaluate import mean_interval, t_probability
from crlhf.pipeline.tables import markdown_table

Rows = list[dict]
Pair = tuple[float, float]  # (mean, half)

# The two endpoints of every comparison. nan: a method that logs no course.
ENDPOINTS = {"mean_gold": "Gold over all iterations", "gold": "Held-out gold at the end"}

# ------------------------------------------------------------------------------------------ choosing rows


def read_results(figures: Path, name: str) -> Rows:
    """Rows of figures/NAME.csv, numbers as numbers. Reports are made from these: what they print is in the CSV."""
    rows = []
    for row in read_csv(figures / f"{name}.csv"):
        rows.append({key: as_number(text) for key, text in row.items()})
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV that an experiment wrote; all values are text."""
    if not path.exists():
        name, *_ = path.stem.split("_")
        raise UserError(f"{path} is missing", f"run 'python -m figures {name}' first")
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def select(rows: Rows, **wanted: object) -> Rows:
    """The rows whose columns hold these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows: Rows, name: str) -> list:
    """The different values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def settings_of(rows: Rows) -> list[str]:
    return distinct(rows, "setting")


def methods_of(rows: Rows, setting: str) -> list[str]:
    return distinct(select(rows, setting=setting), "method")


def labels_of(rows: Rows) -> list[tuple[str, str]]:
    """All (setting, method): settings in order of appearance, and in each its methods."""
    return [(setting, method) for setting in settings_of(rows) for method in methods_of(rows, setting)]


# -------------------------------------------------------------------------------------- means over seeds


def over_seeds(rows: Rows, key: str, **wanted: object) -> Pair:
    """(mean, half) of a column, in the rows whose other columns hold these values."""
    return mean_interval([row[key] for row in select(rows, **wanted)])


def values(rows: Rows, setting: str, method: str, key: str = "gold") -> list[float]:
    """Values of one variant, in the order of their seeds."""
    chosen = select(rows, setting=setting, method=method)
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]


def interval(rows: Rows, setting: str, method: str, key: str = "gold") -> Pair:
    """(mean, half) of one variant."""
    return mean_interval(values(rows, setting, method, key))


def differences(
    rows: Rows, setting: str, method: str, reference: str = "ppo", key: str = "gold", reference_setting: str = ""
) -> list[float]:
    """A variant minus a reference, seed by seed; the reference stands in the same setting unless one is named."""
    own = values(rows, setting, method, key)
    others = values(rows, reference_setting or setting, reference, key)
    return [a - b for a, b in zip(own, others, strict=True)]


def difference(
    rows: Rows, setting: str, method: str, reference: str = "ppo", key: str = "gold", reference_setting: str = ""
) -> Pair:
    """(mean, half) of a variant minus a reference, paired by seed."""
    return mean_interval(differences(rows, setting, method, reference, key, reference_setting))


def p_value(gaps: list[float]) -> float:
    """Two-sided p of a paired t test that the mean of the gaps is 0."""
    n = len(gaps)
    spread = statistics.stdev(gaps)
    if spread == 0:
        return 1.0
    t = abs(statistics.fmean(gaps)) / (spread / n**0.5)
    return 1 - t_probability(t, n - 1)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: p values of a family, adjusted so that one below 0.05 stands for the whole table."""
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, (len(p_values) - rank) * p_values[number])
        adjusted[number] = min(least, 1.0)
    return adjusted


class Values:
    """Rows of one value each, {seed, COLUMNS..., value}, by place: values[place] is (seeds,)."""

    def __init__(self, rows: Rows, *columns: str) -> None:
        by_place = {}
        for row in sorted(rows, key=lambda row: row["seed"]):
            place = tuple(row[name] for name in columns)
            by_place.setdefault(place, []).append(row["value"])
        self.by_place = {place: np.array(found) for place, found in by_place.items()}

    def __getitem__(self, place: tuple) -> np.ndarray:
        return self.by_place[place]

    def mean(self, *place: object) -> Pair:
        """(mean, half) over seeds. A seed without a value (nan) is left out."""
        found = self[place]
        return mean_interval(found[~np.isnan(found)])

    def text(self, *place: object) -> str:
        return plus_minus(self.mean(*place))


def one_value_rows(seed: int, columns: Sequence[str], measured: dict[tuple, float]) -> Rows:
    """{place: value} -> rows {seed, COLUMNS..., value}."""
    return [{"seed": seed, **dict(zip(columns, place)), "value": value} for place, value in measured.items()]


# ------------------------------------------------------------------------------------------------- tables


def plus_minus(pair: Pair, digits: int = 2, sign: str = "") -> str:
    """'0.21 ± 0.06'; with sign '+' always '+0.21' or '-0.21'."""
    mean, half = pair
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def starred(cells: list[str], p_values: list[float]) -> list[str]:
    """A star behind each cell with p < 0.05 after Holm's correction of them all."""
    return [f"{cell} *" if p < 0.05 else cell for cell, p in zip(cells, holm(p_values))]


def results_table(rows: Rows, heading: str, reference: str = "ppo") -> str:
    """Mean over seeds, and the paired difference to a reference method in the same setting, as Markdown."""
    lines = []
    for setting, method in labels_of(rows):
        gap = ""
        if method != reference and reference in methods_of(rows, setting):
            gap = plus_minus(difference(rows, setting, method, reference), 3, "+")
        gold = plus_minus(interval(rows, setting, method), 3)
        reward = interval(rows, setting, method, "reward")[0]
        kl = interval(rows, setting, method, "kl")[0]
        lines.append([setting, method, gold, gap, f"{reward:.2f}", f"{kl:.1f}"])
    head = [heading, "method", "gold", f"minus {reference} (paired)", "reward", "KL"]
    return markdown_table(head, lines)


def gains_table(rows: Rows, methods: Collection[str], key: str, heading: str, reference: str = "ppo") -> str:
    """Paired differences to a reference, a line a setting. A star: p < 0.05 after Holm's correction of this table."""
    labels = [(setting, method) for setting, method in labels_of(rows) if method in methods]
    gaps = [differences(rows, *label, reference, key) for label in labels]
    texts = [plus_minus(mean_interval(gap), 3, "+") for gap in gaps]
    cells = dict(zip(labels, starred(texts, [p_value(gap) for gap in gaps])))
    lines = [[setting, *(cells.get((setting, method), "") for method in methods)] for setting in settings_of(rows)]
    return markdown_table([heading, *methods], lines)


def endpoints_report(
    rows: Rows, methods: Collection[str], heading: str, reference: str = "ppo", title: str = "plain PPO"
) -> str:
    """What each method adds to a reference, a table for each endpoint. title: of the reference."""
    parts = []
    for key, name in ENDPOINTS.items():
        known = [row for row in rows if not math.isnan(row[key])]
        parts.append(f"{name}, minus {title}:\n\n{gains_table(known, methods, key, heading, reference)}")
    return "\n\n".join(parts)
