"""Figures of the experiments. Each function plots rows of results and writes a PNG; titles are computed from the rows.

Rows hold setting, method, seed and what was measured. Points are means over seeds, bars and bands 95% Student t
intervals over seeds.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..config import Method
from ..evaluate import mean_interval
from ..pipeline.plots import finish, smooth
from .contenders import STYLES
from .tables import difference, distinct, interval, labels_of, methods_of, plus_minus, select, settings_of

PALETTE = ("#E69F00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#777777")

# ------------------------------------------------------------------------------------- what figures share


def style_of(method: str, number: int = 0) -> Method:
    """How a method is shown; labels that aren't methods take the palette's colours in turn."""
    line = ("-", "--", "-.", ":")[number % 4]
    return STYLES.get(method, Method(method, PALETTE[number % len(PALETTE)], line))


def mean_of(rows: list[dict], setting: str, method: str, key: str = "gold") -> float:
    return interval(rows, setting, method, key)[0]


def gap_text(
    rows: list[dict], setting: str, method: str, reference: str = "ppo", reference_setting: str | None = None
) -> str:
    """'+0.07 ± 0.06': paired difference in gold to a reference."""
    return plus_minus(difference(rows, setting, method, reference, reference_setting=reference_setting), 2, "+")


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


def plot_noise(rows: list[dict], path: Path) -> str:
    """One column for each kind of noise: gold above, the paired difference to plain PPO below."""
    names = distinct(rows, "axis")
    figure, panels = plt.subplots(2, len(names), figsize=(12, 6.4), sharey="row")
    for (top, bottom), name in zip(panels.T, names):
        short = [{**row, "setting": row["setting"].split(" ")[-1]} for row in select(rows, axis=name)]
        methods = distinct(short, "method")
        plot_intervals(top, short, methods)
        plot_intervals(bottom, short, [method for method in methods if method != "ppo"], reference="ppo")
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set_xlabel(name)
    panels[0, 0].set_ylabel("gold score")
    panels[1, 0].set_ylabel("minus plain PPO, paired")
    panels[0, 0].legend(fontsize=8)
    biased = [row for row in rows if row["axis"].startswith("rater bias")]
    least, *_, most = settings_of(biased)
    figure.suptitle(
        f"Rater bias from {least.split()[-1]} to {most.split()[-1]} moves contrastive - plain from "
        f"{gap_text(biased, least, 'contrastive')} to {gap_text(biased, most, 'contrastive')} gold",
        fontsize=11,
    )
    return finish(figure, path)


def plot_samples(rows: list[dict], path: Path) -> str:
    """Gold and learning speed against k, and what the baselines cost."""
    chosen = [{**row, "setting": row["setting"].removeprefix("k=")} for row in select(rows, method="contrastive")]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    names = {
        "gold": "gold score at the end",
        "iterations_to_half": "iterations to half of plain PPO's gain",
        "baseline_seconds": "seconds of offline sampling",
    }
    for axis, (key, name) in zip(axes, names.items()):
        plot_intervals(axis, chosen, ["contrastive"], key)
        if key != "baseline_seconds":
            (mean, half), color = interval(rows, "none", "ppo", key), style_of("ppo").color
            axis.axhline(mean, color=color, label="plain PPO")
            axis.axhspan(mean - half, mean + half, color=color, alpha=0.1, linewidth=0)
        axis.set(xlabel="k, offline responses per prompt", ylabel=name)
    axes[0].legend(fontsize=8)
    fewest, *_, most = settings_of(chosen)
    gap = gap_text(chosen, most, "contrastive", "contrastive", fewest)
    figure.suptitle(f"From k = {fewest} to {most} gold changes by {gap} (paired)", fontsize=11)
    return finish(figure, path)


def plot_sampling(rows: list[dict], path: Path) -> str:
    """What temperature and p do to the baselines, to the variance of the reward, and to gold."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9))
    names = {
        "bias": "baseline mean minus that at T = 1",
        "start_variance": "Var(r - b) in the first iterations",
        "gold": "gold score at the end",
    }
    for axis, (key, name) in zip(axes, names.items()):
        plot_intervals(axis, rows, ["contrastive"], key, line="none")
        axis.set_ylabel(name)
        axis.tick_params(axis="x", labelsize=7)
    gaps = []
    for setting in settings_of(rows):
        if setting != "T 1":
            gaps.append(f"{gap_text(rows, setting, 'contrastive', 'contrastive', 'T 1')} ({setting})")
    figure.suptitle(f"Gold minus that with baselines at T = 1, paired: {', '.join(gaps)}", fontsize=10)
    return finish(figure, path)


