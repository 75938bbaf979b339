"""The main comparison: every method at its own best settings, with reward models as they come and with a constant."""

from collections.abc import Sequence
from pathlib import Path

from crlhf.pipeline.plots import plt, save_figure

from .contenders import CONTENDERS, MOVED, at
from .harness import SEEDS, results, run_variants
from .plotting import style_of
from .sweep import best_cell, place, tuned
from .tables import difference, gains_table, interval, markdown, methods_of, read_rows, settings_of, table, write_csv

AS_IT_IS, CONSTANT, UNCENTRED = "reward model as it is", "a constant of sd 1 added", "reward model without centring"
SETTINGS = {AS_IT_IS: (0.0, {}), CONSTANT: (1.0, {})}  # name -> (sd of the constant, other settings)
NATURAL = {UNCENTRED: (0.0, {"reward.center_coef": 0.0})}
ENDPOINTS = {"mean_gold": "Gold over all iterations", "gold": "Held-out gold at the end"}


def compare(root: Path, figures: Path, seeds: Sequence[int] = SEEDS) -> str:
    """Which method reaches the highest true reward, over the whole run and at its end?

    Every method has the settings that `sweep` found for it, with a constant or without. Endpoints: mean true reward
    over all iterations; held-out true reward at the end. 24 seeds; Holm's correction over each table. Reference is
    plain PPO with lambda 0.95; that with lambda 1 is in every table.

    Prediction. As the reward model comes all PPO methods end within 0.03 of each other, and c = 1 is below plain PPO
    over the whole run. With a constant of sd 1 plain PPO is slower: every method that cancels it is above, over the
    whole run by 0.05 or more, and at the end by less. Lambda 1 helps plain PPO there. Adaptive PPO is within 0.02 of
    the better of plain and contrastive PPO. RLOO, without a critic, is as good as contrastive PPO. DPO is below all.
    """
    return compared(root, figures, seeds, "compare", SETTINGS)


def uncentred(root: Path, figures: Path, seeds: Sequence[int] = SEEDS) -> str:
    """The same comparison with a reward model that was never centred, whose own offsets are larger.

    Prediction: as with the usual reward model, since its offsets are still far below an sd of 1 (`natural`): all PPO
    methods end within 0.03 of each other, and adaptive PPO is within 0.02 of the better of plain and contrastive PPO.
    """
    return compared(root, figures, seeds, "uncentred", NATURAL)


def compared(root: Path, figures: Path, seeds: Sequence[int], name: str, settings: dict) -> str:
    """Run every method in every setting. Those that cancel a constant are the same run with it and without."""
    variants = {}
    for setting, (sd, faults) in settings.items():
        for method in CONTENDERS:
            if method == "dpo" and faults:
                continue  # it sees no reward model: these would be the runs of `compare`
            variants[setting, method] = at(method, {**tuned(figures, method, sd), **faults})
    rows = results(run_variants(root, variants, seeds, name))
    write_csv(figures / f"{name}.csv", rows)
    plot_compare(rows, figures / f"{name}.png")
    return report(figures, name)


def report(figures: Path, experiment: str = "compare") -> str:
    rows = read_rows(figures / f"{experiment}.csv")
    parts = [table(rows, "rewards"), "What the search found, and what is left of it:\n\n" + carried(figures, rows)]
    for reference in ("ppo", "ppo, lambda 1"):
        others = [method for method in CONTENDERS if method != reference]
        for key, name in ENDPOINTS.items():
            chosen = [row for row in rows if key == "gold" or row["method"] != "dpo"]
            gains = gains_table(chosen, others, key, "rewards", reference)
            parts.append(f"{name}, minus {style_of(reference).title}:\n\n{gains}")
    return "\n\n".join(parts)


def carried(figures: Path, rows: list[dict]) -> str:
    """For each method the cell that the search chose, and gold there: on the seeds of the search, and on fresh ones."""
    searched, lines = read_rows(figures / "sweep.csv"), []
    for setting in settings_of(rows):
        sd = SETTINGS.get(setting, (0.0, {}))[0]
        for method in methods_of(rows, setting):
            cell = best_cell(figures, method, sd)
            found = interval(searched, place(sd if method in MOVED else 0.0, cell), method)[0]
            cells = [f"{value:g}" for value in cell]
            fresh, kl = (interval(rows, setting, method, key)[0] for key in ("gold", "kl"))
            lines.append([setting, method, *cells, f"{found:.3f}", f"{fresh:.3f}", f"{kl:.1f}"])
    head = ["rewards", "method", "learning rate", "KL price (beta)", "epochs", "gold then", "gold on fresh seeds", "KL"]
    return markdown(head, lines)


def plot_compare(rows: list[dict], path: Path) -> str:
    """A panel for each kind of reward: every method minus plain PPO, over the whole run and at the end."""
    settings = settings_of(rows)
    figure, axes = plt.subplots(1, len(settings), figsize=(12, 4.6), sharex=True, sharey=True, squeeze=False)
    for axis, setting in zip(axes[0], settings):
        methods = [method for method in methods_of(rows, setting)[::-1] if method != "ppo"]
        for row, method in enumerate(methods):
            for key, lift, face in (("mean_gold", 0.12, None), ("gold", -0.12, "white")):
                if key == "gold" or method != "dpo":
                    gap, half = difference(rows, setting, method, key=key)
                    shown = {"color": style_of(method).color, "markerfacecolor": face, "capsize": 2, "marker": "o"}
                    axis.errorbar(gap, row + lift, xerr=half, **shown)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(methods)), [style_of(method).title for method in methods], fontsize=9)
        axis.set_title(setting, fontsize=10)
        axis.grid(alpha=0.25)
    figure.supxlabel(
        "gold minus plain PPO's, paired: filled, over the whole run; hollow, held-out at the end", fontsize=10
    )
    return save_figure(figure, path)
