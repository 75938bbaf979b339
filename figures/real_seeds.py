"""The runs of `real.py` again, with other seeds: what is luck in one run, and what isn't?

A seed changes all that was drawn: openings, demonstrations, pairs and their labels, the reward model, every response.
"""

from pathlib import Path

from crlhf.config import UserError
from crlhf.evaluate import mean_interval
from crlhf.pipeline.output import fenced
from crlhf.pipeline.plots import STYLES, plt, save_figure

from .real import COMMANDS, TITLES, cost_rows, finished, law_rows, result_rows
from .tables import markdown, plus_minus, read_rows, select, write_csv

METHODS = ("contrastive", "adaptive")
LAW = {  # the columns of the first table: title -> quantity
    "pairs right, by labels": "held-out pairs ordered as by labels",
    "by gold": "held-out pairs ordered as by gold",
    "rho": "rho",
    "predicted ratio": "predicted Var(r - b) / Var(r)",
    "last 10 iterations": "contrastive: measured ratio, last 10 iterations",
    "c*": "best share c*",
    "share in the end": "adaptive: coefficient, last 10 iterations",
}


def real_seeds(root: Path, figures: Path) -> str:
    """Does what one run of a pretrained model showed hold for other seeds?

    Prediction: none was written for these; their settings and endpoints are those of `real`, fixed before any of them
    ran, and so are its predictions: rho below 0.2 for the reviews and above it for HH-RLHF, a ratio that grows as the
    baselines go stale, and no difference between the methods beyond its interval.
    """
    found = [run for name in COMMANDS for run in sorted(root.parent.glob(f"{name}_[0-9]*"))]
    runs = [run for run in found if "baselines" in finished(run)]
    if not runs:
        raise UserError(
            f"there are no runs with baselines in {root.parent / 'real_reviews_1'}, ...: make some by '{command(1)}'"
        )
    for name, rows_of in (("law", law_rows), ("results", result_rows), ("cost", cost_rows)):
        if rows := [row for run in runs for row in rows_of(run)]:
            write_csv(figures / f"real_seeds_{name}.csv", rows)
    plot(figures)
    return report(figures)


def command(seed: int, name: str = "real_reviews") -> str:
    """What makes one of the runs: the command of `real` with a seed and a folder of its own."""
    return COMMANDS[name].replace(f"runs/{name}", f"runs/{name}_{seed} --seed {seed}")


def read(figures: Path, name: str) -> list[dict]:
    """Rows of `real`'s CSV, whose runs have seed 0, and of these runs. run becomes (name of the run, seed)."""
    files = [figures / f"{part}_{name}.csv" for part in ("real", "real_seeds")]
    rows = [row for file in files if file.exists() for row in read_rows(file)]
    return [
        row | {"run": (title, int(row["run"].removeprefix(title)[1:] or 0))}
        for title in COMMANDS
        for row in rows
        if row["run"].startswith(title)
    ]


def gaps(results: list[dict], method: str, key: str, first_seed: int = 0) -> dict[int, tuple[float, float]]:
    """seed -> a method's (mean, half) minus plain PPO on the held-out openings of the film reviews."""
    rows = [row for row in select(results, method=method) if row["run"][0] == "real_reviews"]
    return {
        row["run"][1]: (row[f"{key}_minus_ppo"], row[f"{key}_minus_ppo_half"])
        for row in rows
        if row["run"][1] >= first_seed
    }


def methods_of(results: list[dict]) -> list[str]:
    return [method for method in METHODS if gaps(results, method, "gold")]


# ------------------------------------------------------------------------------------------- table and figure


def report(figures: Path) -> str:
    """real_seeds.md."""
    law, results, cost = (read(figures, name) for name in ("law", "results", "cost"))
    lines = []
    for run in dict.fromkeys(row["run"] for row in law):
        found = {row["quantity"]: row for row in select(law, run=run)}
        lines.append([TITLES[run[0]], str(run[1]), *(cell(found.get(quantity)) for quantity in LAW.values())])
    parts = [markdown(["run", "seed", *LAW], lines)]
    lines = []
    for method in methods_of(results):
        for key in ("gold", "reward"):
            all_seeds, new = (gaps(results, method, key, first) for first in (0, 1))
            cells = [plus_minus(gap, 2, "+") for gap in all_seeds.values()]
            means = [plus_minus(mean_interval([gap for gap, _ in some.values()]), 2, "+") for some in (new, all_seeds)]
            lines.append([STYLES[method].title, key, *cells, *means])
    seeds = [f"seed {seed}" for seed in gaps(results, METHODS[0], "gold")]
    parts.append(markdown(["minus plain PPO", "in", *seeds, "mean of seeds 1 on", "of all"], lines))
    for name in COMMANDS:
        seconds = {}
        for row in cost:
            if row["run"][0] == name and row["run"][1]:
                seconds.setdefault(row["stage"], []).append(row["seconds"])
        stages = ", ".join(f"{stage} {sum(values) / len(values):.0f}" for stage, values in seconds.items())
        parts.append(f"{TITLES[name]}: mean seconds of a stage, seeds 1 on: {stages}.")
    return "\n\n".join([*parts, f"{NOTES}\n\n{fenced(command(1))}"])


NOTES = """± and [ ] are 95% intervals: of a single seed over prompts or iterations, of a mean over seeds. Seed 0 is the
run of `real.md`. A cell is empty where a run has not got so far, or has no such number. Model, rows and commands are
`real.md`'s, with a folder and a seed of their own:"""


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.2f}" + (f" [{row['low']:.2f}, {row['high']:.2f}]" if row["low"] != "" else "")


def plot(figures: Path) -> str:
    """Left: rho of every run. Right: what contrast was worth in gold, against rho."""
    law, results = read(figures, "law"), read(figures, "results")
    rho = {row["run"]: row for row in select(law, quantity="rho")}
    k = select(law, quantity="k")[0]["value"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 3))
    for place, (run, row) in enumerate(rho.items()):
        margins = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        color = "#0072B2" if run[0] == "real_reviews" else "#D55E00"
        left.errorbar(row["value"], place, xerr=margins, fmt="o", color=color, capsize=3)
    left.set(yticks=range(len(rho)), title="Between-prompt share", xlabel="rho")
    left.set_yticklabels([f"{TITLES[name].split(',')[0]}, seed {seed}" for name, seed in rho])
    left.invert_yaxis()
    for shift, method in zip((-0.004, 0.004), methods_of(results)):
        points = gaps(results, method, "gold")
        x = [rho["real_reviews", seed]["value"] + shift for seed in points]
        means, halves = zip(*points.values())
        style = STYLES[method]
        right.errorbar(x, means, yerr=halves, fmt="o", color=style.color, capsize=3, label=style.title)
    for axis in (left, right):
        axis.axvline(1 / (k + 1), color="black", linestyle=":", label=f"break-even of the law, k = {k}")
    right.axhline(0, color="black", linewidth=0.8)
    right.set(title="Gold minus plain PPO, film reviews", xlabel="rho of the run", ylabel="gold")
    right.legend(fontsize=8)
    return save_figure(figure, figures / "real_seeds.png")
