"""The critic's part: how much of what contrast does, for better or worse, goes through the critic?

Two identities say what to look for. GAE is linear, so GAE(r - b, V - b) = GAE(r, V): a critic that is told b(x) at
every step turns contrastive PPO into plain PPO again, and a plain one that is told c b(x), with c fitted, into
`adaptive`. What is left for contrast is what the critic doesn't know, and what contrast costs is what the critic has to
learn: the noise of b is part of every return.
"""

from pathlib import Path

import torch

from crlhf.engine.files import write_jsonl
from crlhf.law import best_share, measured_law
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table

from .bases import Change, change_bases
from .contenders import at
from .harness import Study, Variant, results
from .plotting import Figure, describe, finished, panels, plot_intervals, zero_line
from .runs import default
from .tables import Rows, distinct, endpoints_report, gains_table, interval, labels_of, plus_minus, read_results, select

WARM_UP = 15  # iterations in which only the critic learns; the policy has as many as ever
CRITICS = {
    "reward_model": {},
    "warmed up": {"ppo.critic_warmup": WARM_UP, "ppo.iterations": default("ppo.iterations") + WARM_UP},
    "zero_head": {"ppo.critic": "zero_head"},
    "shared": {"ppo.critic": "shared"},
    "none": {"ppo.critic": "none"},
}
LEARNED = ("ppo", "contrastive", "adaptive")  # with every critic
CANDIDATES = ("c from k rewards", "adaptive, running", "running (SPO)")  # against adaptive


def critic(study: Study) -> str:
    """Without any constant: which critic makes contrast better or worse, and does anything beat `adaptive` there?

    Endpoints: mean true reward over the iterations in which the policy learned; held-out true reward at the end.
    Sixteen seeds; Holm's correction over each table.

    Prediction. (1) Contrastive PPO's critic explains less than plain PPO's, whichever it is, since it has the noise of
    b to learn as well. (2) What c = 1 loses is mostly that: without a critic it loses nothing against plain PPO without
    one (REINFORCE). (3) A long warm-up helps plain PPO and not contrastive PPO. (4) Two candidates against adaptive
    PPO: c from the k rewards of the baselines (James and Stein), fixed over the run, which goes stale; and adaptive
    with a running baseline, which doesn't. Neither is above adaptive by 0.02.
    """
    variants = {(kind, method): at(method, settings) for kind, settings in CRITICS.items() for method in LEARNED}
    variants["reward_model", "c from k rewards"] = Variant("contrastive", {}, SHRUNK.name)
    variants["reward_model", "adaptive, running"] = Variant("adaptive", {"contrastive.source": "running"})
    variants["reward_model", "running (SPO)"] = at("running (SPO)", {})
    change_bases(study.root, study.seeds, [SHRUNK])
    study.write(results(study.run(variants)))
    return study.answer(critic_report, plot_critic)


def shrink_baselines(pipeline: Pipeline) -> None:
    """b becomes c* b, with c* from the k rewards of each prompt alone."""
    rows = pipeline.rows("baselines", "baselines")
    rewards = torch.tensor([row["rewards"] for row in rows])
    share = best_share(measured_law(rewards)["rho"], rewards.shape[1])
    middle = rewards.mean().item()
    for row in rows:
        row["rewards"] = [middle + share * (reward - middle) for reward in row["rewards"]]
    write_jsonl(pipeline.path("baselines") / "baselines.jsonl", rows)


SHRUNK = Change("base shrunk", shrink_baselines)


# ---------------------------------------------------------------------------------------- table, figure


def critic_report(figures: Path) -> str:
    rows = read_results(figures, "critic")
    others = distinct(rows, "method")[1:]
    usual = select(rows, setting="reward_model")
    parts = [
        foresight_table(rows),
        endpoints_report(rows, others, "critic", title="plain PPO with the same critic"),
        "Minus adaptive PPO, over all iterations:\n\n"
        + gains_table(usual, CANDIDATES, "mean_gold", "critic", "adaptive"),
    ]
    return "\n\n".join(parts)


def foresight_table(rows: Rows) -> str:
    """Explained variance of every critic, and the two endpoints."""
    lines = []
    for setting, method in labels_of(rows):
        foreseen = "" if setting == "none" else plus_minus(interval(rows, setting, method, "explained"))
        golds = [plus_minus(interval(rows, setting, method, key), 3) for key in ("mean_gold", "gold")]
        lines.append([setting, method, foreseen, *golds])
    head = ["critic", "method", "explained variance, from iteration 20", "gold over the run", "at the end"]
    return markdown_table(head, lines)


def plot_critic(figures: Path) -> Figure:
    """What each critic foresees, and what contrast adds to plain PPO with it, over the run and at the end."""
    rows = read_results(figures, "critic")
    figure, (left, middle, right) = panels(1, 3, 12.5, 4.2)
    known = [row for row in rows if row["setting"] != "none"]
    plot_intervals(left, known, LEARNED, "explained")
    left.set_ylim(top=1.2 * left.get_ylim()[1])
    describe(left, "What the critic foresees", y="explained variance", legend="upper right")
    for axis, key, when in ((middle, "mean_gold", "Over the whole run"), (right, "gold", "Held-out, at the end")):
        plot_intervals(axis, rows, LEARNED[1:], key, "ppo")
        zero_line(axis)
        describe(axis, when, y="gold minus plain PPO, paired")
    for axis in (left, middle, right):
        axis.tick_params(axis="x", labelsize=8)
    return finished(figure)
