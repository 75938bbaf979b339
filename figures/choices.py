"""The choices of the method: how many baselines, and scaled how."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from crlhf.engine.files import read_json
from crlhf.pipeline.folder import seal

from .contenders import at
from .harness import SEEDS, Variant, copy_base, curves, default, is_finished, prepare_bases, results, run_variants
from .plotting import plot_samples, plot_scale
from .tables import gains_table, interval, markdown, methods_of, read_rows, settings_of, table, write_csv

KS = (1, 4, 16)
CONSTANTS = (0.0, 0.5, 1.0)
REWARD_SCALES = (0.1, 1.0, 10.0)
WAYS = {
    "ppo": Variant("ppo"),
    "plain, scaled by std": Variant("contrastive", {"contrastive.coefficient": 0.0, "contrastive.scale": "std"}),
    "contrastive": Variant("contrastive"),
    "contrastive, magnitude": Variant("contrastive", {"contrastive.scale": "magnitude"}),
    "contrastive, std": Variant("contrastive", {"contrastive.scale": "std"}),
}


def samples(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
    """How many offline samples a prompt, at which rho, and what do they cost?

    Endpoints: mean true reward over all iterations; held-out true reward at the end. Twelve seeds; Holm's correction
    over each table.

    Prediction. Break-even is rho = 1 / (k + 1). Without a constant (rho about 0.1) one sample nearly doubles the
    variance, and c = 1 is below plain PPO over the whole run by 0.03 or more; four cost less; sixteen are level, within
    0.02. With a constant of sd 1 even one sample gains, by 0.03 or more, and sixteen gain no more than 0.02 over four.
    Adaptive PPO is within 0.02 of the better of plain and contrastive PPO at every k.
    """
    variants = {}
    for sd in CONSTANTS:
        constant = {"world.prompt_bias": sd}
        for k in KS:
            setting = f"sd {sd:g}, k = {k}"
            variants[setting, "ppo"] = at("ppo", constant)
            variants[setting, "contrastive"] = at("contrastive", {"baselines.k": k})  # a constant cancels
            variants[setting, "adaptive"] = at("adaptive", {"baselines.k": k, **constant})
    runs = run_variants(root, variants, seeds, "samples")
    rows = results(runs)
    for row in rows:
        out = runs[(row["setting"], row["method"]), row["seed"]]
        row["baseline_seconds"] = read_json(out / "baselines" / "variance.json")["seconds"]
    write_csv(figures / "samples.csv", rows)
    plot_samples(rows, figures / "samples.png")
    return samples_report(figures)


def samples_report(figures: Path) -> str:
    rows = read_rows(figures / "samples.csv")
    parts = [table(rows, "constant, samples")]
    for key, name in (("mean_gold", "Gold over all iterations"), ("gold", "Held-out gold at the end")):
        gains = gains_table(rows, ("contrastive", "adaptive"), key, "constant, samples")
        parts.append(f"{name}, minus plain PPO:\n\n{gains}")
    lines = []
    for k in KS:
        law = [f"{interval(rows, f'sd 0, k = {k}', 'adaptive', key)[0]:.2f}" for key in ("ratio_start", "coefficient")]
        lines.append([str(k), *law, f"{interval(rows, f'sd 0, k = {k}', 'contrastive', 'baseline_seconds')[0]:.1f}"])
    head = ["k", "adaptive: Var(r - c b) / Var(r) at the start", "its coefficient", "seconds of sampling"]
    return "\n\n".join([*parts, "Without a constant:\n\n" + markdown(head, lines)])


def scale(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:4]) -> str:
    """Dynamic scaling: what does alpha do, and does it make training stable over the scale of the reward?

    Endpoint: KL from SFT at the end of 30 iterations, for rewards a tenth and ten times their size. Four seeds, as what
    is looked for is large.

    Prediction: whitening removes the size of the advantages, so the reward's scale acts through the KL price alone:
    a reward ten times smaller pays ten times the price in KL. Scaling by the running standard deviation removes that
    for plain and contrastive rewards alike. Scaling by magnitudes keeps the raw reward's scale, so it does not: it
    only makes up for the reward that the baseline took away.
    """
    prepare_bases(root, seeds, [{}])
    variants = {}
    for factor in REWARD_SCALES:
        base = ""
        if factor != 1:
            base = scaled_name(factor)
            for seed in seeds:
                scaled_base(root / f"seed{seed}", factor)
        for label, way in WAYS.items():
            if factor == 1 or label != "contrastive, magnitude":  # which keeps the raw reward's scale
                settings = {**way.settings, "ppo.iterations": default("ppo.iterations") // 2}
                variants[f"reward x {factor:g}", label] = Variant(way.method, settings, base)
    runs = run_variants(root, variants, seeds, "scale")
    rows = results(runs)
    write_csv(figures / "scale.csv", rows)
    write_csv(figures / "scale_curves.csv", [row for row in curves(runs, ("scale",)) if row["scale"] != ""])
    plot_scale(rows, read_rows(figures / "scale_curves.csv"), figures / "scale.png")
    return scale_report(figures)


def scale_report(figures: Path) -> str:
    rows, lines = read_rows(figures / "scale.csv"), []
    for method in WAYS:
        settings = [name for name in settings_of(rows) if method in methods_of(rows, name)]
        kls = {name: f"{interval(rows, name, method, 'kl')[0]:.1f}" for name in settings}
        lines.append([method, *(kls.get(name, "") for name in settings_of(rows))])
    return table(rows, "reward") + "\n\nKL at the end:\n\n" + markdown(["method", *settings_of(rows)], lines)


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
