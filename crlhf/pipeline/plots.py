"""Figures of a run. Each function plots one, writes a PNG, and returns the figure's name."""

import os
from pathlib import Path

import matplotlib

if not os.environ.get("DISPLAY") and not os.environ.get("MPLBACKEND"):  # notebooks name a backend of their own
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..config import METHODS, Method
from ..evaluate import mean_interval
from ..reviews import difficulty_name

# Okabe and Ito's palette: distinct to colour-blind readers, and in grey by line style.
STYLES = {"sft": Method("SFT", "#777777", ":"), **METHODS}


def smooth(values: list[float], window: int = 5) -> np.ndarray:
    """Running mean over the last `window` values."""
    means = []
    for end in range(1, len(values) + 1):
        latest = values[max(0, end - window) : end]
        means.append(np.mean(latest))
    return np.array(means)


def save_figure(figure: plt.Figure, path: Path) -> str:
    figure.tight_layout()
    temporary = path.with_name(f"{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)  # whole or not at all, and never through a link
    plt.close(figure)
    return path.stem


def plot_curve(axis: plt.Axes, method: str, values: list[float]) -> None:
    style = STYLES[method]
    axis.plot(values, color=style.color, linestyle=style.line, label=style.title)
    axis.grid(alpha=0.25)


def learning_curves(metrics: dict[str, list[dict]], path: Path) -> str:
    """Reward, gold where known, KL and length over PPO's iterations. metrics: method -> rows of metrics.jsonl."""
    panels = [
        ("reward", "Reward that PPO sees", "raw reward"),
        ("kl", "Distance from the SFT policy", "KL in nats"),
        ("explained_variance", "How well the critic predicts", "explained variance"),
    ]
    if all("gold" in rows[0] for rows in metrics.values()):
        panels.insert(0, ("gold", "True reward, which PPO never sees", "gold score"))
    else:
        panels.insert(2, ("response_length", "Length of responses", "tokens"))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for axis, (key, title, unit) in zip(axes.flat, panels):
        for method, rows in metrics.items():
            values = [row[key] for row in rows]
            plot_curve(axis, method, smooth(values))
        axis.set(title=title, xlabel="iteration", ylabel=unit)
    critics = axes[1, 1]
    lowest, _ = critics.get_ylim()
    critics.set_ylim(bottom=max(-1.0, lowest))
    axes[0, 0].legend()
    return save_figure(figure, path)


def variance_curves(metrics: dict[str, list[dict]], path: Path) -> str:
    """Variance of the reward over a batch, raw and as the method uses it, and the coefficient."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for method, rows in metrics.items():
        key = "reward_variance"
        if METHODS[method].contrast:
            key = "contrastive_variance"
            plot_curve(right, method, [row["coefficient"] for row in rows])
        variances = [row[key] for row in rows]
        plot_curve(left, method, smooth(variances))
    left.set(title="Variance of the reward PPO uses", xlabel="iteration", ylabel="variance over a batch")
    left.set_ylim(bottom=0)
    right.set(title="Share of the baseline that is subtracted", xlabel="iteration", ylabel="coefficient c")
    right.set_ylim(-0.05, 1.05)
    left.legend()
    return save_figure(figure, path)


def gold_by_difficulty(results: dict[str, list[dict]], path: Path) -> str:
    """Mean gold score of each method for easy, medium and hard openings, with 95% intervals."""
    names = ("easy", "medium", "hard")
    figure, axis = plt.subplots(figsize=(7, 3.8))
    width = 0.8 / len(results)
    for number, (method, rows) in enumerate(results.items()):
        style = STYLES[method]
        label = style.title
        shift = (number - (len(results) - 1) / 2) * width
        for x, name in enumerate(names):
            scores = [row["gold"] for row in rows if difficulty_name(row["prompt"]) == name]
            if not scores:
                continue
            mean, half = mean_interval(scores)
            axis.bar(
                x + shift, mean, width * 0.92, yerr=half, color=style.color, label=label, error_kw={"elinewidth": 1}
            )
            label = None  # one line in the legend a method
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(3), [f"{name} openings" for name in names])
    axis.set(title="True reward by difficulty of the prompt", ylabel="gold score")
    axis.legend(fontsize=8, ncols=2)
    return save_figure(figure, path)
