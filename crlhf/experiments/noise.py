"""Noisy raters and noisy reward models: does comparing with baselines withstand them in training?"""

from collections.abc import Sequence
from pathlib import Path

from .harness import STRESS_SEEDS, Variant, results, run_variants, stressed
from .plotting import plot_noise
from .tables import table, write_csv

AXES = {
    "label flips, uniform": {f"flips {rate:g}": {"world.label_flips": rate} for rate in (0.0, 0.2, 0.4)},
    "label flips, by difficulty": {
        "hard flips 0": {"world.label_flips": 0.0},
        "hard flips 0.4": {"world.label_flips": 0.4, "world.flips": "difficulty"},
    },
    "rater bias per prompt (sd)": {f"bias {sd:g}": {"world.prompt_bias": sd} for sd in (0.0, 1.0, 2.0)},
    "noise per response (sd)": {f"noise {sd:g}": {"world.score_noise": sd} for sd in (0.0, 1.0, 2.0)},
}


def noise(root: Path, figures: Path, seeds: Sequence[int] = STRESS_SEEDS) -> str:
    """What does each kind of noise do to plain, contrastive and adaptive PPO?

    Prediction. A constant per prompt (rater bias) is what the contrast removes: plain PPO loses gold as it grows,
    contrastive PPO loses nothing. Wrong labels change the reward model itself, in how it ranks responses to one
    prompt; a baseline can't repair a ranking, so all methods lose alike. Noise on each response averages out over
    responses but not within one; the baselines carry it too, so contrastive rewards have (1 + 1/k) times its
    variance: a slight loss.
    """
    axis_of, variants = {}, {}
    for axis, points in AXES.items():
        for setting, knobs in points.items():
            axis_of[setting] = axis
            for method in ("ppo", "contrastive", "adaptive"):
                variants[setting, method] = Variant(method, knobs)
    rows = results(run_variants(root, stressed(variants), seeds, "noise"))
    rows = [{"axis": axis_of[row["setting"]], **row} for row in rows]
    write_csv(figures / "noise.csv", rows)
    plot_noise(rows, figures / "noise.png")
    return table(rows, "raters")
