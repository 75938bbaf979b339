"""The critic's part: how much of what contrast does, for better or worse, goes through the critic?

Two identities say what to look for. GAE is linear, so GAE(r - b, V - b) = GAE(r, V): a critic that is told b(x) at
every step turns contrastive PPO into plain PPO again, and a plain one that is told c b(x), with c fitted, into
`adaptive`. What is left for contrast is what the critic doesn't know, and what contrast costs is what the critic has to
learn: the noise of b is part of every return.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from crlhf.engine.files import read_jsonl, stream, write_jsonl
from crlhf.law import best_share, measured_law
from crlhf.pipeline.folder import seal
from crlhf.pipeline.plots import plt, save_figure
from crlhf.ppo import gae

from .contenders import at
from .harness import (
    SEEDS,
    Variant,
    base_name,
    copy_base,
    default,
    is_finished,
    prepare_bases,
    results,
    run_jobs,
    run_variants,
)
from .plotting import plot_intervals
from .tables import distinct, gains_table, interval, markdown, plus_minus, read_rows, write_csv

WARM_UP = 15  # iterations in which only the critic learns; the policy has as many as ever
CRITICS = {
    "reward_model": {},
    "warmed up": {"ppo.critic_warmup": WARM_UP, "ppo.iterations": default("ppo.iterations") + WARM_UP},
    "zero_head": {"ppo.critic": "zero_head"},
    "shared": {"ppo.critic": "shared"},
    "none": {"ppo.critic": "none"},
}
METHODS = ("ppo", "contrastive", "adaptive")
SHRUNK = "base shrunk"


def critic(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:16]) -> str:
    """Without any constant: which critic makes contrast better or worse, and does anything beat `adaptive` there?

    Endpoints: mean true reward over the iterations in which the policy learned; held-out true reward at the end.
    Sixteen seeds; Holm's correction over each table.

    Prediction. (1) Contrastive PPO's critic explains less than plain PPO's, whichever it is, since it has the noise of
    b to learn as well. (2) What c = 1 loses is mostly that: without a critic it loses nothing against plain PPO without
    one (REINFORCE). (3) A long warm-up helps plain PPO and not contrastive PPO. (4) Two candidates against adaptive
    PPO: c from the k rewards of the baselines (James and Stein), fixed over the run, which goes stale; and adaptive
    with a running baseline, which doesn't. Neither is above adaptive by 0.02.
    """
    variants = {}
    for kind, settings in CRITICS.items():
        for method in METHODS:
            variants[kind, method] = at(method, settings)
    variants["reward_model", "c from k rewards"] = Variant("contrastive", {}, SHRUNK)
    variants["reward_model", "adaptive, running"] = Variant("adaptive", {"contrastive.source": "running"})
    variants["reward_model", "running (SPO)"] = at("running (SPO)", {})
    prepare_bases(root, seeds, [{}])
    folders = [root / f"seed{seed}" for seed in seeds]
    run_jobs([(shrunk_base, folder) for folder in folders if not is_finished(folder / SHRUNK)], "shrunk baselines")
    rows = results(run_variants(root, variants, seeds, "critic"))
    write_csv(figures / "critic.csv", rows)
    plot_critic(rows, figures / "critic.png")
    return report(figures)


def report(figures: Path) -> str:
    rows = read_rows(figures / "critic.csv")
    methods = distinct(rows, "method")
    parts = [identities(), foresight_table(rows)]
    for key, name in (("mean_gold", "Gold over all iterations"), ("gold", "Held-out gold at the end")):
        gains = gains_table(rows, methods[1:], key, "critic")
        parts.append(f"{name}, minus plain PPO with the same critic:\n\n{gains}")
    parts.append("Minus adaptive PPO, over all iterations:\n\n" + candidates_table(rows))
    return "\n\n".join(parts)


def candidates_table(rows: list[dict]) -> str:
    candidates = ("c from k rewards", "adaptive, running", "running (SPO)")
    chosen = [row for row in rows if row["setting"] == "reward_model"]
    return gains_table(chosen, candidates, "mean_gold", "critic", "adaptive")


def shrunk_base(folder: Path) -> None:
    """In a process of its own: a base whose baselines are c* b, with c* from the k rewards of each prompt alone."""
    source, target = folder / base_name({}), folder / SHRUNK
    copy_base(source, target)
    rows = read_jsonl(target / "baselines" / "baselines.jsonl")
    rewards = torch.tensor([row["rewards"] for row in rows])
    share, middle = best_share(measured_law(rewards)["rho"], rewards.shape[1]), rewards.mean().item()
    for row in rows:
        row["rewards"] = [middle + share * (reward - middle) for reward in row["rewards"]]
    write_jsonl(target / "baselines" / "baselines.jsonl", rows)
    seal(target / "baselines")
    write_jsonl(target / "held_out.jsonl", read_jsonl(source / "held_out.jsonl"))


def identities() -> str:
    """The two identities on random numbers, up to what float32 rounds away."""
    draw = stream(0, "identities")
    rewards, values = torch.randn(8, 12, generator=draw), torch.randn(8, 12, generator=draw)
    mask = torch.arange(12) < torch.arange(5, 13)[:, None]  # (B, T): responses of different lengths
    b = torch.randn(8, 1, generator=draw)
    last = torch.nn.functional.one_hot(mask.sum(1) - 1, 12)
    lines = []
    for c in (1.0, 0.3):
        told = gae(rewards - c * b * last, values - c * b, mask, 1.0, default("ppo.lam"))[0]
        gap = ((told - gae(rewards, values, mask, 1.0, default("ppo.lam"))[0]) * mask).abs().max()
        how = "equal plain PPO's to six digits" if gap < 1e-6 else f"differ from plain PPO's by {gap:.0e}"
        lines.append(f"The rewards r - {c:g} b with a critic that is told {c:g} b: advantages {how}.")
    return " ".join(lines)


def foresight_table(rows: list[dict]) -> str:
    """Explained variance of every critic, and the two endpoints."""
    lines = []
    for setting in distinct(rows, "setting"):
        for method in [row["method"] for row in rows if row["setting"] == setting and row["seed"] == rows[0]["seed"]]:
            foreseen = "" if setting == "none" else plus_minus(interval(rows, setting, method, "explained"))
            golds = [plus_minus(interval(rows, setting, method, key), 3) for key in ("mean_gold", "gold")]
            lines.append([setting, method, foreseen, *golds])
    return markdown(
        ["critic", "method", "explained variance, from iteration 20", "gold over the run", "at the end"], lines
    )


def plot_critic(rows: list[dict], path: Path) -> str:
    """What each critic foresees, and what contrast adds to plain PPO with it, over the run and at the end."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.2))
    known = [row for row in rows if row["setting"] != "none"]
    plot_intervals(axes[0], known, METHODS, "explained", line="none")
    for axis, key in zip(axes[1:], ("mean_gold", "gold")):
        plot_intervals(axis, rows, METHODS[1:], key, "ppo", line="none")
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].set(ylabel="explained variance", title="What the critic foresees", ylim=(None, 1.2 * axes[0].get_ylim()[1]))
    axes[1].set(ylabel="gold minus plain PPO, paired", title="Over the whole run")
    axes[2].set(ylabel="gold minus plain PPO, paired", title="Held-out, at the end")
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
    axes[0].legend(fontsize=8, loc="upper right")
    return save_figure(figure, path)
