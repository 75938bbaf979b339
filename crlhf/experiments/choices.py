"""The choices of the method: how many baselines, sampled how, scaled how."""

import shutil
import statistics
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..baselines import load_baselines
from ..evaluate import mean_interval
from ..runs import read_jsonl
from . import drawing
from .harness import (SEEDS, Variant, copy_base, curves, default, difference, methods_of, prepare_bases, read_json,
                      results, run_variants, settings_of, table, values, write_csv)

KS = (1, 2, 4, 8, 16)
SAMPLING = {"T 0.5": (0.5, 1.0), "T 1": (1.0, 1.0), "T 1.3": (1.3, 1.0), "p 0.8": (1.0, 0.8),
            "T 0.7, p 0.9": (0.7, 0.9)}
REWARD_SCALES = (0.1, 1.0, 10.0)


def samples(root, figures, seeds=SEEDS):
    """How many offline samples a prompt: does more always help, and what do they cost?

    Prediction: the noise that the baseline adds is E[s_ref^2]/k, so going from 1 to 4 removes three quarters of it
    and going from 4 to 16 most of a small rest. Gold should rise a little up to k = 4 and then stay, while the cost
    grows in proportion to k.
    """
    variants = {(f"k={k}", "contrastive"): Variant("contrastive", {"baselines.k": k}) for k in KS}
    runs = run_variants(root, variants | {("none", "ppo"): Variant("ppo")}, seeds, "samples")
    rows, steps = results(runs), curves(runs, ("gold",))
    half_way = statistics.fmean(values(rows, "none", "ppo")) / 2 + start_of(steps) / 2
    for row in rows:
        out = runs[(row["setting"], row["method"]), row["seed"]]
        report = read_json(out / "baselines" / "variance.json")
        row["baseline_seconds"] = report["seconds"] if row["method"] == "contrastive" else 0.0
        row["iterations_to_half"] = first_reach(steps, row, half_way)
    write_csv(figures / "samples.csv", rows)
    drawing.samples(rows, figures / "samples.png")
    lines = [f"\n\nIterations until gold (mean of 5) reaches {half_way:.2f}, half way from SFT to plain PPO's end, and "
             "what the baselines cost:\n", "| samples | iterations | seconds of sampling |", "| --- | --- | --- |"]
    for setting, method in dict.fromkeys((row["setting"], row["method"]) for row in rows):
        reach = "%.1f ± %.1f" % mean_interval(values(rows, setting, method, "iterations_to_half"))
        seconds = statistics.fmean(values(rows, setting, method, "baseline_seconds"))
        lines.append(f"| {setting} | {reach} | {seconds:.1f} |")
    gaps = "; ".join(f"{setting} %+.3f ± %.3f" % difference(rows, setting, "contrastive", reference_setting="none")
                     for setting, _ in variants)
    return table(rows, "samples", "contrastive") + f"\n\nMinus plain PPO, paired: {gaps}" + "\n".join(lines)


def start_of(steps):
    """Mean gold of the first rollouts: the SFT policy's."""
    return statistics.fmean(row["gold"] for row in steps if row["iteration"] == 0)


def first_reach(steps, run, level, window=5):
    """The first iteration whose last five rollouts average at least `level`; the number of iterations if none do."""
    golds = [row["gold"] for row in steps if all(row[key] == run[key] for key in ("setting", "method", "seed"))]
    means = [statistics.fmean(golds[max(0, i + 1 - window):i + 1]) for i in range(len(golds))]
    return next((i for i, mean in enumerate(means) if mean >= level), len(golds))


