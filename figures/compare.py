"""The main comparison: every method at its own best settings, with reward models as they come and with a constant."""

from collections.abc import Sequence
from pathlib import Path

from crlhf.pipeline.tables import markdown_table

from .contenders import CONTENDERS, at
from .harness import Study, results
from .plotting import Figure, finished, panels, plot_rows, style_of, zero_column
from .sweep import best_cell, cell_name, searched_sd, tuned
from .tables import (
    Rows,
    difference,
    endpoints_report,
    interval,
    labels_of,
    methods_of,
    read_results,
    results_table,
    settings_of,
)

SETTINGS = {  # name -> (sd of the constant, other settings)
    "reward model as it is": (0.0, {}),
    "a constant of sd 1 added": (1.0, {}),
}


def compare(study: Study) -> str:
    """Which method reaches the highest true reward, over the whole run and at its end?

    Every method has the settings that `sweep` found for it, with a constant or without. Endpoints: mean true reward
    over all iterations; held-out true reward at the end. 24 seeds; Holm's correction over each table. Reference is
    plain PPO with lambda 0.95; that with lambda 1 is in every table.

    Prediction. As the reward model comes all PPO methods end within 0.03 of each other, and c = 1 is below plain PPO
    over the whole run. With a constant of sd 1 plain PPO is slower: every method that cancels it is above, over the
    whole run by 0.05 or more, and at the end by less. Lambda 1 helps plain PPO there. Adaptive PPO is within 0.02 of
    the better of plain and contrastive PPO. RLOO, without a critic, is as good as contrastive PPO. DPO is below all.
    """
    run_at_best(study, SETTINGS, tuple(CONTENDERS))
    return study.answer(compare_report, plot_compare)


def run_at_best(study: Study, settings: dict, methods: Sequence[str]) -> None:
    """Run every method in every setting. Those that cancel a constant are the same run with it and without."""
    variants = {}
    for setting, (sd, faults) in settings.items():
        for method in methods:
            variants[setting, method] = at(method, {**tuned(study.figures, method, sd), **faults})
    study.write(results(study.run(variants)))


def compare_report(figures: Path, name: str = "compare") -> str:
    rows = read_results(figures, name)
    parts = [results_table(rows, "rewards")]
    parts.append(f"What the search found, and what is left of it:\n\n{carried_table(figures, rows)}")
    for reference in ("ppo", "ppo, lambda 1"):
        others = [method for method in CONTENDERS if method != reference]
        parts.append(endpoints_report(rows, others, "rewards", reference, style_of(reference).title))
    return "\n\n".join(parts)


def carried_table(figures: Path, rows: Rows) -> str:
    """For each method gold in the cell that the search chose: on the seeds of the search, and on fresh ones."""
    searched = read_results(figures, "sweep")
    lines = []
    for setting, method in labels_of(rows):
        sd = SETTINGS[setting][0] if setting in SETTINGS else 0.0
        cell = best_cell(figures, method, sd)
        then = interval(searched, cell_name(searched_sd(method, sd), cell), method)[0]
        fresh = interval(rows, setting, method)[0]
        lines.append([setting, method, f"{then:.3f}", f"{fresh:.3f}"])
    head = ["rewards", "method", "gold then", "gold on fresh seeds"]
    return markdown_table(head, lines)


def plot_compare(figures: Path, name: str = "compare") -> Figure:
    """A panel for each kind of reward: every method minus plain PPO, over the whole run and at the end."""
    rows = read_results(figures, name)
    settings = settings_of(rows)
    figure, axes = panels(1, len(settings), 12, 4.6, sharex=True, sharey=True)
    for axis, setting in zip(axes, settings):
        methods = [method for method in methods_of(rows, setting)[::-1] if method != "ppo"]
        for place, method in enumerate(methods):
            for key, lift, face in (("mean_gold", 0.12, None), ("gold", -0.12, "white")):
                gap = difference(rows, setting, method, key=key)
                shown = {"color": style_of(method).color, "markerfacecolor": face, "capsize": 2}
                plot_rows(axis, [place + lift], [gap], **shown)
        zero_column(axis)
        axis.set_yticks(range(len(methods)), [style_of(method).title for method in methods], fontsize=9)
        axis.set_title(setting, fontsize=10)
    about = "gold minus plain PPO's, paired: filled, over the whole run; hollow, held-out at the end"
    figure.supxlabel(about, fontsize=10)
    return finished(figure)
