"""When it hurts: every setting of every experiment in which contrastive rewards ended below plain PPO."""

import csv

from ..config import UserError
from ..evaluate import mean_interval
from .harness import write_csv

SOURCES = ("compare", "noise", "frontier", "samples", "scale", "critic", "sweep", "overoptimisation", "adversary")


def limits(root, figures, seeds=None):
    """Where was contrastive PPO (c = 1) worse than plain PPO beyond its interval, and where adaptive?

    Prediction: nowhere by much, since a constant per prompt changes no optimum. With some fifty comparisons and 95%
    intervals one or two should stand out on either side by chance alone.
    """
    found = {}
    for source in SOURCES:
        path = figures / f"{source}.csv"
        if not path.exists():
            raise UserError(f"{path} is missing: run 'python -m crlhf experiment {source}' first")
        with open(path, encoding="utf-8") as file:
            for row in csv.DictReader(file):
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
            verdict = "worse" if gap + half < 0 else "better" if gap - half > 0 else "no difference beyond the interval"
            rows.append({"experiment": source, "setting": setting, "method": method, "minus_ppo": gap,
                         "half_width": half, "seeds": len(plain), "verdict": verdict})
    write_csv(figures / "limits.csv", rows)
    better = sum(row["verdict"] == "better" for row in rows)
    summary = f"{len(rows)} comparisons with plain PPO: {better} better beyond the interval"
    if not any(row["verdict"] == "worse" for row in rows):
        return summary + ", none worse."
    lines = ["| experiment | setting | method | minus plain PPO (paired) |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['experiment']} | {row['setting']} | {row['method']} | {row['minus_ppo']:+.3f} ± "
              f"{row['half_width']:.3f} |" for row in rows if row["verdict"] == "worse"]
    return summary + ". Worse in:\n\n" + "\n".join(lines)
