"""The same tuning effort for every method: learning rate and KL price, on seeds that no other experiment uses."""

import csv
import statistics

from ..config import UserError
from . import drawing
from .harness import Variant, results, run_variants, table, write_csv

TUNING_SEEDS = tuple(range(100, 108))
METHODS = ("ppo", "contrastive", "adaptive")
RATES, KL_COEFS = (5e-4, 1e-3, 2e-3), (0.01, 0.02, 0.05)
DPO_RATES, BETAS = (3e-4, 1e-3, 3e-3), (0.03, 0.1, 0.3)


def sweep(root, figures, seeds=TUNING_SEEDS):
    """Which learning rate and KL price suit each method?

    Prediction: the same for plain, contrastive and adaptive PPO. Advantages are whitened, so the size of the step doesn't
    depend on what was subtracted, and a constant per prompt doesn't change which KL price is best. DPO's beta is
    the same price in another place, and its best learning rate is its own.
    """
    variants = {(f"lr {lr:g}, kl {kl:g}", method):
                Variant(method, {"ppo.lr": lr, "ppo.critic_lr": lr, "ppo.kl_coef": kl})
                for lr in RATES for kl in KL_COEFS for method in METHODS}
    variants |= {(f"lr {lr:g}, beta {beta:g}", "dpo"): Variant("dpo", {"dpo.lr": lr, "dpo.beta": beta})
                 for lr in DPO_RATES for beta in BETAS}
    rows = results(run_variants(root, variants, seeds, "sweep"))
    write_csv(figures / "sweep.csv", rows)
    drawing.sweep(rows, figures / "sweep.png")
    return table(rows, "setting")


def tuned(figures, method):
    """The settings of the sweep at which a method had the highest mean gold."""
    path = figures / "sweep.csv"
    if not path.exists():
        raise UserError(f"{path} is missing: run 'python -m crlhf experiment sweep' first")
    golds = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["method"] == method:
                golds.setdefault(row["setting"], []).append(float(row["gold"]))
    best = max(golds, key=lambda setting: statistics.fmean(golds[setting]))
    lr, price = (float(part.split(" ")[1]) for part in best.split(", "))
    if method == "dpo":
        return {"dpo.lr": lr, "dpo.beta": price}
    return {"ppo.lr": lr, "ppo.critic_lr": lr, "ppo.kl_coef": price}
