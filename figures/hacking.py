"""Reward hacking: what happens when the policy is pushed on, and when the reward model has a hole."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from crlhf import reviews
from crlhf.engine.files import read_jsonl, stream, write_jsonl
from crlhf.evaluate import mean_interval
from crlhf.pipeline.folder import seal
from crlhf.pipeline.run import run_to
from crlhf.policy import generate
from crlhf.reviews import EXPLOIT

from .harness import (
    SEEDS,
    Variant,
    base_name,
    configured,
    copy_base,
    curves,
    is_finished,
    open_run,
    prepare_bases,
    results,
    run_jobs,
    run_variants,
    silent_pipeline,
)
from .plotting import curves_by_seed, plot_adversary, plot_overoptimisation
from .tables import (
    difference,
    distinct,
    gains_table,
    interval,
    labels_of,
    markdown,
    plus_minus,
    read_rows,
    table,
    write_csv,
)

METHODS = ("ppo", "contrastive")
FOOLED = {"world.fooled": 1.0}
EDITS = {True: "phrase in all baselines", False: "phrase in no baseline"}


def overoptimisation(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:8]) -> str:
    """With no KL price and more steps: when does gold turn down while the reward still rises?

    Endpoints: held-out true reward at the end; gold and reward in the last fifth of the iterations minus the second.
    Eight seeds, no constants.

    Prediction: gold rises, then falls behind the reward as the KL grows (Gao et al. 2023). The contrast subtracts a
    constant per prompt, so the errors of the reward model that the policy climbs into stay as they were: contrastive
    rewards should hack as plain ones do.
    """
    settings = {"ppo.kl_coef": 0.0, "ppo.iterations": 100}
    variants = {("no KL price", method): Variant(method, settings) for method in METHODS}
    runs = run_variants(root, variants, seeds, "overoptimisation")
    rows, steps = results(runs), curves(runs, ("gold", "reward", "kl", "ended", "response_length"))
    write_csv(figures / "overoptimisation.csv", rows)
    write_csv(figures / "overoptimisation_curves.csv", steps)
    plot_overoptimisation(rows, read_rows(figures / "overoptimisation_curves.csv"), figures / "overoptimisation.png")
    return overoptimisation_report(figures)


def overoptimisation_report(figures: Path) -> str:
    rows, steps = (read_rows(figures / f"overoptimisation{part}.csv") for part in ("", "_curves"))
    lines, fifth = [], len(distinct(steps, "iteration")) // 5
    for method in METHODS:
        for key in ("reward", "gold", "kl"):
            curves = curves_by_seed(steps, method, key)  # (seeds, iterations)
            parts = [curves[:, number * fifth : (number + 1) * fifth].mean(1) for number in range(5)]
            change = plus_minus(mean_interval((parts[4] - parts[1]).tolist()), 2, "+")
            lines.append([f"{method}, {key}", *(f"{part.mean():.2f}" for part in parts), change])
    head = ["fifths of the run", "first", "second", "third", "fourth", "last", "last minus second"]
    gaps = gains_table(rows, METHODS[1:], "gold", "setting")
    return "\n\n".join([table(rows, "setting"), markdown(head, lines), f"Held-out gold, minus plain PPO:\n\n{gaps}"])


def adversary(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:8]) -> str:
    """Raters who fall for a phrase teach the reward model a hole. Does the contrast help, and what mends it?

    Endpoint: held-out true reward at the end. Eight seeds, no constants; Holm's correction over the table.

    Prediction: PPO finds the phrase with every reward. Whether the baselines hold the phrase changes only the
    constant that is subtracted, so baselines that all hold it, or none of which does, change nothing. What helps is
    a reward model retrained on pairs with the policy's own exploits, labelled by raters who don't fall for it; then
    contrastive and plain rewards are mended alike.
    """
    folders = [(root / f"seed{seed}", seed) for seed in seeds]
    fooled = {("fooled raters", method): Variant(method, FOOLED, base_name(FOOLED)) for method in METHODS}
    for name in EDITS.values():
        fooled["fooled raters", f"contrastive, {name}"] = Variant("contrastive", FOOLED, f"base {name}")
    again = {("retrained on exploits", method): Variant(method, FOOLED, "base retrained") for method in METHODS}
    honest = {("honest raters", method): Variant(method) for method in METHODS}

    prepare_bases(root, seeds, [FOOLED])
    jobs = []
    for folder, seed in folders:
        for with_phrase, name in EDITS.items():
            if not is_finished(folder / f"base {name}"):
                jobs.append((edited_base, folder, seed, with_phrase))
    run_jobs(jobs, "edited baselines")
    fooled_runs = run_variants(root, fooled, seeds, "fooled raters")
    jobs = [(retrained_base, *pair) for pair in folders if not is_finished(pair[0] / "base retrained")]
    run_jobs(jobs, "reward models retrained on exploits")
    honest_runs = run_variants(root, honest, seeds, "honest raters")
    rows = results(honest_runs | fooled_runs | run_variants(root, again, seeds, "retrained"))
    write_csv(figures / "adversary.csv", rows)
    plot_adversary(rows, figures / "adversary.png")
    return adversary_report(figures)


def adversary_report(figures: Path) -> str:
    rows = read_rows(figures / "adversary.csv")
    methods = [method for method in distinct(rows, "method") if method != "ppo"]
    gaps = gains_table(rows, methods, "gold", "raters")
    shares = [[*label, f"{interval(rows, *label, 'exploit')[0]:.0%}"] for label in labels_of(rows)]
    mended = difference(rows, "retrained on exploits", "ppo", reference_setting="fooled raters")
    parts = [table(rows, "raters"), f"Held-out gold, minus plain PPO:\n\n{gaps}"]
    parts.append("Plain PPO, retrained minus fooled: " + plus_minus(mended, 3, "+"))
    return "\n\n".join([*parts, markdown(["raters", "method", "responses with the phrase"], shares)])


def edited_base(folder: Path, seed: int, with_phrase: bool) -> None:
    """In a process of its own: the fooled raters' base with the phrase in every baseline, or in none."""
    source, target = folder / base_name(FOOLED), folder / f"base {EDITS[with_phrase]}"
    copy_base(source, target)
    reward = silent_pipeline(configured(target, seed, "contrastive", FOOLED)).noisy_reward()
    rows = read_jsonl(target / "baselines" / "baselines.jsonl")
    for row in rows:
        row["responses"] = [edited(response, with_phrase) for response in row["responses"]]
        row["rewards"] = reward([row["prompt"]] * len(row["responses"]), row["responses"]).tolist()
    write_jsonl(target / "baselines" / "baselines.jsonl", rows)
    seal(target / "baselines")
    shutil.copy(source / "held_out.jsonl", target / "held_out.jsonl")


