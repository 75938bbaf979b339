"""The choices of the method: how many baselines, sampled how, scaled how."""

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from ..engine.files import read_json, read_jsonl
from ..pipeline.folder import seal
from .harness import (
    STRESS_SEEDS,
    Variant,
    copy_base,
    curves,
    default,
    is_finished,
    prepare_bases,
    results,
    run_variants,
    stressed,
)
from .plotting import plot_samples, plot_sampling, plot_scale
from .tables import (
    difference,
    interval,
    labels_of,
    markdown,
    methods_of,
    plus_minus,
    select,
    settings_of,
    table,
    values,
    write_csv,
)

KS = (1, 2, 4, 8, 16)
SAMPLING = {
    "T 0.5": (0.5, 1.0),
    "T 1": (1.0, 1.0),
    "T 1.3": (1.3, 1.0),
    "p 0.8": (1.0, 0.8),
    "T 0.7, p 0.9": (0.7, 0.9),
}
REWARD_SCALES = (0.1, 1.0, 10.0)


def samples(root: Path, figures: Path, seeds: Sequence[int] = STRESS_SEEDS) -> str:
    """How many offline samples a prompt: does more always help, and what do they cost?

    Prediction: the noise that the baseline adds is E[s_ref^2]/k, so going from 1 to 4 removes three quarters of it
    and going from 4 to 16 most of a small rest. Gold should rise a little up to k = 4 and then stay, while the cost
    grows in proportion to k.
    """
    variants = {(f"k={k}", "contrastive"): Variant("contrastive", {"baselines.k": k}) for k in KS}
    variants["none", "ppo"] = Variant("ppo")
    runs = run_variants(root, stressed(variants), seeds, "samples")
    rows, steps = results(runs), curves(runs, ("gold",))
    half_way = statistics.fmean(values(rows, "none", "ppo")) / 2 + start_of(steps) / 2
    for row in rows:
        out = runs[(row["setting"], row["method"]), row["seed"]]
        report = read_json(out / "baselines" / "variance.json")
        row["baseline_seconds"] = report["seconds"] if row["method"] == "contrastive" else 0.0
        row["iterations_to_half"] = first_reach(steps, row, half_way)
    write_csv(figures / "samples.csv", rows)
    plot_samples(rows, figures / "samples.png")
    lines = []
    for setting, method in labels_of(rows):
        reach = plus_minus(interval(rows, setting, method, "iterations_to_half"), 1)
        lines.append([setting, reach, f"{interval(rows, setting, method, 'baseline_seconds')[0]:.1f}"])
    gaps = [(f"k={k}", difference(rows, f"k={k}", "contrastive", reference_setting="none")) for k in KS]
    return "\n\n".join(
        [
            table(rows, "samples", "contrastive"),
            "Minus plain PPO, paired: " + "; ".join(f"{setting} {plus_minus(gap, 3, '+')}" for setting, gap in gaps),
            f"Iterations until gold (mean of 5) reaches {half_way:.2f}, half way from SFT to plain PPO's end, and "
            "what the baselines cost:",
            markdown(["samples", "iterations", "seconds of sampling"], lines),
        ]
    )


def start_of(steps: list[dict]) -> float:
    """Mean gold of the first rollouts: the SFT policy's."""
    return statistics.fmean(row["gold"] for row in select(steps, iteration=0))


def first_reach(steps: list[dict], run: dict, level: float, window: int = 5) -> int:
    """The first iteration whose last five rollouts average at least `level`; the number of iterations if none do."""
    golds = [row["gold"] for row in select(steps, setting=run["setting"], method=run["method"], seed=run["seed"])]
    for i in range(len(golds)):
        if statistics.fmean(golds[max(0, i + 1 - window) : i + 1]) >= level:
            return i
    return len(golds)


