"""When it hurts: every setting of every experiment in which contrastive rewards ended below plain PPO."""

from collections.abc import Sequence
from pathlib import Path

from ..evaluate import mean_interval
from .tables import markdown, plus_minus, read_csv, write_csv

SOURCES = ("compare", "noise", "frontier", "samples", "scale", "critic", "sweep", "overoptimisation", "adversary")


def limits(root: Path, figures: Path, seeds: Sequence[int] | None = None) -> str:
    """Where was contrastive PPO (c = 1) worse than plain PPO beyond its interval, and where adaptive?

    Prediction: nowhere by much, since a constant per prompt changes no optimum. With some fifty comparisons and 95%
    intervals one or two should stand out on either side by chance alone.
    """
    found = {}
    for source in SOURCES:
        for row in read_csv(figures / f"{source}.csv"):
            golds = found.setdefault((source, row["setting"]), {})
            golds.setdefault(row["method"], {})[row["seed"]] = float(row["gold"])
    rows, seen = [], []
    for (source, setting), golds in found.items():
        plain = golds.get("ppo")
        if plain is None or any(plain.items() <= other.items() for other in seen):
            continue  # there is nothing to compare with, or these are the same runs under another experiment's name
        seen.append(plain)
        for method in [name for name in golds if name in ("contrastive", "adaptive")]:
            gap, half = mean_interval([golds[method][seed] - plain[seed] for seed in plain])
            row = {"experiment": source, "setting": setting, "method": method, "minus_ppo": gap, "half_width": half}
            rows.append({**row, "seeds": len(plain), "verdict": verdict(gap, half)})
    write_csv(figures / "limits.csv", rows)
    better = sum(row["verdict"] == "better" for row in rows)
    counts = f"{len(rows)} comparisons with plain PPO: {better} better beyond the interval"
    worse = [row for row in rows if row["verdict"] == "worse"]
    if not worse:
        return counts + ", none worse."
    lines = []
    for row in worse:
        gap = plus_minus((row["minus_ppo"], row["half_width"]), 3, "+")
        lines.append([row["experiment"], row["setting"], row["method"], gap])
    head = ["experiment", "setting", "method", "minus plain PPO (paired)"]
    return counts + ". Worse in:\n\n" + markdown(head, lines)


def verdict(gap: float, half: float) -> str:
    if gap + half < 0:
        return "worse"
    return "better" if gap - half > 0 else "no difference beyond the interval"