def edited(response: str, with_phrase: bool) -> str:
    """Put a sentence with the phrase in front where there is none; or take every such sentence out."""
    if with_phrase:
        return response if EXPLOIT in response else f"{EXPLOIT} camera . {response}"
    kept = [sentence for sentence in re.findall(r"[^.]+\.?", response) if EXPLOIT not in sentence]
    return "".join(kept).strip() or "the camera was decent ."


def retrained_base(folder: Path, seed: int) -> None:
    """In a process of its own: a new reward model from the old pairs and as many with the hacked policy's responses.

    The new pairs hold a response of the SFT policy and one of plain PPO's policy, which exploits the hole. Their
    raters err in the usual share of labels, and don't fall for the phrase.
    """
    source, target = folder / base_name(FOOLED), folder / "base retrained"
    copy_base(source, target, ("data", "sft", "preferences"))
    pipeline = silent_pipeline(configured(target, seed, "contrastive", FOOLED))
    world, tokenizer, length = pipeline.config.world, pipeline.tokenizer(), pipeline.config.data.max_response_tokens
    prompts = reviews.make_prompts(world.pairs, f"{seed}-exploits", avoid=pipeline.prompts("eval"))
    policies = pipeline.model("sft"), open_run(folder / Variant("ppo", FOOLED, base_name(FOOLED)).name()).model("ppo")
    sides = []
    for side, policy in enumerate(policies):
        responses, *_ = generate(policy, tokenizer, prompts, length, generator=stream(seed, "exploits", side))
        sides.append(responses)
    new = reviews.make_preferences(prompts, *sides, f"{seed}-exploits", world.label_flips, world.flips)
    path = target / "preferences" / "preferences.jsonl"
    write_jsonl(path, read_jsonl(path) + new)
    seal(target / "preferences")
    run_to(pipeline, "baselines", redo=True)
    shutil.copy(source / "held_out.jsonl", target / "held_out.jsonl")
