"""Reward hacking: what happens when the policy is pushed on, and when the reward model has a hole."""

import re
import shutil
import statistics
from pathlib import Path

from .. import reviews
from ..baselines import load_baselines, save_baselines
from ..policy import generate
from ..reviews import EXPLOIT
from ..runs import read_jsonl, stream, write_jsonl
from . import drawing
from .harness import (SEEDS, Variant, base_name, configured, copy_base, curves, methods_of, prepare_bases, results,
                      run_jobs, run_variants, settings_of, silent_pipeline, table, values, write_csv)

METHODS = ("ppo", "contrastive")
FOOLED = {"world.fooled": 1.0}
EDITS = {True: "phrase in all baselines", False: "phrase in no baseline"}


def overoptimisation(root, figures, seeds=SEEDS):
    """With no KL price and more steps: when does gold turn down while the reward still rises?

    Prediction: gold rises, then falls behind the reward as the KL grows (Gao et al. 2023). The contrast subtracts a
    constant per prompt, so the errors of the reward model that the policy climbs into stay as they were: contrastive
    rewards should hack as plain ones do.
    """
    variants = {("no KL price", method): Variant(method, {"ppo.kl_coef": 0.0, "ppo.iterations": 100})
                for method in METHODS}
    runs = run_variants(root, variants, seeds, "overoptimisation")
    rows, steps = results(runs), curves(runs, ("gold", "reward", "kl", "ended", "response_length"))
    write_csv(figures / "overoptimisation.csv", rows)
    write_csv(figures / "overoptimisation_curves.csv", steps)
    drawing.overoptimisation(steps, figures / "overoptimisation.png")
    return table(rows, "setting")


def adversary(root, figures, seeds=SEEDS):
    """Raters who fall for a phrase teach the reward model a hole. Does the contrast help, and what mends it?

    Prediction: PPO finds the phrase with every reward. Whether the baselines hold the phrase changes only the
    constant that is subtracted, so baselines that all hold it, or none of which does, change nothing. What helps is
    a reward model retrained on pairs with the policy's own exploits, labelled by raters who don't fall for it; then
    contrastive and plain rewards are mended alike.
    """
    prepare_bases(root, seeds, [FOOLED])
    folders = {seed: Path(root) / f"seed{seed}" for seed in seeds}
    run_jobs([(edited_base, str(folder), seed, with_phrase) for seed, folder in folders.items() for with_phrase in EDITS
              if not (folder / f"base {EDITS[with_phrase]}" / "held_out.jsonl").exists()], "edited baselines")
    fooled = {("fooled raters", method): Variant(method, FOOLED) for method in METHODS}
    fooled |= {("fooled raters", f"contrastive, {EDITS[with_phrase]}"):
               Variant("contrastive", FOOLED, f"base {EDITS[with_phrase]}") for with_phrase in EDITS}
    runs = run_variants(root, fooled, seeds, "fooled raters")
    run_jobs([(retrained_base, str(folder), seed) for seed, folder in folders.items()
              if not (folder / "base retrained" / "held_out.jsonl").exists()], "reward models retrained on exploits")
    again = {("retrained on exploits", method): Variant(method, FOOLED, "base retrained") for method in METHODS}
    honest = {("honest raters", method): Variant(method) for method in METHODS}
    runs = run_variants(root, honest, seeds, "honest raters") | runs | run_variants(root, again, seeds, "retrained")
    rows = results(runs)
    write_csv(figures / "adversary.csv", rows)
    drawing.adversary(rows, figures / "adversary.png")
    shares = [f"{setting}, {method}: {statistics.fmean(values(rows, setting, method, 'exploit')):.0%}"
              for setting in settings_of(rows) for method in methods_of(rows, setting)]
    return table(rows, "raters") + "\n\nResponses with the phrase: " + "; ".join(shares)


def edited_base(folder, seed, with_phrase):
    """In a process of its own: the fooled raters' base with the phrase in every baseline, or in none."""
    source, target = Path(folder) / base_name(FOOLED), Path(folder) / f"base {EDITS[with_phrase]}"
    copy_base(source, target)
    reward = silent_pipeline(configured(target, seed, "contrastive", FOOLED), None).noisy_reward()
    rows = load_baselines(target / "baselines")
    for row in rows:
        row["responses"] = [edited(response, with_phrase) for response in row["responses"]]
        row["rewards"] = reward([row["prompt"]] * len(row["responses"]), row["responses"]).tolist()
    save_baselines(target / "baselines", rows)
    shutil.copy(source / "held_out.jsonl", target / "held_out.jsonl")


def edited(response, with_phrase):
    """Put a sentence with the phrase in front where there is none; or take every such sentence out."""
    if with_phrase:
        return response if EXPLOIT in response else f"{EXPLOIT} camera . {response}"
    kept = [sentence for sentence in re.findall(r"[^.]+\.?", response) if EXPLOIT not in sentence]
    return "".join(kept).strip() or "the camera was decent ."


def retrained_base(folder, seed):
    """In a process of its own: a new reward model from the old pairs and as many with the hacked policy's responses.

    The new pairs hold a response of the SFT policy and one of plain PPO's policy, which exploits the hole. Their
    raters err in the usual share of labels, and don't fall for the phrase.
    """
    folder = Path(folder)
    source, target = folder / base_name(FOOLED), folder / "base retrained"
    hacked = folder / Variant("ppo", FOOLED).name()
    copy_base(source, target, ("data", "sft", "preferences"))
    pipeline = silent_pipeline(configured(target, seed, "contrastive", FOOLED), None)
    world, tokenizer = pipeline.config.world, pipeline.tokenizer()
    prompts = reviews.make_prompts(world.pairs, f"{seed}-exploits", avoid=pipeline.prompts("eval"))
    sides = [generate(model, tokenizer, prompts, pipeline.config.data.max_response_tokens,
                      generator=stream(seed, "exploits", side))[0]
             for side, model in enumerate((pipeline.model("sft"), silent_pipeline(
                 configured(hacked, seed, "ppo", FOOLED), None).model("ppo")))]
    new = reviews.make_preferences(prompts, *sides, f"{seed}-exploits", world.label_flips, world.flips)
    path = target / "preferences" / "preferences.jsonl"
    write_jsonl(path, read_jsonl(path) + new)
    pipeline.run_to("baselines", redo=True)
    shutil.copy(source / "held_out.jsonl", target / "held_out.jsonl")