def sampling(root, figures, seeds=SEEDS):
    """At which temperature and nucleus p should baselines be drawn?

    Prediction: sharper sampling draws likelier, better formed responses, so the baseline lies above the SFT policy's
    mean reward at T = 1 and varies less within a prompt. A shift that were the same for every prompt would change
    nothing; whitening removes it. What matters is how well the baseline follows the prompt, so gold should hardly
    depend on T and p, until T is so high that responses fall apart.
    """
    variants = {(name, "contrastive"): Variant("contrastive", {"baselines.temperature": t, "baselines.top_p": p})
                for name, (t, p) in SAMPLING.items()}
    runs = run_variants(root, variants, seeds, "sampling")
    rows = results(runs)
    true_means = {seed: baseline_table(runs[("T 1", "contrastive"), seed]) for seed in seeds}
    for row in rows:
        out = runs[(row["setting"], row["method"]), row["seed"]]
        means = baseline_table(out)
        shifts = [means[prompt] - true_means[row["seed"]][prompt] for prompt in means]
        report = read_json(out / "baselines" / "variance.json")
        row |= {"bias": statistics.fmean(shifts), "within_prompt_variance": report["within_prompt_variance"],
                "start_variance": statistics.fmean(step["contrastive_variance"] for step in
                                                   read_jsonl(out / "contrastive" / "metrics.jsonl")[:3])}
    write_csv(figures / "sampling.csv", rows)
    drawing.sampling(rows, figures / "sampling.png")
    lines = ["\n\n| baselines | bias of the baseline mean | variance within a prompt | Var(r - b) at the start | "
             "gold minus T 1 |", "| --- | --- | --- | --- | --- |"]
    for setting in SAMPLING:
        cells = ["%+.3f ± %.3f" % mean_interval(values(rows, setting, "contrastive", key))
                 for key in ("bias", "within_prompt_variance", "start_variance")]
        gap = "%+.3f ± %.3f" % difference(rows, setting, "contrastive", "contrastive", reference_setting="T 1")
        lines.append(f"| {setting} | " + " | ".join(cells) + f" | {gap if setting != 'T 1' else ''} |")
    return table(rows, "baselines", "contrastive") + "\n".join(lines)


def baseline_table(out):
    """prompt -> mean reward of its baselines."""
    rows = load_baselines(out / "baselines")
    return {row["prompt"]: statistics.fmean(row["rewards"]) for row in rows}


def scale(root, figures, seeds=SEEDS):
    """Dynamic scaling: what does lambda do, and does it make training stable over the scale of the reward?

    Prediction: whitening removes the size of the advantages, so the reward's scale acts through the KL price alone:
    a reward ten times smaller pays ten times the price in KL. Scaling by the running standard deviation removes that
    for plain and contrastive rewards alike. Lambda by magnitudes keeps the raw reward's scale, so it does not: it
    only makes up for the reward that the baseline took away.
    """
    prepare_bases(root, seeds, [{}])
    for factor in REWARD_SCALES:
        for seed in seeds if factor != 1 else ():
            scaled_base(Path(root) / f"seed{seed}", factor)
    ways = {"ppo": ("ppo", {}),
            "plain, scaled by std": ("contrastive", {"contrastive.coefficient": 0.0, "contrastive.scale": "std"}),
            "contrastive": ("contrastive", {}),
            "contrastive, magnitude": ("contrastive", {"contrastive.scale": "magnitude"}),
            "contrastive, std": ("contrastive", {"contrastive.scale": "std"})}
    bias = default("world.prompt_bias")  # the rater's constant is part of the reward and is scaled with it
    short = {"ppo.iterations": default("ppo.iterations") // 2}  # the question shows early
    variants = {(f"reward x {factor:g}", label): Variant(method, {**knobs, **short, "world.prompt_bias": factor * bias},
                                                         "" if factor == 1 else scaled_name(factor))
                for factor in REWARD_SCALES for label, (method, knobs) in ways.items()
                if factor == 1 or label != "contrastive, magnitude"}  # which keeps the raw reward's scale
    runs = run_variants(root, variants, seeds, "scale")
    rows, steps = results(runs), curves(runs, ("gold", "kl", "scale"))
    write_csv(figures / "scale.csv", rows)
    write_csv(figures / "scale_curves.csv", [row for row in steps if row["scale"] != ""])
    drawing.scale(rows, steps, figures / "scale.png")
    spread = []
    for label in ways:
        means = [statistics.fmean(values(rows, setting, label, "kl")) for setting in settings_of(rows)
                 if label in methods_of(rows, setting)]
        spread.append(f"{label}: {' / '.join(f'{mean:.1f}' for mean in means)}")
    return table(rows, "reward") + "\n\nKL at reward x 0.1 / 1 / 10: " + "; ".join(spread)


def scaled_name(factor):
    return f"base reward x{factor:g}"


def scaled_base(folder, factor):
    """A base whose reward model's scores are all multiplied by a factor."""
    target = folder / scaled_name(factor)
    if (target / "held_out.jsonl").exists():
        return
    copy_base(folder / "base", target)
    weights = load_file(target / "reward" / "model.safetensors")
    weights["score.weight"] *= factor
    save_file(weights, target / "reward" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(folder / "base" / "held_out.jsonl", target / "held_out.jsonl")
