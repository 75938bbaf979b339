"""The same tuning effort for every method: learning rate and KL price, on seeds that no other experiment uses."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from ..config import UserError
from .harness import Label, Variant, results, run_variants
from .plotting import plot_sweep
from .tables import read_csv, table, write_csv

TUNING_SEEDS = tuple(range(100, 108))
METHODS = ("ppo", "contrastive", "adaptive")
RATES, KL_COEFS = (5e-4, 1e-3, 2e-3), (0.01, 0.02, 0.05)
DPO_RATES, BETAS = (3e-4, 1e-3, 3e-3), (0.03, 0.1, 0.3)


def sweep(root: Path, figures: Path, seeds: Sequence[int] = TUNING_SEEDS) -> str:
    """Which learning rate and KL price suit each method?

    Prediction: the same for plain, contrastive and adaptive PPO. Advantages are whitened, so the size of the step
    doesn't depend on what was subtracted, and a constant per prompt doesn't change which KL price is best. DPO's beta
    is the same price in another place, and its best learning rate is its own.
    """
    rows = results(run_variants(root, sweep_variants(), seeds, "sweep"))
    write_csv(figures / "sweep.csv", rows)
    plot_sweep(rows, figures / "sweep.png")
    return table(rows, "setting")


def sweep_variants() -> dict[Label, Variant]:
    """Every method with every pair of its learning rates and prices."""
    variants = {}
    for lr in RATES:
        for kl_coef in KL_COEFS:
            settings = {"ppo.lr": lr, "ppo.critic_lr": lr, "ppo.kl_coef": kl_coef}
            for method in METHODS:
                variants[f"lr {lr:g}, kl {kl_coef:g}", method] = Variant(method, settings)
    for lr in DPO_RATES:
        for beta in BETAS:
            variants[f"lr {lr:g}, beta {beta:g}", "dpo"] = Variant("dpo", {"dpo.lr": lr, "dpo.beta": beta})
    return variants


def tuned(figures: Path, method: str) -> dict[str, float]:
    """The settings of the sweep at which a method had the highest mean gold."""
    golds = {}
    for row in read_csv(figures / "sweep.csv"):
        if row["method"] == method:
            golds.setdefault(row["setting"], []).append(float(row["gold"]))
    best = max(golds, key=lambda setting: statistics.fmean(golds[setting]))
    variants = sweep_variants()
    if (best, method) not in variants:
        mend = "run 'python -m crlhf experiment sweep' again"
        raise UserError(f"{figures / 'sweep.csv'} holds '{best}', which is no setting of the sweep: {mend}")
    return variants[best, method].settings
