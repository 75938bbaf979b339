"""The choices of the method, 2: what a dynamic scale does, and the scale of the reward."""

from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file

from crlhf.pipeline.pipeline import Pipeline

from .bases import UPSTREAM, Change, change_bases
from .contenders import CONTENDERS
from .harness import Study, Variant, curves, results
from .plotting import Figure, describe, finished, panels, plot_bands, plot_intervals
from .runs import default
from .tables import distinct, read_results, results_table

REWARD_SCALES = (0.1, 1.0, 10.0)
WAYS = {
    "ppo": CONTENDERS["ppo"],
    "plain, scaled by std": Variant("contrastive", {"contrastive.coefficient": 0.0, "contrastive.scale": "std"}),
    "contrastive": CONTENDERS["contrastive"],
    "contrastive, magnitude": CONTENDERS["contrastive, magnitude"],
    "contrastive, std": CONTENDERS["contrastive, std"],
}


def scale(study: Study) -> str:
    """Dynamic scaling: what does alpha do, and does it make training stable over the scale of the reward?

    Endpoint: KL from SFT at the end of 30 iterations, for rewards a tenth and ten times their size. Four seeds, as what
    is looked for is large.

    Prediction: whitening removes the size of the advantages, so the reward's scale acts through the KL price alone:
    a reward ten times smaller pays ten times the price in KL. Scaling by the running standard deviation removes that
    for plain and contrastive rewards alike. Scaling by magnitudes keeps the raw reward's scale, so it does not: it
    only makes up for the reward that the baseline took away.
    """
    change_bases(study.root, study.seeds, [scaled(factor) for factor in REWARD_SCALES if factor != 1])
    variants = {}
    for factor in REWARD_SCALES:
        base = scaled(factor).name if factor != 1 else ""
        for label, way in WAYS.items():
            if factor == 1 or label != "contrastive, magnitude":  # which keeps the raw reward's scale
                settings = {**way.settings, "ppo.iterations": default("ppo.iterations") // 2}
                variants[f"reward x {factor:g}", label] = Variant(way.method, settings, base)
    runs = study.run(variants)
    study.write(results(runs))
    study.write([row for row in curves(runs, ("scale",)) if row["scale"] != ""], "_curves")
    return study.answer(scale_report, plot_scale)


def scaled(factor: float) -> Change:
    """A base whose reward model's scores are all multiplied by a factor."""
    return Change(f"base reward x{factor:g}", partial(scale_scores, factor=factor), stages=UPSTREAM[:-1])


def scale_scores(pipeline: Pipeline, factor: float) -> None:
    file = pipeline.path("reward") / "model.safetensors"
    weights = load_file(file)
    weights["score.weight"] *= factor
    save_file(weights, file, metadata={"format": "pt"})


def scale_report(figures: Path) -> str:
    rows = read_results(figures, "scale")
    return results_table(rows, "reward")


def plot_scale(figures: Path) -> Figure:
    """KL and gold over the scale of the reward, and the dynamic scale alpha over time."""
    rows = read_results(figures, "scale")
    figure, (left, middle, right) = panels(1, 3, 13, 4)
    methods = distinct(rows, "method")
    short = [{**row, "setting": row["setting"].removeprefix("reward ")} for row in rows]
    plot_intervals(left, short, methods, "kl", line="")
    describe(left, x="all rewards multiplied by", y="KL from the SFT policy (nats)")
    plot_intervals(middle, short, methods, "gold", line="")
    describe(middle, x="all rewards multiplied by", y="held-out gold at the end")
    plot_bands(right, read_results(figures, "scale_curves"), "reward x 1", "scale", window=1)
    describe(right, x="PPO iteration", y="scale alpha, at reward x 1")
    right.legend(*left.get_legend_handles_labels(), fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return finished(figure)
