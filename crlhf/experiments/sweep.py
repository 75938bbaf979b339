"""The same tuning effort for every method: learning rate and KL price, on seeds that no other experiment uses."""

from . import drawing
from .harness import Variant, results, run_variants, table, write_csv

TUNING_SEEDS = (100, 101, 102, 103)
RATES, KL_COEFS = (5e-4, 1e-3, 2e-3), (0.01, 0.02, 0.05)
DPO_RATES, BETAS = (3e-4, 1e-3, 3e-3), (0.03, 0.1, 0.3)


def sweep(root, figures, seeds=TUNING_SEEDS):
    """Which learning rate and KL price suit each method?

    Prediction: the same for plain and contrastive PPO. Advantages are whitened, so the size of the step doesn't
    depend on what was subtracted, and a constant per prompt doesn't change which KL price is best. DPO's beta is
    the same price in another place, and its best learning rate is its own.
    """
    variants = {(f"lr {lr:g}, kl {kl:g}", method):
                Variant(method, {"ppo.lr": lr, "ppo.critic_lr": lr, "ppo.kl_coef": kl})
                for lr in RATES for kl in KL_COEFS for method in ("ppo", "contrastive")}
    variants |= {(f"lr {lr:g}, beta {beta:g}", "dpo"): Variant("dpo", {"dpo.lr": lr, "dpo.beta": beta})
                 for lr in DPO_RATES for beta in BETAS}
    rows = results(run_variants(root, variants, seeds, "sweep"))
    write_csv(figures / "sweep.csv", rows)
    drawing.sweep(rows, figures / "sweep.png")
    return table(rows, "setting")
