"""Does contrastive PPO do better, and by how much: at the defaults, and at equal distance from the SFT policy."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ..engine.files import read_jsonl
from ..evaluate import column, mean_interval
from ..evaluate import compare as compare_scores
from .harness import SEEDS, Folders, Variant, curves, default, results, run_variants
from .plotting import plot_compare, plot_frontier
from .sweep import tuned
from .tables import distinct, interval, markdown, plus_minus, select, settings_of, table, write_csv

METHODS = ("ppo", "contrastive", "adaptive")
MORE_SEEDS = tuple(range(16))  # for the main comparison: eight left its intervals as wide as its differences
KL_COEFS = (0.01, 0.02, default("ppo.kl_coef"), 0.1)
BETAS = (0.01, default("dpo.beta"), 0.1, 0.3)
TARGETS = (2.0, 3.0, 4.0)  # nats


def compare(root: Path, figures: Path, seeds: Sequence[int] = MORE_SEEDS) -> str:
    """Does contrastive PPO beat plain PPO in true reward, without and with a rater bias per prompt?

    Prediction: a constant per prompt doesn't change the optimum, so all PPO methods approach the same gold score.
    Without bias plain PPO has little to lose and contrastive PPO gains little. With a bias of standard deviation
    1 plain PPO learns from a reward most of whose variance is useless, and should be slower; contrastive PPO
    should not notice the bias at all. DPO sees the same preferences without a reward model or a bias. The last
    setting gives every method the learning rate and KL price that were best for it in `sweep`, with a bias of 1.
    """
    variants = {}
    for bias in (0.0, 1.0):
        for method in METHODS:
            variants[f"rater bias {bias:g}", method] = Variant(method, {"world.prompt_bias": bias})
    for method in (*METHODS, "dpo"):
        variants["each at its best", method] = Variant(method, tuned(figures, method))
    runs = run_variants(root, variants, seeds, "compare")
    rows = results(runs)
    steps = curves({key: out for key, out in runs.items() if key[0][1] != "dpo"}, ("gold", "reward", "kl"))
    write_csv(figures / "compare.csv", rows)
    write_csv(figures / "compare_curves.csv", steps)
    plot_compare(steps, rows, figures / "compare.png")
    early = []
    for setting in settings_of(steps):
        for method in ("contrastive", "adaptive"):
            early.append(f"{setting}, {method} {plus_minus(early_difference(steps, setting, method), 3, '+')}")
    return table(rows, "raters") + "\n\nGold over the first ten iterations, minus plain PPO: " + "; ".join(early)


def early_difference(steps: list[dict], setting: str, method: str) -> tuple[float, float]:
    """How much faster: mean gold of the first ten iterations, paired difference to plain PPO."""
    early, gaps = [row for row in steps if row["setting"] == setting and row["iteration"] < 10], []
    for seed in sorted(distinct(steps, "seed")):
        golds = [[row["gold"] for row in select(early, method=name, seed=seed)] for name in (method, "ppo")]
        gaps.append(statistics.fmean(golds[0]) - statistics.fmean(golds[1]))
    return mean_interval(gaps)


def frontier(root: Path, figures: Path, seeds: Sequence[int] = SEEDS) -> str:
    """At an equal distance from the SFT policy, which method has the higher true reward?

    Prediction: the KL-regularised optimum is the same for plain and contrastive rewards, so at one KL they differ
    only by how well they were optimised: small differences, largest under the tightest KL. DPO learns from the
    preferences of SFT responses alone, so it should fall behind PPO where the KL grows.
    """
    variants = {(f"kl {kl:g}", method): Variant(method, {"ppo.kl_coef": kl}) for kl in KL_COEFS for method in METHODS}
    variants |= {(f"beta {beta:g}", "dpo"): Variant("dpo", {"dpo.beta": beta}) for beta in BETAS}
    runs = run_variants(root, variants, seeds, "frontier")
    rows = results(runs)
    write_csv(figures / "frontier.csv", rows)
    gains = improvements(runs, rows)
    write_csv(figures / "frontier_improvement.csv", gains)
    matched = []
    for target in TARGETS:
        for method in (*METHODS, "dpo"):
            for seed in seeds:
                gold = gold_at(rows, method, seed, target)
                matched.append({"target_kl": target, "method": method, "seed": seed, "gold": gold})
    write_csv(figures / "frontier_matched.csv", matched)
    plot_frontier(rows, gains, figures / "frontier.png")
    return "\n\n".join([table(rows, "price of KL"), matched_table(matched), duels(runs, rows)])


def gold_at(rows: list[dict], method: str, seed: int, target: float) -> float | str:
    """Gold of one seed's frontier at a KL, by linear interpolation between its two nearest settings; '' outside."""
    points = sorted((row["kl"], row["gold"]) for row in select(rows, method=method, seed=seed))
    for (kl, gold), (next_kl, next_gold) in pairwise(points):
        if kl <= target <= next_kl:
            return gold + (next_gold - gold) * (target - kl) / max(next_kl - kl, 1e-9)
    return ""


