"""The choices of the method, 1: how many baselines a prompt."""

from pathlib import Path

from .contenders import at
from .harness import Study, results
from .plotting import Figure, describe, finished, panels, plot_intervals, zero_line
from .tables import endpoints_report, read_results, results_table

KS = (1, 4, 16)
CONSTANTS = (0.0, 0.5, 1.0)


def samples(study: Study) -> str:
    """How many offline samples a prompt, at which rho, and what do they cost?

    Endpoints: mean true reward over all iterations; held-out true reward at the end. Twelve seeds; Holm's correction
    over each table.

    Prediction. Break-even is rho = 1 / (k + 1). Without a constant (rho about 0.1) one sample nearly doubles the
    variance, and c = 1 is below plain PPO over the whole run by 0.03 or more; four cost less; sixteen are level, within
    0.02. With a constant of sd 1 even one sample gains, by 0.03 or more, and sixteen gain no more than 0.02 over four.
    Adaptive PPO is within 0.02 of the better of plain and contrastive PPO at every k.
    """
    variants = {}
    for sd in CONSTANTS:
        constant = {"world.prompt_bias": sd}
        for k in KS:
            setting = f"sd {sd:g}, k = {k}"
            variants[setting, "ppo"] = at("ppo", constant)
            variants[setting, "contrastive"] = at("contrastive", {"baselines.k": k})  # a constant cancels
            variants[setting, "adaptive"] = at("adaptive", {"baselines.k": k, **constant})
    study.write(results(study.run(variants)))
    return study.answer(samples_report, plot_samples)


def samples_report(figures: Path) -> str:
    rows = read_results(figures, "samples")
    heading = "constant, samples"
    methods = ("contrastive", "adaptive")
    return f"{results_table(rows, heading)}\n\n{endpoints_report(rows, methods, heading)}"


def plot_samples(figures: Path) -> Figure:
    """Paired differences to plain PPO against k, a panel for each constant."""
    rows = read_results(figures, "samples")
    figure, axes = panels(1, 3, 11, 3.8, sharey=True)
    for axis, sd in zip(axes, CONSTANTS):
        start = f"sd {sd:g}, k = "
        own = [row for row in rows if row["setting"].startswith(start)]
        by_k = [{**row, "setting": row["setting"].removeprefix(start)} for row in own]
        plot_intervals(axis, by_k, ("contrastive", "adaptive"), "mean_gold", "ppo")
        zero_line(axis)
        describe(axis, f"constant of sd {sd:g}", "k, offline responses per prompt")
    describe(axes[0], y="gold over the run, minus plain PPO's", legend="best")
    return finished(figure)
