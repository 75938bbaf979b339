"""Errors that a reward model learns: wrong labels, a topic with wrong labels, prompts unlike those it was trained on.

Nothing is added to any reward here, so what contrast changes is not mixed with what it does to a constant.
"""

from functools import partial
from pathlib import Path

import torch

from crlhf import reviews
from crlhf.engine.files import stream, write_jsonl
from crlhf.evaluate import mean_interval
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table

from .bases import UPSTREAM, Change, base_folder, change_bases
from .contenders import FOUR, at
from .harness import Label, Study, results
from .plotting import Figure, describe, finished, panels, plot_intervals, zero_line
from .runs import open_run, sample_texts
from .tables import Rows, distinct, endpoints_report, plus_minus, read_results, results_table, select

FLIPS = {
    "flips 0": {"world.label_flips": 0.0},
    "flips 0.2": {},
    "flips 0.4": {"world.label_flips": 0.4},
    "hard flips 0.4": {"world.label_flips": 0.4, "world.flips": "difficulty"},
    "topic flips 0.5": {"world.label_flips": 0.5, "world.flips": "topic"},
    "response noise 1": {"world.score_noise": 1.0},
}
RIGHT, WRONG = "flips 0", "topic flips 0.5"  # labels on the topic, where trust is measured
UNSEEN = {"prompts seen": 3, "prompts unseen": 1}  # sentences in the openings of the reward model's pairs; PPO's have 3
SAMPLES = 16  # to each prompt, where trust is measured


def labels(study: Study) -> str:
    """Without constants: does contrast withstand wrong labels, trust a doubtful topic less, or help on unseen prompts?

    Endpoints: mean true reward over all iterations; held-out true reward at the end. Twelve seeds; Holm's correction
    over each table. Trust: mean |r - b| on openings about the topic, divided by that on all others, under labels that
    are wrong on half of the topic's pairs, against the same ratio under right labels.

    Prediction. (1) Wrong labels are errors within a prompt. All methods lose alike; contrast minus plain is the same at
    every rate, within 0.02. (2) The theorem says that flips at rate 1/2 leave nothing of the contrast, so trust would
    fall to 0 if the reward model kept topics apart; it reads the same words on all topics, so it falls by less than a
    half. (3) A reward model of one-sentence openings orders responses to three-sentence ones less well, and its levels
    are further off: there contrast gains, if anywhere here. (4) Noise on each response, of sd 1, is in the baselines
    too: 1 + 1/k times its variance. All lose, contrastive PPO by at most 0.03 more, RLOO least of the four.
    """
    flipped = {(setting, method): at(method, flips) for setting, flips in FLIPS.items() for method in FOUR}
    runs = study.run(flipped)
    changes = [Change(name, partial(other_openings, name=name), {}, UPSTREAM[:3]) for name in UNSEEN]
    change_bases(study.root, study.seeds, changes)
    unseen = {(name, method): at(method, {}, base=name) for name in UNSEEN for method in FOUR}
    runs |= study.run(unseen)
    study.write(results(runs))
    bases = {}
    for seed in study.seeds:
        for setting in (RIGHT, WRONG):
            bases[(setting, "base"), seed] = base_folder(study.root, seed, FLIPS[setting])
    study.write(study.measure(measure_trust, bases, "trust"), "_trust")
    return study.answer(labels_report, plot_labels)


def labels_report(figures: Path) -> str:
    rows = read_results(figures, "labels")
    trust = read_results(figures, "labels_trust")
    return "\n\n".join([results_table(rows, "labels"), endpoints_report(rows, FOUR[1:], "labels"), trust_table(trust)])


# ------------------------------------------------------------------------------------------ other openings


