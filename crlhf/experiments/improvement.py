"""Does contrastive PPO do better, and by how much: at the defaults, and at equal distance from the SFT policy."""

import statistics

from ..evaluate import column, mean_interval
from ..evaluate import compare as compare_scores
from ..runs import read_jsonl
from . import drawing
from .harness import SEEDS, Variant, curves, default, results, run_variants, table, values, write_csv
from .sweep import tuned

METHODS = ("ppo", "contrastive", "adaptive")
MORE_SEEDS = tuple(range(16))  # for the main comparison: eight left its intervals as wide as its differences
KL_COEFS = (0.01, 0.02, default("ppo.kl_coef"), 0.1)
BETAS = (0.01, default("dpo.beta"), 0.1, 0.3)
TARGETS = (2.0, 3.0, 4.0)  # nats


def compare(root, figures, seeds=MORE_SEEDS):
    """Does contrastive PPO beat plain PPO in true reward, without and with a rater bias per prompt?

    Prediction: a constant per prompt doesn't change the optimum, so all PPO methods approach the same gold score.
    Without bias plain PPO has little to lose and contrastive PPO gains little. With a bias of standard deviation
    1 plain PPO learns from a reward most of whose variance is useless, and should be slower; contrastive PPO
    should not notice the bias at all. DPO sees the same preferences without a reward model or a bias. The last
    setting gives every method the learning rate and KL price that were best for it in `sweep`, with a bias of 1.
    """
    variants = {(f"rater bias {bias:g}", method): Variant(method, {"world.prompt_bias": bias})
                for bias in (0.0, 1.0) for method in METHODS}
    variants |= {("each at its best", method): Variant(method, tuned(figures, method))
                 for method in (*METHODS, "dpo")}
    runs = run_variants(root, variants, seeds, "compare")
    rows = results(runs)
    steps = curves({key: out for key, out in runs.items() if key[0][1] != "dpo"}, ("gold", "reward", "kl"))
    write_csv(figures / "compare.csv", rows)
    write_csv(figures / "compare_curves.csv", steps)
    drawing.compare(steps, rows, figures / "compare.png")
    early = [early_difference(steps, setting, method) for setting in dict.fromkeys(row["setting"] for row in steps)
             for method in ("contrastive", "adaptive")]
    return table(rows, "raters") + "\n\nGold over the first ten iterations, minus plain PPO: " + "; ".join(early)


def early_difference(steps, setting, method):
    """How much faster: mean gold of the first ten iterations, paired difference to plain PPO."""
    first = lambda name, seed: statistics.fmean(row["gold"] for row in steps if row["iteration"] < 10 and
                                                (row["setting"], row["method"], row["seed"]) == (setting, name, seed))
    seeds = sorted({row["seed"] for row in steps})
    gap, half = mean_interval([first(method, seed) - first("ppo", seed) for seed in seeds])
    return f"{setting}, {method} {gap:+.3f} ± {half:.3f}"


def frontier(root, figures, seeds=SEEDS):
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
    matched = [{"target_kl": target, "method": method, "seed": seed, "gold": gold_at(rows, method, seed, target)}
               for target in TARGETS for method in (*METHODS, "dpo") for seed in seeds]
    write_csv(figures / "frontier_matched.csv", matched)
    drawing.frontier(rows, gains, figures / "frontier.png")
    return table(rows, "price of KL") + "\n\n" + matched_table(matched) + "\n\n" + duels(runs, rows)


def gold_at(rows, method, seed, target):
    """Gold of one seed's frontier at a KL, by linear interpolation between its two nearest settings; '' outside."""
    points = sorted((row["kl"], row["gold"]) for row in rows if (row["method"], row["seed"]) == (method, seed))
    for (kl, gold), (next_kl, next_gold) in zip(points, points[1:]):
        if kl <= target <= next_kl:
            return gold + (next_gold - gold) * (target - kl) / max(next_kl - kl, 1e-9)
    return ""


def matched_table(matched):
    """Differences to plain PPO at one KL, paired over the seeds whose frontiers reach it."""
    lines = ["| KL (nats) | method | gold | minus plain PPO (paired) | seeds |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        at = {(row["method"], row["seed"]): row["gold"] for row in matched if row["target_kl"] == target}
        for method in dict.fromkeys(row["method"] for row in matched):
            both = [seed for (name, seed), gold in at.items()
                    if name == method and gold != "" and at["ppo", seed] != ""]
            if len(both) > 1:
                gap = "%+.3f ± %.3f" % mean_interval([at[method, seed] - at["ppo", seed] for seed in both])
                gold = "%.3f ± %.3f" % mean_interval([at[method, seed] for seed in both])
                lines.append(f"| {target:g} | {method} | {gold} | {gap if method != 'ppo' else ''} | {len(both)} |")
    return "\n".join(lines)


def nearest(rows, method, target):
    """The setting of a method whose mean KL is nearest to a target."""
    settings = dict.fromkeys(row["setting"] for row in rows if row["method"] == method)
    return min(settings, key=lambda setting: abs(statistics.fmean(values(rows, setting, method, "kl")) - target))


def improvements(runs, rows):
    """Per prompt: mean gold of a policy's responses minus mean gold of the SFT policy's, each at about one KL."""
    target = statistics.fmean(values(rows, f"kl {default('ppo.kl_coef'):g}", "contrastive", "kl"))
    gains = []
    for method in (*METHODS, "dpo"):
        setting = nearest(rows, method, target)
        for ((name, label), seed), out in runs.items():
            if (name, label) == (setting, method):
                sft, own = (by_prompt(folder / "held_out.jsonl") for folder in (out.parent / "base", out))
                gains += [{"method": method, "setting": setting, "seed": seed, "gain": own[prompt] - sft[prompt]}
                          for prompt in own]
    return gains


def by_prompt(path):
    """Mean gold of each held-out prompt."""
    golds = {}
    for row in read_jsonl(path):
        golds.setdefault(row["prompt"], []).append(row["gold"])
    return {prompt: statistics.fmean(scores) for prompt, scores in golds.items()}


def duels(runs, rows):
    """Contrastive PPO against every other method on the same prompts, each at the setting nearest to its KL."""
    mine = f"kl {default('ppo.kl_coef'):g}"
    target = statistics.fmean(values(rows, mine, "contrastive", "kl"))
    lines = ["| contrastive PPO against | their KL | win | tie | loss |", "| --- | --- | --- | --- | --- |"]
    for method in ("ppo", "adaptive", "dpo"):
        setting, shares = nearest(rows, method, target), []
        for seed in sorted({seed for _, seed in runs}):
            own, theirs = (column(read_jsonl(runs[key, seed] / "held_out.jsonl"), "gold")
                           for key in ((mine, "contrastive"), (setting, method)))
            shares.append(compare_scores(own, theirs))
        kl = statistics.fmean(values(rows, setting, method, "kl"))
        cells = ["%.0f ± %.0f%%" % tuple(100 * x for x in mean_interval([share[name] for share in shares]))
                 for name in ("win", "tie", "loss")]
        lines.append(f"| {method} ({setting}) | {kl:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
