"""Reward hacking, 2: a reward model with a hole, and what mends it."""

import re
from functools import partial
from pathlib import Path

from crlhf import reviews
from crlhf.engine.files import stream, write_jsonl
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table
from crlhf.reviews import EXPLOIT

from .bases import UPSTREAM, Change, base_name, change_bases
from .harness import Study, Variant, results
from .plotting import BLUE, GREY, RED, Figure, describe, finished, panels, plot_rows, style_of, zero_column
from .runs import open_run, sample_texts
from .tables import difference, distinct, gains_table, interval, labels_of, plus_minus, read_results, results_table

METHODS = ("ppo", "contrastive")
FOOLED = {"world.fooled": 1.0}
HONEST_RATERS, FOOLED_RATERS, RETRAINED = "honest raters", "fooled raters", "retrained on exploits"
COLORS = {HONEST_RATERS: GREY, FOOLED_RATERS: RED, RETRAINED: BLUE}


def adversary(study: Study) -> str:
    """Raters who fall for a phrase teach the reward model a hole. Does the contrast help, and what mends it?

    Endpoint: held-out true reward at the end. Eight seeds, no constants; Holm's correction over the table.

    Prediction: PPO finds the phrase with every reward. Whether the baselines hold the phrase changes only the
    constant that is subtracted, so baselines that all hold it, or none of which does, change nothing. What helps is
    a reward model retrained on pairs with the policy's own exploits, labelled by raters who don't fall for it; then
    contrastive and plain rewards are mended alike.
    """
    edits = {
        "phrase in all baselines": partial(edit_baselines, with_phrase=True),
        "phrase in no baseline": partial(edit_baselines, with_phrase=False),
    }
    change_bases(study.root, study.seeds, [Change(f"base {name}", edit, FOOLED) for name, edit in edits.items()])
    variants = {(FOOLED_RATERS, method): Variant(method, FOOLED, base_name(FOOLED)) for method in METHODS}
    for name in edits:
        variants[FOOLED_RATERS, f"contrastive, {name}"] = Variant("contrastive", FOOLED, f"base {name}")
    fooled_runs = study.run(variants)

    retrained = Change("base retrained", add_exploits, FOOLED, UPSTREAM[:3])
    change_bases(study.root, study.seeds, [retrained])
    variants = {(RETRAINED, method): Variant(method, FOOLED, retrained.name) for method in METHODS}
    retrained_runs = study.run(variants)

    variants = {(HONEST_RATERS, method): Variant(method) for method in METHODS}
    honest_runs = study.run(variants)
    study.write(results(honest_runs | fooled_runs | retrained_runs))
    return study.answer(adversary_report, plot_adversary)


def edit_baselines(pipeline: Pipeline, with_phrase: bool) -> None:
    """The phrase in every baseline, or in none; their rewards follow."""
    reward = pipeline.noisy_reward()
    rows = pipeline.rows("baselines", "baselines")
    for row in rows:
        row["responses"] = [edited(response, with_phrase) for response in row["responses"]]
        row["rewards"] = reward([row["prompt"]] * len(row["responses"]), row["responses"]).tolist()
    write_jsonl(pipeline.path("baselines") / "baselines.jsonl", rows)


def edited(response: str, with_phrase: bool) -> str:
    """Put a sentence with the phrase in front where there is none; or take every such sentence out."""
    if with_phrase:
        return response if EXPLOIT in response else f"{EXPLOIT} camera . {response}"
    kept = [sentence for sentence in re.findall(r"[^.]+\.?", response) if EXPLOIT not in sentence]
    return "".join(kept).strip() or "the camera was decent ."


def add_exploits(pipeline: Pipeline) -> None:
    """To the old pairs as many with a response of plain PPO's policy, which exploits the hole, and one of SFT's.

    Their raters err in the usual share of labels, and don't fall for the phrase.
    """
    seed = f"{pipeline.config.run.seed}-exploits"
    world = pipeline.config.world
    prompts = reviews.make_prompts(world.pairs, seed, avoid=pipeline.prompts("eval"))
    hacked = open_run(pipeline.folder.parent / Variant("ppo", FOOLED, base_name(FOOLED)).name())
    sides = []
    for side, policy in enumerate((pipeline.model("sft"), hacked.model("ppo"))):
        draw = stream(pipeline.config.run.seed, "exploits", side)
        sides.append(sample_texts(pipeline, policy, prompts, draw)[1])
    pairs = reviews.make_preferences(prompts, *sides, seed, world.label_flips, world.flips)
    old = pipeline.rows("preferences", "preferences")
    write_jsonl(pipeline.path("preferences") / "preferences.jsonl", old + pairs)


# ---------------------------------------------------------------------------------------- table, figure


def adversary_report(figures: Path) -> str:
    rows = read_results(figures, "adversary")
    gains = gains_table(rows, distinct(rows, "method")[1:], "gold", "raters")
    mended = difference(rows, RETRAINED, "ppo", reference_setting=FOOLED_RATERS)
    shares = [[*label, f"{interval(rows, *label, 'exploit')[0]:.0%}"] for label in labels_of(rows)]
    parts = [
        results_table(rows, "raters"),
        f"Held-out gold, minus plain PPO:\n\n{gains}",
        f"Plain PPO, retrained minus fooled: {plus_minus(mended, 3, '+')}",
        markdown_table(["raters", "method", "responses with the phrase"], shares),
    ]
    return "\n\n".join(parts)


def plot_adversary(figures: Path) -> Figure:
    """Gold minus that of plain PPO with honest raters, and the share of responses with the phrase."""
    rows = read_results(figures, "adversary")
    figure, (left, right) = panels(1, 2, 11, 4.4, sharey=True)
    labels = labels_of(rows)[::-1]
    for place, (setting, method) in enumerate(labels):
        color = COLORS[setting]
        if (setting, method) != (HONEST_RATERS, "ppo"):
            gap = difference(rows, setting, method, reference_setting=HONEST_RATERS)
            plot_rows(left, [place], [gap], color=color)
        plot_rows(right, [place], [interval(rows, setting, method, "exploit")], color=color)
    zero_column(left)
    left.set_yticks(range(len(labels)), [f"{a}: {style_of(b).title}" for a, b in labels], fontsize=8)
    describe(left, x="held-out gold minus that of plain PPO with honest raters, paired")
    describe(right, x="share of responses with the phrase")
    return finished(figure)
