"""Two panels about a run of a real model: is the law right, and what is it about?"""

import torch
from torch import Tensor

from crlhf.config import METHODS
from crlhf.contrastive import leave_one_out
from crlhf.evaluate import Z
from crlhf.law import best_share, measured_law, variance_ratio
from crlhf.pipeline.plots import STYLES, plot_curve, plt, smooth


def plot_ratio(axis: plt.Axes, steps: dict[str, list[dict]], rewards: Tensor) -> None:
    """Var(r - c b) / Var(r) of each batch (points), over 5 iterations (lines), and what the law says of the start."""
    law, k, top = measured_law(rewards), rewards.shape[1], 2.0
    predicted = variance_ratio(law["rho"], k)
    low, high = (variance_ratio(law["rho"] + sign * Z * law["rho_se"], k) for sign in (1, -1))
    axis.axhspan(low, high, color="black", alpha=0.12, linewidth=0)
    axis.axhline(predicted, color="black", linestyle=":", label=f"law, c = 1, at the start: {predicted:.2f}")
    axis.axhline(1, color="black", linewidth=0.8)
    for method, rows in steps.items():
        if METHODS[method].contrast:
            raw, contrastive = ([row[f"{name}_variance"] for row in rows] for name in ("reward", "contrastive"))
            line = smooth(contrastive) / smooth(raw)
            top = max(top, 1.3 * line.max())
            axis.scatter(
                range(len(rows)), [a / b for a, b in zip(contrastive, raw)], s=9, color=STYLES[method].color, alpha=0.4
            )
            plot_curve(axis, method, line)
    axis.set(title="Variance of the reward, with / without contrast", xlabel="PPO iteration", ylim=(0, top))
    axis.set_ylabel("Var(r − c b) / Var(r)")
    axis.legend(fontsize=8)


def plot_scatter(axis: plt.Axes, rewards: Tensor, ended: Tensor) -> None:
    """Each SFT response's reward against the mean of the others to its prompt; the slope is the share c* of these."""
    law, k = measured_law(rewards), rewards.shape[1]
    x, share = leave_one_out(rewards.flatten(), k).view_as(rewards), best_share(law["rho"], k - 1)
    for mask, color, name in ((ended, "#0072B2", "ended"), (~ended, "#D55E00", "cut off")):
        if mask.any():
            axis.scatter(
                *(values[mask].numpy() for values in (x, rewards)),
                s=7,
                color=color,
                alpha=0.4,
                label=f"{name}: {mask.float().mean():.0%}",
            )
    ends, middle = torch.stack([x.min(), x.max()]).numpy(), rewards.mean().item()
    axis.plot(ends, middle + share * (ends - middle), color="black", label=f"slope c* = {share:.2f}")
    axis.plot(ends, ends, color="black", linestyle=":", label="slope 1")
    title = f"SFT responses: rho = {law['rho']:.2f} ± {Z * law['rho_se']:.2f}"
    axis.set(title=title, xlabel=f"mean reward of the {k - 1} others to its prompt", ylabel="reward of a response")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