def sampling(root: Path, figures: Path, seeds: Sequence[int] = STRESS_SEEDS) -> str:
    """At which temperature and nucleus p should baselines be drawn?

    Prediction: sharper sampling draws likelier, better formed responses, so the baseline lies above the SFT policy's
    mean reward at T = 1 and varies less within a prompt. A shift that were the same for every prompt would change
    nothing; whitening removes it. What matters is how well the baseline follows the prompt, so gold should hardly
    depend on T and p, until T is so high that responses fall apart.
    """
    variants = {}
    for name, (temperature, top_p) in SAMPLING.items():
        settings = {"baselines.temperature": temperature, "baselines.top_p": top_p}
        variants[name, "contrastive"] = Variant("contrastive", settings)
    runs = run_variants(root, stressed(variants), seeds, "sampling")
    rows = results(runs)
    true_means = {seed: baseline_means(runs[("T 1", "contrastive"), seed]) for seed in seeds}
    for row in rows:
        out = runs[(row["setting"], row["method"]), row["seed"]]
        means, first_steps = baseline_means(out), read_jsonl(out / "contrastive" / "metrics.jsonl")[:3]
        row["bias"] = statistics.fmean(means[prompt] - true_means[row["seed"]][prompt] for prompt in means)
        row["within_prompt_variance"] = read_json(out / "baselines" / "variance.json")["within"]
        row["start_variance"] = statistics.fmean(step["contrastive_variance"] for step in first_steps)
    write_csv(figures / "sampling.csv", rows)
    plot_sampling(rows, figures / "sampling.png")
    lines = []
    for setting in SAMPLING:
        names = ("bias", "within_prompt_variance", "start_variance")
        cells = [plus_minus(interval(rows, setting, "contrastive", name), 3, "+") for name in names]
        gap = difference(rows, setting, "contrastive", "contrastive", reference_setting="T 1")
        lines.append([setting, *cells, plus_minus(gap, 3, "+") if setting != "T 1" else ""])
    head = ["baselines", "bias of the baseline mean", "variance within a prompt", "Var(r - b) at the start"]
    return table(rows, "baselines", "contrastive") + "\n\n" + markdown([*head, "gold minus T 1"], lines)


def baseline_means(out: Path) -> dict[str, float]:
    """prompt -> mean reward of its baselines."""
    rows = read_jsonl(out / "baselines" / "baselines.jsonl")
    return {row["prompt"]: statistics.fmean(row["rewards"]) for row in rows}


def scale(root: Path, figures: Path, seeds: Sequence[int] = STRESS_SEEDS) -> str:
    """Dynamic scaling: what does lambda do, and does it make training stable over the scale of the reward?

    Prediction: whitening removes the size of the advantages, so the reward's scale acts through the KL price alone:
    a reward ten times smaller pays ten times the price in KL. Scaling by the running standard deviation removes that
    for plain and contrastive rewards alike. Lambda by magnitudes keeps the raw reward's scale, so it does not: it
    only makes up for the reward that the baseline took away.
    """
    prepare_bases(root, seeds, [{}])
    ways = {
        "ppo": ("ppo", {}),
        "plain, scaled by std": ("contrastive", {"contrastive.coefficient": 0.0, "contrastive.scale": "std"}),
        "contrastive": ("contrastive", {}),
        "contrastive, magnitude": ("contrastive", {"contrastive.scale": "magnitude"}),
        "contrastive, std": ("contrastive", {"contrastive.scale": "std"}),
    }
    variants = {}
    for factor in REWARD_SCALES:
        base = ""
        if factor != 1:
            base = scaled_name(factor)
            for seed in seeds:
                scaled_base(root / f"seed{seed}", factor)
        # the rater's constant is part of the reward and is scaled with it; the question shows early
        common = {"ppo.iterations": default("ppo.iterations") // 2}
        common["world.prompt_bias"] = factor
        for label, (method, knobs) in ways.items():
            if factor == 1 or label != "contrastive, magnitude":  # which keeps the raw reward's scale
                variants[f"reward x {factor:g}", label] = Variant(method, knobs | common, base)
    runs = run_variants(root, stressed(variants), seeds, "scale")
    rows, steps = results(runs), curves(runs, ("gold", "kl", "scale"))
    write_csv(figures / "scale.csv", rows)
    write_csv(figures / "scale_curves.csv", [row for row in steps if row["scale"] != ""])
    plot_scale(rows, steps, figures / "scale.png")
    spread = []
    for label in ways:
        settings = [setting for setting in settings_of(rows) if label in methods_of(rows, setting)]
        spread.append(f"{label}: " + " / ".join(f"{interval(rows, name, label, 'kl')[0]:.1f}" for name in settings))
    return table(rows, "reward") + "\n\nKL at reward x 0.1 / 1 / 10: " + "; ".join(spread)


def scaled_name(factor: float) -> str:
    return f"base reward x{factor:g}"


def scaled_base(folder: Path, factor: float) -> None:
    """A base whose reward model's scores are all multiplied by a factor."""
    target = folder / scaled_name(factor)
    if is_finished(target):
        return
    copy_base(folder / "base", target)
    weights = load_file(target / "reward" / "model.safetensors")
    weights["score.weight"] *= factor
    save_file(weights, target / "reward" / "model.safetensors", metadata={"format": "pt"})
    seal(target / "reward")
    shutil.copy(folder / "base" / "held_out.jsonl", target / "held_out.jsonl")
