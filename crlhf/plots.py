"""Figures. Each function draws one, writes a PNG, and returns the figure's name."""

import os

import matplotlib

if not os.environ.get("DISPLAY") and not os.environ.get("MPLBACKEND"):  # notebooks name a backend of their own
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .reviews import difficulty, difficulty_name

# Okabe and Ito's palette: distinct to colour-blind readers, and in grey by line style.
STYLES = {"sft": ("SFT", "#777777", ":"), "ppo": ("plain PPO", "#D55E00", "-"),
          "contrastive": ("contrastive PPO", "#0072B2", "--"), "adaptive": ("adaptive", "#009E73", "-."),
          "dpo": ("DPO", "#CC79A7", ":")}


def smooth(values, window=5):
    """Running mean over the last `window` values."""
    values = np.asarray(values, dtype=float)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(np.arange(len(values)) - window + 1, 0)
    return (sums[1:] - sums[starts]) / (np.arange(len(values)) + 1 - starts)


def finish(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path.stem


def draw(axis, metrics, key, title, ylabel):
    """One line per method that logged `key`, smoothed over five iterations."""
    for method, rows in metrics.items():
        label, colour, style = STYLES[method]
        values = [row[key] for row in rows if key in row]
        if values:
            axis.plot(smooth(values), color=colour, linestyle=style, label=label)
    axis.set(title=title, xlabel="iteration", ylabel=ylabel)
    axis.grid(alpha=0.25)


def learning_curves(metrics, path):
    """Reward, gold where known, KL and length over PPO's iterations. metrics: method -> rows of metrics.jsonl."""
    has_gold = any("gold" in row for rows in metrics.values() for row in rows[:1])
    panels = [("reward", "Reward that PPO sees", "raw reward"), ("kl", "Distance from the SFT policy", "KL in nats"),
              ("explained_variance", "How well the critic predicts", "explained variance")]
    if has_gold:
        panels.insert(0, ("gold", "True reward, which PPO never sees", "gold score"))
    else:
        panels.insert(2, ("response_length", "Length of responses", "tokens"))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for axis, panel in zip(axes.flat, panels):
        draw(axis, metrics, *panel)
    axes[1, 1].set_ylim(bottom=max(-1.0, axes[1, 1].get_ylim()[0]))
    axes[0, 0].legend()
    return finish(figure, path)


def variance_curves(metrics, path):
    """Variance of the reward over a batch, raw and as the method uses it, and the coefficient."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for method, rows in metrics.items():
        label, colour, style = STYLES[method]
        key = "contrastive_variance" if "contrastive_variance" in rows[0] else "reward_variance"
        left.plot(smooth([row[key] for row in rows]), color=colour, linestyle=style, label=label)
        if "coefficient" in rows[0]:
            right.plot([row["coefficient"] for row in rows], color=colour, linestyle=style, label=label)
    left.set(title="Variance of the reward PPO uses", xlabel="iteration", ylabel="variance over a batch")
    left.set_ylim(bottom=0)
    right.set(title="Share of the baseline that is subtracted", xlabel="iteration", ylabel="coefficient c",
              ylim=(-0.05, 1.05))
    for axis in (left, right):
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend()
    return finish(figure, path)


def gold_by_difficulty(results, path):
    """Mean gold score of each method for easy, medium and hard openings, with 95% intervals."""
    names = ("easy", "medium", "hard")
    figure, axis = plt.subplots(figsize=(7, 3.8))
    width = 0.8 / len(results)
    for number, (method, rows) in enumerate(results.items()):
        label, colour, _ = STYLES[method]
        groups = [[row["gold"] for row in rows if difficulty_name(difficulty(row["prompt"])) == name] for name in names]
        means = [np.mean(group) if group else np.nan for group in groups]
        halves = [1.96 * np.std(group, ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0 for group in groups]
        axis.bar(np.arange(3) + (number - (len(results) - 1) / 2) * width, means, width * 0.92, yerr=halves, color=colour,
                 label=label, error_kw={"elinewidth": 1})
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xticks(range(3), [f"{name} openings" for name in names])
    axis.set(title="True reward by difficulty of the prompt", ylabel="gold score")
    axis.legend(fontsize=8, ncols=2)
    return finish(figure, path)
