"""Rows of results, and how they become CSV and Markdown.

A row is a dict. Most hold a setting, a method, a seed and what was measured. A (mean, half) pair is a mean over seeds
and the half-width of its 95% interval.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from crlhf.config import UserError
from crlhf.engine.files import write_atomic
from crlhf.evaluate import mean_interval, t_probability

# ------------------------------------------------------------------------------------------ choosing rows


def select(rows: list[dict], **wanted: object) -> list[dict]:
    """The rows whose columns hold these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows: list[dict], name: str) -> list:
    """The different values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def settings_of(rows: list[dict]) -> list[str]:
    return distinct(rows, "setting")


def methods_of(rows: list[dict], setting: str) -> list[str]:
    return distinct(select(rows, setting=setting), "method")


def labels_of(rows: list[dict]) -> list[tuple[str, str]]:
    """All (setting, method), in order of appearance."""
    return list(dict.fromkeys((row["setting"], row["method"]) for row in rows))


def values(rows: list[dict], setting: str, method: str, key: str = "gold") -> list[float]:
    """Values of one variant, in the order of their seeds."""
    chosen = select(rows, setting=setting, method=method)
    return [row[key] for row in sorted(chosen, key=lambda row: row["seed"])]


def interval(rows: list[dict], setting: str, method: str, key: str = "gold") -> tuple[float, float]:
    """(mean, half) of one variant."""
    return mean_interval(values(rows, setting, method, key))


def difference(
    rows: list[dict],
    setting: str,
    method: str,
    reference: str = "ppo",
    key: str = "gold",
    reference_setting: str | None = None,
) -> tuple[float, float]:
    """(mean, half) of a variant minus a reference, paired by seed."""
    others = values(rows, setting if reference_setting is None else reference_setting, reference, key)
    return mean_interval([a - b for a, b in zip(values(rows, setting, method, key), others, strict=True)])


def p_value(gaps: list[float]) -> float:
    """Two-sided p of a paired t test that the mean of the gaps is 0."""
    n, spread = len(gaps), statistics.stdev(gaps)
    return 1 - t_probability(abs(statistics.fmean(gaps)) / (spread / n**0.5), n - 1) if spread else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: p values of a family, adjusted so that one below 0.05 stands for the whole table."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, (len(p_values) - rank) * p_values[number])
        adjusted[number] = min(least, 1.0)
    return adjusted


# --------------------------------------------------------------------------------------------- text, files


def plus_minus(pair: tuple[float, float], digits: int = 2, sign: str = "") -> str:
    """'0.21 ± 0.06'; with sign '+' always '+0.21' or '-0.21'."""
    mean, half = pair
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table: names of columns, and lines of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def table(rows: list[dict], heading: str, reference: str = "ppo") -> str:
    """Mean over seeds, and the paired difference to a reference method in the same setting, as Markdown."""
    head = [heading, "method", "gold", f"minus {reference} (paired)", "reward", "KL", "win / tie / loss vs SFT"]
    lines = []
    for setting in settings_of(rows):
        methods = methods_of(rows, setting)
        for method in methods:
            names = ("reward", "kl", "win", "tie", "loss")
            means = {name: interval(rows, setting, method, name)[0] for name in names}
            has_gap = method != reference and reference in methods
            gap = plus_minus(difference(rows, setting, method, reference), 3, "+") if has_gap else ""
            shares = " / ".join(f"{means[share]:.0%}" for share in ("win", "tie", "loss"))
            gold = plus_minus(interval(rows, setting, method), 3)
            lines.append([setting, method, gold, gap, f"{means['reward']:.2f}", f"{means['kl']:.1f}", shares])
    return markdown(head, lines)


def gains_table(rows: list[dict], methods: Sequence[str], key: str, heading: str, reference: str = "ppo") -> str:
    """Paired differences to a reference, a line a setting. A star: p < 0.05 after Holm's correction of this table."""
    cells, p_values = {}, []
    for setting in settings_of(rows):
        base = values(rows, setting, reference, key)
        for method in [name for name in methods if name in methods_of(rows, setting)]:
            gaps = [a - b for a, b in zip(values(rows, setting, method, key), base, strict=True)]
            cells[setting, method] = plus_minus(mean_interval(gaps), 3, "+")
            p_values.append(p_value(gaps))
    for label, p in zip(cells, holm(p_values)):
        cells[label] += " *" if p < 0.05 else ""
    lines = [[setting, *(cells.get((setting, method), "") for method in methods)] for setting in settings_of(rows)]
    return markdown([heading, *methods], lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows (dicts with the same keys) as a CSV; numbers keep four digits behind the point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    write_atomic(path, text.getvalue())


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV, with numbers as numbers. Reports are made from these, so that what they print is in the CSV."""
    return [{name: number(value) for name, value in row.items()} for row in read_csv(path)]


def number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV that an experiment wrote; all values are text."""
    if not path.exists():
        name, *_ = path.stem.split("_")
        raise UserError(f"{path} is missing: run 'python -m figures {name}' first")
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))
