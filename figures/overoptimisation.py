"""Reward hacking, 1: what happens when a policy is pushed on, without a price of KL."""

from pathlib import Path

from crlhf.evaluate import mean_interval
from crlhf.pipeline.tables import markdown_table

from .harness import Study, Variant, curves, results
from .plotting import Figure, curves_by_seed, describe, finished, panels, plot_bands
from .tables import distinct, plus_minus, read_results, results_table

METHODS = ("ppo", "contrastive")
SETTING = "no KL price"
NAMES = {"reward": "reward that PPO sees", "gold": "gold score", "kl": "KL from SFT (nats)"}


def overoptimisation(study: Study) -> str:
    """With no KL price and more steps: when does gold turn down while the reward still rises?

    Endpoints: held-out true reward at the end; gold and reward in the last fifth of the iterations minus the second.
    Eight seeds, no constants.

    Prediction: gold rises, then falls behind the reward as the KL grows (Gao et al. 2023). The contrast subtracts a
    constant per prompt, so the errors of the reward model that the policy climbs into stay as they were: contrastive
    rewards should hack as plain ones do.
    """
    settings = {"ppo.kl_coef": 0.0, "ppo.iterations": 100}
    variants = {(SETTING, method): Variant(method, settings) for method in METHODS}
    runs = study.run(variants)
    study.write(results(runs))
    study.write(curves(runs, NAMES), "_curves")
    return study.answer(overoptimisation_report, plot_overoptimisation)


def overoptimisation_report(figures: Path) -> str:
    rows = read_results(figures, "overoptimisation")
    steps = read_results(figures, "overoptimisation_curves")
    fifth = len(distinct(steps, "iteration")) // 5
    lines = []
    for method in METHODS:
        for key in NAMES:
            values = curves_by_seed(steps, key, method=method)  # (seeds, iterations)
            fifths = [values[:, i * fifth : (i + 1) * fifth].mean(1) for i in range(5)]
            change = plus_minus(mean_interval(fifths[4] - fifths[1]), 2, "+")
            lines.append([f"{method}, {key}", *(f"{part.mean():.2f}" for part in fifths), change])
    head = ["fifths of the run", "first", "second", "third", "fourth", "last", "last minus second"]
    return "\n\n".join([results_table(rows, "setting"), markdown_table(head, lines)])


def plot_overoptimisation(figures: Path) -> Figure:
    """Reward, gold and KL over iterations, without a KL price."""
    steps = read_results(figures, "overoptimisation_curves")
    figure, axes = panels(1, 3, 12, 4)
    for axis, (key, name) in zip(axes, NAMES.items()):
        plot_bands(axis, steps, SETTING, key)
        describe(axis, x="PPO iteration", y=name)
    axes[2].legend(fontsize=8)
    return finished(figure)
