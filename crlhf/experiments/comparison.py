"""The main comparison: every method at its own best settings, with reward models as they come and with a constant."""

from collections.abc import Sequence
from pathlib import Path

from ..pipeline.plots import finish, plt
from .contenders import CONTENDERS, at
from .harness import SEEDS, Label, Variant, curves, results, run_variants
from .plotting import style_of
from .sweep import tuned
from .tables import difference, gains_table, methods_of, read_rows, settings_of, table, write_csv

NATURAL = {"reward.center_coef": 0.0}  # the reward model whose own offsets are largest: see `natural`
SETTINGS = ("reward model as it is", "reward model without centring", "a constant of sd 1 added")
ENDPOINTS = {"mean_gold": "Gold over all iterations", "gold": "Held-out gold at the end"}


def compare(root: Path, figures: Path, seeds: Sequence[int] = SEEDS) -> str:
    """Which method reaches the highest true reward, over the whole run and at its end?

    Every method has the settings that `sweep` found for it, with a constant or without. Endpoints: mean true reward
    over all iterations; held-out true reward at the end. 24 seeds; Holm's correction over each table. Reference is
    plain PPO with lambda 0.95; that with lambda 1 is in every table.

    Prediction. As reward models come (rho near the break-even) all PPO methods end within 0.03 of each other, and c = 1
    is below plain PPO over the whole run. Without centring the same. With a constant of sd 1 plain PPO is slower:
    every method that cancels it is above, over the whole run by 0.05 or more, and at the end by less. Lambda 1 helps
    plain PPO there. Adaptive PPO is within 0.02 of the better of plain and contrastive PPO everywhere. RLOO, without a
    critic, is as good as contrastive PPO. DPO is below all at the end.
    """
    variants = compare_variants(figures)
    runs = run_variants(root, variants, seeds, "compare")
    rows = results(runs)
    shown = {key: out for key, out in runs.items() if key[0][1] in ("ppo", "contrastive", "adaptive")}
    write_csv(figures / "compare.csv", rows)
    write_csv(figures / "compare_curves.csv", curves(shown, ("gold",)))
    plot_compare(rows, figures / "compare.png")
    return report(figures)


def report(figures: Path) -> str:
    rows = read_rows(figures / "compare.csv")
    parts = [table(rows, "rewards")]
    for key, name in ENDPOINTS.items():
        chosen = [row for row in rows if key == "gold" or row["method"] != "dpo"]
        parts.append(f"{name}, minus plain PPO:\n\n{gains_table(chosen, list(CONTENDERS)[1:], key, 'rewards')}")
    return "\n\n".join(parts)


def compare_variants(figures: Path) -> dict[Label, Variant]:
    """Methods that cancel a constant are the same run with it and without."""
    variants = {}
    for setting, sd, faults in zip(SETTINGS, (0.0, 0.0, 1.0), ({}, NATURAL, {})):
        for method in CONTENDERS:
            variants[setting, method] = at(method, {**tuned(figures, method, sd), **faults})
    return variants


def plot_compare(rows: list[dict], path: Path) -> str:
    """A panel for each kind of reward: every method minus plain PPO, over the whole run and at the end."""
    settings = settings_of(rows)
    figure, axes = plt.subplots(1, len(settings), figsize=(12, 4.6), sharex=True, sharey=True)
    for axis, setting in zip(axes, settings):
        methods = [method for method in methods_of(rows, setting)[::-1] if method != "ppo"]
        for place, method in enumerate(methods):
            for key, lift, face in (("mean_gold", 0.12, None), ("gold", -0.12, "white")):
                if key == "gold" or method != "dpo":
                    gap, half = difference(rows, setting, method, key=key)
                    shown = {"color": style_of(method).color, "markerfacecolor": face, "capsize": 2, "marker": "o"}
                    axis.errorbar(gap, place + lift, xerr=half, **shown)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(methods)), [style_of(method).title for method in methods], fontsize=9)
        axis.set_title(setting, fontsize=10)
        axis.grid(alpha=0.25)
    axes[1].set_xlabel("gold minus plain PPO's, paired: filled, over the whole run; hollow, held-out at the end")
    return finish(figure, path)
