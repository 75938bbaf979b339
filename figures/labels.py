"""Errors that a reward model learns: wrong labels, a topic with wrong labels, prompts unlike those it was trained on.

Nothing is added to any reward here, so what contrast changes is not mixed with what it does to a constant.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from crlhf import reviews
from crlhf.engine.files import read_json, stream, write_json, write_jsonl
from crlhf.evaluate import mean_interval
from crlhf.pipeline.folder import seal
from crlhf.pipeline.plots import plt, save_figure
from crlhf.pipeline.run import run_to
from crlhf.policy import generate

from .contenders import at
from .harness import (
    SEEDS,
    base_name,
    configured,
    copy_base,
    held_out_rows,
    is_finished,
    open_run,
    results,
    run_jobs,
    run_variants,
    silent_pipeline,
)
from .plotting import plot_intervals
from .tables import distinct, gains_table, markdown, plus_minus, read_rows, select, table, write_csv

FLIPS = {
    "flips 0": {"world.label_flips": 0.0},
    "flips 0.2": {},
    "flips 0.4": {"world.label_flips": 0.4},
    "hard flips 0.4": {"world.label_flips": 0.4, "world.flips": "difficulty"},
    "topic flips 0.5": {"world.label_flips": 0.5, "world.flips": "topic"},
    "response noise 1": {"world.score_noise": 1.0},
}
TOPIC_FREE, ON_TOPIC = "flips 0", "topic flips 0.5"
UNSEEN = {"prompts seen": 3, "prompts unseen": 1}  # sentences in the openings of the reward model's pairs; PPO's have 3
METHODS = ("ppo", "contrastive", "adaptive", "RLOO")
RESPONSES = 16  # to each prompt, where trust is measured


def labels(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
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
    variants = {(setting, method): at(method, flips) for setting, flips in FLIPS.items() for method in METHODS}
    unseen = {(name, method): at(method, {}, base=name) for name in UNSEEN for method in METHODS}
    runs = run_variants(root, variants, seeds, "labels")
    folders = [root / f"seed{seed}" for seed in seeds]
    jobs = [(openings_base, f, s, name) for f, s in zip(folders, seeds) for name in UNSEEN if not is_finished(f / name)]
    run_jobs(jobs, "reward models of other openings")
    rows = results(runs | run_variants(root, unseen, seeds, "unseen prompts"))
    write_csv(figures / "labels.csv", rows)
    files = {seed: root / f"seed{seed}" / "trust.json" for seed in seeds}
    run_jobs([(measure_trust, file, root, seed) for seed, file in files.items() if not file.exists()], "trust")
    trust = [row for file in files.values() for row in read_json(file)]
    write_csv(figures / "labels_trust.csv", trust)
    plot_labels(rows, figures / "labels.png")
    return report(figures)


def report(figures: Path) -> str:
    rows, trust = read_rows(figures / "labels.csv"), read_rows(figures / "labels_trust.csv")
    parts = [table(rows, "labels")]
    for key, name in (("mean_gold", "Gold over all iterations"), ("gold", "Held-out gold at the end")):
        parts.append(f"{name}, minus plain PPO:\n\n{gains_table(rows, METHODS[1:], key, 'labels')}")
    return "\n\n".join([*parts, trust_table(trust)])


def openings_base(folder: Path, seed: int, name: str) -> None:
    """In a process of its own: a base whose prompts have three sentences, and the reward model's pairs three or one."""
    source, target = folder / base_name({}), folder / name
    copy_base(source, target, ("data", "sft", "preferences"))
    pipeline = silent_pipeline(configured(target, seed, "contrastive", {}))
    world, tokenizer, length = pipeline.config.world, pipeline.tokenizer(), pipeline.config.data.max_response_tokens
    three = openings(world.train_prompts + world.eval_prompts, 3, f"{seed}-three")
    for which, prompts in (("train", three[: world.train_prompts]), ("eval", three[world.train_prompts :])):
        write_jsonl(target / "data" / f"{which}_prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    seal(target / "data")
    prompts, sides = openings(world.pairs, UNSEEN[name], f"{seed}-pairs-{name}"), []
    for side in (0, 1):
        draw = stream(seed, name, side)
        sides.append(generate(pipeline.model("sft"), tokenizer, prompts, length, generator=draw)[0])
    pairs = reviews.make_preferences(prompts, *sides, f"{seed}-{name}", world.label_flips)
    write_jsonl(target / "preferences" / "preferences.jsonl", pairs)
    seal(target / "preferences")
    run_to(pipeline, "baselines", redo=True)
    write_jsonl(target / "held_out.jsonl", held_out_rows(pipeline, "sft"))


def openings(n: int, sentences: int, seed: str) -> list[str]:
    """n openings of so many sentences. Of one sentence there are few different ones, so they come again and again."""
    found = [prompt for prompt in reviews.make_prompts(6 * n, seed) if prompt.count(".") == sentences]
    return (found * (n // len(found) + 1))[:n]


# ------------------------------------------------------------------------------------------------- trust


def measure_trust(file: Path, root: Path, seed: int) -> None:
    """In a process of its own: how large r - b is on the topic and off it, with right labels and with wrong ones."""
    rows = []
    for setting in (TOPIC_FREE, ON_TOPIC):
        pipe = open_run(root / f"seed{seed}" / base_name(FLIPS[setting]))
        prompts, length = pipe.prompts("eval"), pipe.config.data.max_response_tokens
        draw = stream(seed, "trust")
        responses = generate(pipe.model("sft"), pipe.tokenizer(), prompts, length, generator=draw, k=RESPONSES)[0]
        texts = [prompt for prompt in prompts for _ in range(RESPONSES)], responses
        rewards = pipe.reward_callable("train")(*texts).view(-1, RESPONSES)
        gold = reviews.gold_reward(*texts).view(-1, RESPONSES)
        r, g = (values - values.mean(1, keepdim=True) for values in (rewards, gold))
        about = torch.tensor([reviews.TOPIC in reviews.read_review(prompt).tones for prompt in prompts])
        for name, chosen in (("on the topic", about), ("off it", ~about)):
            slope = (r[chosen] * g[chosen]).sum() / g[chosen].square().sum()
            place = {"seed": seed, "setting": setting, "prompts": name}
            rows.append({**place, "size": r[chosen].abs().mean().item(), "slope": slope.item()})
    write_json(file, rows)


def plot_labels(rows: list[dict], path: Path) -> str:
    """Gold of every method under each kind of labels, and what each adds to plain PPO over the run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    plot_intervals(left, rows, METHODS, line="none")
    plot_intervals(right, rows, METHODS[1:], "mean_gold", "ppo", line="none")
    left.set(ylabel="held-out gold", title="At the end")
    right.set(ylabel="gold minus plain PPO's, paired", title="Over the whole run")
    right.axhline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.set_xlabel("labels, rewards and prompts")
        axis.tick_params(axis="x", labelsize=8, rotation=25)
    right.legend(*left.get_legend_handles_labels(), fontsize=8, loc="upper left")
    return save_figure(figure, path)


def trust_table(trust: list[dict]) -> str:
    """Mean |r - b|, and slope of r on gold within prompts, on the topic over off it; and what wrong labels change."""
    lines, ratios = [], {}
    for quantity in ("size", "slope"):
        for setting in (TOPIC_FREE, ON_TOPIC):
            ratios[quantity, setting] = []
            for seed in distinct(trust, "seed"):
                on, off = (row[quantity] for row in select(trust, seed=seed, setting=setting))
                ratios[quantity, setting].append(on / off)
        right, wrong = ratios[quantity, TOPIC_FREE], ratios[quantity, ON_TOPIC]
        change = [b / a for a, b in zip(right, wrong)]
        lines.append([quantity, *(plus_minus(mean_interval(values)) for values in (right, wrong, change))])
    names = {"size": "mean size of r - b", "slope": "slope of r on gold"}
    lines = [[names[first], *rest] for first, *rest in lines]
    return markdown(["on the topic / off it", "right labels", "half of the topic's wrong", "ratio of the two"], lines)