def plot_scale(rows: list[dict], steps: list[dict], path: Path) -> str:
    """Gold and KL over the scale of the reward, and lambda over time."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    methods = distinct(rows, "method")
    short = [{**row, "setting": row["setting"].removeprefix("reward ")} for row in rows]
    for axis, key, name in zip(axes, ("gold", "kl"), ("gold score at the end", "KL from the SFT policy (nats)")):
        plot_intervals(axis, short, methods, key)
        axis.set(xlabel="all rewards multiplied by", ylabel=name)
    scaled = [row for row in steps if row["method"] not in ("ppo", "contrastive")]
    plot_bands(axes[2], scaled, "reward x 1", methods, "scale", window=1)
    axes[2].set(xlabel="PPO iteration", ylabel="lambda, at reward x 1")
    axes[0].legend(fontsize=7)
    spread = {}
    for method in methods:
        if method != "contrastive, magnitude":
            spread[method] = np.ptp([mean_of(rows, setting, method) for setting in settings_of(rows)])
    steady = min(spread, key=spread.get)
    figure.suptitle(
        f"Over scales 0.1 to 10 gold moves by {spread['ppo']:.2f} with plain PPO, by {spread['contrastive']:.2f} with "
        f"contrastive, and least ({spread[steady]:.2f}) with: {steady}",
        fontsize=11,
    )
    return finish(figure, path)


def plot_online(rows: list[dict], steps: list[dict], path: Path) -> str:
    """Gold over iterations at equal steps, and the ends at equal steps and at equal generated responses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(1.2, 1))
    plot_bands(left, steps, "same steps", methods_of(steps, "same steps"), "gold")
    left.set(xlabel="PPO iteration (64 responses each)", ylabel="gold score of the rollouts")
    left.legend(fontsize=7)
    labels = [label for label in reversed(labels_of(rows)) if label[1] != "offline"]
    for place, (setting, method) in enumerate(labels):
        gap, half = difference(rows, setting, method, "offline")
        color = "#0072B2" if setting == "same steps" else "#D55E00"
        right.errorbar(gap, place, xerr=half, color=color, marker="o", capsize=3)
    right.set_yticks(range(len(labels)), [f"{method}\n({setting})" for setting, method in labels], fontsize=7)
    right.axvline(0, color="black", linewidth=0.8)
    right.grid(alpha=0.25)
    right.set_xlabel("gold minus offline baselines, paired by seed")
    right.locator_params(axis="x", nbins=5)
    fresh, groups = (gap_text(rows, "same responses", name, "offline") for name in ("fresh every step", "groups of 4"))
    title = f"At equal generated responses fresh baselines end {fresh} from offline ones, groups {groups}"
    figure.suptitle(title, fontsize=11)
    return finish(figure, path)


def plot_overoptimisation(steps: list[dict], path: Path) -> str:
    """Reward and gold over iterations and against KL, without a KL price."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    names = {"reward": "reward that PPO sees", "gold": "gold score", "kl": "KL from SFT (nats)"}
    for axis, (key, name) in zip(axes, names.items()):
        plot_bands(axis, steps, settings_of(steps)[0], distinct(steps, "method"), key)
        axis.set(xlabel="PPO iteration", ylabel=name)
    axes[0].legend(fontsize=8)
    drops = []
    for method in ("ppo", "contrastive"):
        means = np.convolve(curves_by_seed(steps, method, "gold").mean(0), np.ones(5) / 5, "valid")
        drops.append(f"{means[-1] - means.max():+.2f} ({style_of(method).title})")
    figure.suptitle(f"Without a KL price: gold at the end minus at its best: {', '.join(drops)}", fontsize=11)
    return finish(figure, path)


def plot_adversary(rows: list[dict], path: Path) -> str:
    """Gold and the share of responses with the phrase, for every kind of rater and method."""
    labels = labels_of(rows)[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    colors = dict(zip(settings_of(rows), ("#777777", "#D55E00", "#0072B2")))
    for axis, key, name in zip(axes, ("gold", "exploit"), ("gold score", "share of responses with the phrase")):
        for place, (setting, method) in enumerate(labels):
            mean, half = interval(rows, setting, method, key)
            axis.errorbar(mean, place, xerr=half, color=colors[setting], marker="o", capsize=3)
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    names = [f"{setting}: {style_of(method).title}" for setting, method in labels]
    axes[0].set_yticks(range(len(labels)), names, fontsize=8)
    contrast = gap_text(rows, "fooled raters", "contrastive")
    mended = gap_text(rows, "retrained on exploits", "ppo", "ppo", "fooled raters")
    title = f"Fooled raters: contrastive - plain {contrast} gold; reward model retrained on exploits {mended}"
    figure.suptitle(title, fontsize=11)
    return finish(figure, path)
