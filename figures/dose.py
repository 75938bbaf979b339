"""What contrast is worth, as a function of how much of the reward is common to a prompt.

A constant of a chosen spread is added to all rewards of a prompt. It follows nothing in the text, so no critic can
foresee it; or the number of sentences, which any critic can; or the words, by a random linear head, which lies between.
The share of the reward's variance that lies between prompts is rho, and the law (`law.py`) says that contrast with k
baselines lowers the variance where rho > 1 / (k + 1). Does it also raise the true reward there?
"""

from pathlib import Path

from crlhf.config import Method
from crlhf.pipeline.tables import markdown_table

from .contenders import at
from .harness import Study, results
from .natural import rho_of_models
from .plotting import GREY, Figure, describe, finished, panels, plot_points, zero_line
from .runs import default
from .tables import Rows, difference, distinct, endpoints_report, interval, plus_minus, read_results

SDS = (0.1, 0.25, 0.5, 1.0, 2.0)
SOURCES = {  # WorldConfig.bias_from, and how figures show it
    "nothing": Method("no critic can foresee it", "#D55E00", "-"),
    "sentences": Method("the number of sentences", "#0072B2", "--"),
    "words": Method("a random linear head", "#009E73", "-."),
}
NONE = "sd 0"
CANCEL = ("contrastive", "RLOO")  # a constant: their runs are the same at any dose (an identity)
GAINING = {"contrastive": "contrastive (c = 1)", "adaptive": "adaptive", "RLOO": "RLOO, no critic"}


def dose(study: Study) -> str:
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
            for method in ("ppo", "adaptive"):
                variants[dose_name(source, sd), method] = at(method, settings)
    study.write(results(study.run(variants)))
    return study.answer(dose_report, plot_dose)


def dose_name(source: str, sd: float) -> str:
    return f"{source}, sd {sd:g}"


def dose_report(figures: Path) -> str:
    rows = read_results(figures, "dose")
    rows += same_at_any_dose(rows)
    return f"{position_table(rows)}\n\n{endpoints_report(rows, GAINING, 'constant')}"


def same_at_any_dose(rows: Rows) -> Rows:
    """The runs that cancel a constant, once more for every other dose, to be paired with that dose's plain PPO."""
    copies = []
    for setting in distinct(rows, "setting"):
        if setting != NONE:
            copies += [{**row, "setting": setting} for row in rows if row["method"] in CANCEL]
    return copies


def position_table(rows: Rows) -> str:
    """Where each dose lies: rho, what plain PPO's critic foresaw, and the share that adaptive PPO subtracted."""
    lines = []
    for setting in distinct(rows, "setting"):
        rho = interval(rows, setting, "adaptive", "rho")
        foreseen = plus_minus(interval(rows, setting, "ppo", "explained"))
        coefficient = plus_minus(interval(rows, setting, "adaptive", "coefficient"))
        lines.append([setting, plus_minus(rho), foreseen, coefficient])
    head = ["constant", "rho", "explained variance, plain PPO", "coefficient, adaptive"]
    return markdown_table(head, lines)


def plot_dose(figures: Path) -> Figure:
    """Gain over plain PPO against rho, a panel a method; and what plain PPO's critic foresaw."""
    rows = read_results(figures, "dose")
    rows += same_at_any_dose(rows)
    natural_rho = rho_of_models(read_results(figures, "natural"))
    figure, axes = panels(2, 2, 10, 7.4, sharex=True)
    for source, style in SOURCES.items():
        settings = [NONE, *(dose_name(source, sd) for sd in SDS)]
        rho = [interval(rows, setting, "adaptive", "rho")[0] for setting in settings]
        shown = {"color": style.color, "linestyle": style.line, "label": style.title}
        for axis, method in zip(axes, GAINING):
            gains = [difference(rows, setting, method, key="mean_gold") for setting in settings]
            plot_points(axis, rho, gains, **shown)
        plot_points(axes[3], rho, [interval(rows, setting, "ppo", "explained") for setting in settings], **shown)
    span = {"color": GREY, "alpha": 0.2, "linewidth": 0, "label": "reward models by themselves"}
    for axis in axes:
        zero_line(axis)
        axis.axvspan(min(natural_rho), max(natural_rho), **span)
        axis.axvline(1 / (default("baselines.k") + 1), color=GREY, linestyle=":", label="the law's break-even")
    for axis, name in zip(axes, GAINING.values()):
        describe(axis, f"{name} minus plain PPO", y="true reward over the run, paired")
        axis.set_ylim(-0.08, 0.26)
    describe(axes[3], "What plain PPO's critic foresees", y="explained variance, iterations 20 to 59")
    for axis in axes[2:]:
        describe(axis, x="rho: share of the reward's variance between prompts")
    axes[0].legend(fontsize=8, loc="upper left")
    return finished(figure)