def other_openings(pipeline: Pipeline, name: str) -> None:
    """Prompts of three sentences, and a reward model's pairs of three or of one."""
    seed = pipeline.config.run.seed
    world = pipeline.config.world
    prompts = openings(world.train_prompts + world.eval_prompts, 3, f"{seed}-three")
    parts = {"train": prompts[: world.train_prompts], "eval": prompts[world.train_prompts :]}
    for part, own in parts.items():
        write_jsonl(pipeline.path("data") / f"{part}_prompts.jsonl", [{"prompt": prompt} for prompt in own])
    prompts = openings(world.pairs, UNSEEN[name], f"{seed}-pairs-{name}")
    policy = pipeline.model("sft")
    first = sample_texts(pipeline, policy, prompts, stream(seed, name, 0))[1]
    second = sample_texts(pipeline, policy, prompts, stream(seed, name, 1))[1]
    pairs = reviews.make_preferences(prompts, first, second, f"{seed}-{name}", world.label_flips)
    write_jsonl(pipeline.path("preferences") / "preferences.jsonl", pairs)


def openings(n: int, sentences: int, seed: str) -> list[str]:
    """n openings of so many sentences. Of one sentence there are few different ones, so they come again and again."""
    fitting = [prompt for prompt in reviews.make_prompts(6 * n, seed) if prompt.count(".") == sentences]
    return (fitting * (n // len(fitting) + 1))[:n]


# ------------------------------------------------------------------------------------------------- trust


def measure_trust(seed: int, bases: dict[Label, Path]) -> Rows:
    """How large r - b is on the topic and off it, with right labels and with wrong ones."""
    rows = []
    for (setting, _), base in bases.items():
        pipe = open_run(base)
        held_out = pipe.prompts("eval")
        prompts, responses, _ = sample_texts(pipe, pipe.model("sft"), held_out, stream(seed, "trust"), SAMPLES)
        rewards = pipe.reward_callable("train")(prompts, responses).view(-1, SAMPLES)
        gold = reviews.gold_reward(prompts, responses).view(-1, SAMPLES)
        r = rewards - rewards.mean(1, keepdim=True)
        g = gold - gold.mean(1, keepdim=True)
        about = torch.tensor([reviews.TOPIC in reviews.read_review(prompt).tones for prompt in held_out])
        for name, chosen in (("on the topic", about), ("off it", ~about)):
            slope = (r[chosen] * g[chosen]).sum() / g[chosen].square().sum()
            size = r[chosen].abs().mean()
            row = {"seed": seed, "setting": setting, "prompts": name}
            rows.append({**row, "size": size.item(), "slope": slope.item()})
    return rows


def topic_ratios(trust: Rows, quantity: str, setting: str) -> list[float]:
    """For each seed a quantity on the topic over that off it."""
    ratios = []
    for seed in distinct(trust, "seed"):
        on, off = select(trust, seed=seed, setting=setting)
        ratios.append(on[quantity] / off[quantity])
    return ratios


def trust_table(trust: Rows) -> str:
    """Mean |r - b|, and slope of r on gold within prompts, on the topic over off it; and what wrong labels change."""
    lines = []
    for quantity, name in (("size", "mean size of r - b"), ("slope", "slope of r on gold")):
        right = topic_ratios(trust, quantity, RIGHT)
        wrong = topic_ratios(trust, quantity, WRONG)
        change = [b / a for a, b in zip(right, wrong)]
        lines.append([name, *(plus_minus(mean_interval(ratios)) for ratios in (right, wrong, change))])
    head = ["on the topic / off it", "right labels", "half of the topic's wrong", "ratio of the two"]
    return markdown_table(head, lines)


def plot_labels(figures: Path) -> Figure:
    """Gold of every method under each kind of labels, and what each adds to plain PPO over the run."""
    rows = read_results(figures, "labels")
    figure, (left, right) = panels(1, 2, 12, 4.6)
    plot_intervals(left, rows, FOUR)
    describe(left, "At the end", y="held-out gold")
    plot_intervals(right, rows, FOUR[1:], "mean_gold", "ppo")
    describe(right, "Over the whole run", y="gold minus plain PPO's, paired")
    zero_line(right)
    for axis in (left, right):
        describe(axis, x="labels, rewards and prompts")
        axis.tick_params(axis="x", labelsize=8, rotation=25)
    right.legend(*left.get_legend_handles_labels(), fontsize=8, loc="upper left")
    return finished(figure)