def matched_table(matched: list[dict]) -> str:
    """Differences to plain PPO at one KL, paired over the seeds whose frontiers reach it."""
    lines = []
    for target in TARGETS:
        at = {(row["method"], row["seed"]): row["gold"] for row in select(matched, target_kl=target)}
        for method in distinct(matched, "method"):
            reached = [seed for name, seed in at if name == method and "" not in (at[method, seed], at["ppo", seed])]
            if len(reached) > 1:
                gold = plus_minus(mean_interval([at[method, seed] for seed in reached]), 3)
                gap = mean_interval([at[method, seed] - at["ppo", seed] for seed in reached])
                gap_text = plus_minus(gap, 3, "+") if method != "ppo" else ""
                lines.append([f"{target:g}", method, gold, gap_text, str(len(reached))])
    return markdown(["KL (nats)", "method", "gold", "minus plain PPO (paired)", "seeds"], lines)


def centre(rows: list[dict]) -> tuple[str, float]:
    """The setting of contrastive PPO with the default price, and its mean KL: others are compared there."""
    setting = f"kl {default('ppo.kl_coef'):g}"
    return setting, interval(rows, setting, "contrastive", "kl")[0]


def nearest(rows: list[dict], method: str, target: float) -> str:
    """The setting of a method whose mean KL is nearest to a target."""
    settings = settings_of(select(rows, method=method))
    return min(settings, key=lambda setting: abs(interval(rows, setting, method, "kl")[0] - target))


def improvements(runs: Folders, rows: list[dict]) -> list[dict]:
    """Per prompt: mean gold of a policy's responses minus mean gold of the SFT policy's, each at about one KL."""
    gains, (_, target) = [], centre(rows)
    for method in (*METHODS, "dpo"):
        setting = nearest(rows, method, target)
        for (label, seed), out in runs.items():
            if label == (setting, method):
                sft, own = gold_by_prompt(out.parent / "base"), gold_by_prompt(out)
                place = {"method": method, "setting": setting, "seed": seed}
                gains += [{**place, "gain": own[prompt] - sft[prompt]} for prompt in own]
    return gains


def gold_by_prompt(out: Path) -> dict[str, float]:
    """Mean gold of a run's responses to each held-out prompt."""
    golds = {}
    for row in read_jsonl(out / "held_out.jsonl"):
        golds.setdefault(row["prompt"], []).append(row["gold"])
    return {prompt: statistics.fmean(scores) for prompt, scores in golds.items()}


def duels(runs: Folders, rows: list[dict]) -> str:
    """Contrastive PPO against every other method on the same prompts, each at the setting nearest to its KL."""
    (own_setting, target), lines = centre(rows), []
    for method in ("ppo", "adaptive", "dpo"):
        setting, shares = nearest(rows, method, target), []
        for seed in sorted({seed for _, seed in runs}):
            labels = (own_setting, "contrastive"), (setting, method)
            golds = [column(read_jsonl(runs[label, seed] / "held_out.jsonl"), "gold") for label in labels]
            shares.append(compare_scores(*golds))
        cells = [f"{method} ({setting})", f"{interval(rows, setting, method, 'kl')[0]:.1f}"]
        for name in ("win", "tie", "loss"):
            mean, half = mean_interval([share[name] for share in shares])
            cells.append(f"{100 * mean:.0f} ± {100 * half:.0f}%")
        lines.append(cells)
    return markdown(["contrastive PPO against", "their KL", "win", "tie", "loss"], lines)
