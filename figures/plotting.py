"""Figures of the experiments. Each function plots rows of results and writes a PNG; titles are computed from the rows.

Rows hold setting, method, seed and what was measured. Points are means over seeds, bars and bands 95% Student t
intervals over seeds.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from crlhf.config import Method
from crlhf.evaluate import mean_interval
from crlhf.pipeline.plots import save_figure, smooth

from .contenders import STYLES
from .tables import difference, distinct, interval, labels_of, methods_of, plus_minus, select, settings_of

PALETTE = ("#E69F00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#777777")

# ------------------------------------------------------------------------------------- what figures share


def style_of(method: str, number: int = 0) -> Method:
    """How a method is shown; labels that aren't methods take the palette's colours in turn."""
    line = ("-", "--", "-.", ":")[number % 4]
    return STYLES.get(method, Method(method, PALETTE[number % len(PALETTE)], line))


def plot_points(axis: plt.Axes, x: Sequence[float], pairs: Sequence[tuple[float, float]], **style: object) -> None:
    """(mean, half) pairs over x, as points with bars."""
    means, halves = zip(*pairs)
    axis.errorbar(x, means, halves, **{"marker": "o", "markersize": 4, "capsize": 2, **style})


def plot_band(axis: plt.Axes, curves: np.ndarray, color: str, **style: object) -> None:
    """The mean of (seeds, iterations) curves, and its 95% interval."""
    means, halves = np.array([mean_interval(column) for column in curves.T]).T
    axis.plot(means, color=color, **style)
    axis.fill_between(range(len(means)), means - halves, means + halves, color=color, alpha=0.15, linewidth=0)


def plot_intervals(
    axis: plt.Axes, rows: list[dict], methods: Sequence[str], key: str = "gold", reference: str = "", line: str = ""
) -> None:
    """Mean over seeds and its 95% interval for each setting; with a reference, of the paired difference to it.

    line: of all methods, in place of each one's own.
    """
    settings = settings_of(rows)
    for number, method in enumerate(methods):
        shift, style = 0.09 * (number - (len(methods) - 1) / 2), style_of(method, number)
        places, pairs = [], []
        for place, setting in enumerate(settings):
            if method in methods_of(rows, setting):
                places.append(place + shift)
                compared = (rows, setting, method, reference, key)
                pairs.append(difference(*compared) if reference else interval(rows, setting, method, key))
        shown = {"color": style.color, "linestyle": line or style.line, "label": style.title}
        plot_points(axis, places, pairs, capsize=3, linewidth=1.5, **shown)
    axis.set_xticks(range(len(settings)), settings)
    axis.grid(alpha=0.25)


def curves_by_seed(rows: list[dict], method: str, key: str) -> np.ndarray:
    """(seeds, iterations) of one method."""
    chosen = select(rows, method=method)
    return np.array([[row[key] for row in select(chosen, seed=seed)] for seed in distinct(chosen, "seed")])


def plot_bands(
    axis: plt.Axes, rows: list[dict], setting: str, methods: Sequence[str], key: str, window: int = 5
) -> None:
    """Curves over iterations, one a method: mean over seeds, smoothed, and its 95% interval."""
    rows = select(rows, setting=setting)
    for number, method in enumerate(methods):
        if not select(rows, method=method):
            continue
        style = style_of(method, number)
        curves = np.array([smooth(curve, window) for curve in curves_by_seed(rows, method, key)])
        plot_band(axis, curves, style.color, linestyle=style.line, label=style.title, linewidth=1.8)
    axis.grid(alpha=0.25)


# -------------------------------------------------------------------------------------- one a question


def plot_samples(rows: list[dict], path: Path) -> str:
    """Paired differences to plain PPO against k, a panel for each constant, and what the baselines cost."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), sharey=True)
    for axis, sd in zip(axes, distinct([{"sd": row["setting"].split(",")[0]} for row in rows], "sd")):
        chosen = [row for row in rows if row["setting"].startswith(f"{sd},")]
        chosen = [{**row, "setting": row["setting"].split("= ")[1]} for row in chosen]
        plot_intervals(axis, chosen, ("contrastive", "adaptive"), "mean_gold", "ppo", line="none")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="k, offline responses per prompt", title=f"constant of {sd}")
    axes[0].set_ylabel("gold over the run, minus plain PPO's")
    axes[0].legend(fontsize=8)
    return save_figure(figure, path)


def plot_scale(rows: list[dict], steps: list[dict], path: Path) -> str:
    """KL and gold over the scale of the reward, and the dynamic scale alpha over time."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    methods = distinct(rows, "method")
    short = [{**row, "setting": row["setting"].removeprefix("reward ")} for row in rows]
    for axis, key, name in zip(axes, ("kl", "gold"), ("KL from the SFT policy (nats)", "held-out gold at the end")):
        plot_intervals(axis, short, methods, key)
        axis.set(xlabel="all rewards multiplied by", ylabel=name)
    plot_bands(axes[2], steps, "reward x 1", distinct(steps, "method"), "scale", window=1)
    axes[2].set(xlabel="PPO iteration", ylabel="scale alpha, at reward x 1")
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("What the scale of the reward does to KL and gold, with and without a dynamic scale", fontsize=11)
    return save_figure(figure, path)


def plot_overoptimisation(rows: list[dict], steps: list[dict], path: Path) -> str:
    """Reward, gold and KL over iterations, without a KL price; and the paired difference in gold at the end."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    names = {"reward": "reward that PPO sees", "gold": "gold score", "kl": "KL from SFT (nats)"}
    for axis, (key, name) in zip(axes, names.items()):
        plot_bands(axis, steps, settings_of(steps)[0], distinct(steps, "method"), key)
        axis.set(xlabel="PPO iteration", ylabel=name)
    axes[2].legend(fontsize=8)
    gap = plus_minus(difference(rows, settings_of(rows)[0], "contrastive"), 2, "+")
    figure.suptitle(f"Without a KL price; held-out gold at the end, contrastive - plain: {gap}", fontsize=11)
    return save_figure(figure, path)


def plot_adversary(rows: list[dict], path: Path) -> str:
    """Gold minus that of plain PPO with honest raters, and the share of responses with the phrase."""
    labels = labels_of(rows)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    colors = dict(zip(settings_of(rows), ("#777777", "#D55E00", "#0072B2")))
    for place, (setting, method) in enumerate(labels):
        style = {"color": colors[setting], "marker": "o", "capsize": 3}
        if (setting, method) != ("honest raters", "ppo"):
            gap, half = difference(rows, setting, method, reference_setting="honest raters")
            axes[0].errorbar(gap, place, xerr=half, **style)
        share, half = interval(rows, setting, method, "exploit")
        axes[1].errorbar(share, place, xerr=half, **style)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[0].set_xlabel("held-out gold minus that of plain PPO with honest raters, paired")
    axes[1].set_xlabel("share of responses with the phrase")
    axes[0].set_yticks(range(len(labels)), [f"{a}: {style_of(b).title}" for a, b in labels], fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
    return save_figure(figure, path)
