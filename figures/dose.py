"""What contrast is worth, as a function of how much of the reward is common to a prompt.

A constant of a chosen spread is added to all rewards of a prompt. It follows nothing in the text, so no critic can
foresee it; or the number of sentences, which any critic can; or the words, by a random linear head, which lies between.
The share of the reward's variance that lies between prompts is rho, and the law (`law.py`) says that contrast with k
baselines lowers the variance where rho > 1 / (k + 1). Does it also raise the true reward there?
"""

from collections.abc import Sequence
from pathlib import Path

from crlhf.config import Method
from crlhf.law import variance_ratio
from crlhf.pipeline.plots import plt, save_figure

from .contenders import at
from .harness import SEEDS, default, results, run_variants
from .natural import rho_of_models
from .plotting import plot_points
from .tables import difference, distinct, gains_table, interval, markdown, plus_minus, read_rows, write_csv

SDS = (0.1, 0.25, 0.5, 1.0, 2.0)
SOURCES = {  # WorldConfig.bias_from, and how figures show it
    "nothing": Method("no critic can foresee it", "#D55E00", "-"),
    "sentences": Method("the number of sentences", "#0072B2", "--"),
    "words": Method("a random linear head", "#009E73", "-."),
}
NONE = "sd 0"
CANCEL = ("contrastive", "RLOO")  # a constant: their runs are the same at any dose (an identity)
METHODS = ("contrastive", "adaptive", "RLOO")


def dose(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
    """How does the gain over plain PPO grow with rho, and does it matter whether a critic can foresee the constant?

    Endpoints: mean true reward over all iterations; held-out true reward at the end. All methods have the default
    learning rate and KL price. Twelve seeds; Holm's correction over each table.

    Prediction. (1) Below the law's break-even, rho = 1 / (k + 1), contrastive PPO (c = 1) is below plain PPO over the
    whole run, above it, it is above. (2) The gain grows with rho, and more slowly where the critic can foresee the
    constant; under `sentences` the critic's explained variance grows with the dose, under `nothing` it falls. (3)
    Adaptive PPO is never below plain PPO by more than 0.02, and its gain approaches that of c = 1 as rho grows. (4) At
    the end the differences are smaller than over the whole run, since no constant changes the optimum.
    """
    variants = {(NONE, method): at(method, {}) for method in ("ppo", "adaptive", *CANCEL)}
    for source in SOURCES:
        for sd in SDS:
            settings = {"world.prompt_bias": sd, "world.bias_from": source}
            variants |= {(f"{source}, sd {sd:g}", method): at(method, settings) for method in ("ppo", "adaptive")}
    rows = results(run_variants(root, variants, seeds, "dose"))
    write_csv(figures / "dose.csv", rows)
    plot_dose(rows + same_at_any_dose(rows), read_rows(figures / "natural.csv"), figures / "dose.png")
    return report(figures)


def report(figures: Path) -> str:
    rows = read_rows(figures / "dose.csv")
    rows += same_at_any_dose(rows)
    parts = [position_table(rows)]
    for key, name in (("mean_gold", "Gold over all iterations"), ("gold", "Held-out gold at the end")):
        parts.append(f"{name}, minus plain PPO:\n\n{gains_table(rows, METHODS, key, 'constant')}")
    return "\n\n".join(parts)


def same_at_any_dose(rows: list[dict]) -> list[dict]:
    """The runs that cancel a constant, once more for every other dose, to be paired with that dose's plain PPO."""
    copies = []
    for setting in distinct(rows, "setting"):
        if setting != NONE:
            copies += [{**row, "setting": setting} for row in rows if row["method"] in CANCEL]
    return copies


def plot_dose(rows: list[dict], natural: list[dict], path: Path) -> str:
    """Gain over plain PPO against rho, a panel a method; and what plain PPO's critic foresaw."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.4), sharex=True)
    for source, style in SOURCES.items():
        settings = [NONE, *(f"{source}, sd {sd:g}" for sd in SDS)]
        rho = [interval(rows, setting, "adaptive", "rho")[0] for setting in settings]
        shown = {"color": style.color, "linestyle": style.line, "label": style.title}
        for axis, method in zip(axes.flat, METHODS):
            plot_points(
                axis, rho, [difference(rows, setting, method, key="mean_gold") for setting in settings], **shown
            )
        plot_points(axes[1, 1], rho, [interval(rows, setting, "ppo", "explained") for setting in settings], **shown)
    own = rho_of_models(natural)
    for axis in axes.flat:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvspan(min(own), max(own), color="#777777", alpha=0.2, linewidth=0, label="reward models by themselves")
        axis.axvline(1 / (default("baselines.k") + 1), color="#777777", linestyle=":", label="the law's break-even")
        axis.grid(alpha=0.25)
    for axis, name in zip(axes.flat, ("contrastive (c = 1)", "adaptive", "RLOO, no critic")):
        axis.set(title=f"{name} minus plain PPO", ylabel="true reward over the run, paired", ylim=(-0.08, 0.26))
    axes[1, 1].set(title="What plain PPO's critic foresees", ylabel="explained variance, iterations 20 to 59")
    for axis in axes[1]:
        axis.set_xlabel("rho: share of the reward's variance between prompts")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    return save_figure(figure, path)


def position_table(rows: list[dict]) -> str:
    """Where each dose lies: rho, what the law says of c = 1, what was measured, and what critics foresaw."""
    lines = []
    for setting in distinct(rows, "setting"):
        rho = interval(rows, setting, "adaptive", "rho")
        cells = [plus_minus(rho), f"{variance_ratio(rho[0], default('baselines.k')):.2f}"]
        cells += [plus_minus(interval(rows, setting, method, "explained")) for method in ("ppo", "adaptive")]
        lines.append([setting, *cells, plus_minus(interval(rows, setting, "adaptive", "coefficient"))])
    head = ["constant", "rho", "law: Var(r - b) / Var(r)", "explained variance, plain", "adaptive", "its coefficient"]
    return markdown(head, lines)
