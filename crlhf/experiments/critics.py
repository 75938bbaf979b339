"""What else changes the part that contrastive rewards play: when baselines are drawn, and what the critic knows."""

import itertools
import statistics

from ..baselines import load_baselines
from ..config import Config
from ..evaluate import mean_interval
from ..ppo import prompt_order
from . import drawing
from .harness import SEEDS, Variant, configured, curves, read_json, results, run_variants, table, values, write_csv

SECONDS = 5  # what every method gets when `online` compares at equal wall time
CRITICS = ("reward_model", "zero_head", "shared", "none")


def online(root, figures, seeds=SEEDS):
    """Offline baselines, refreshed ones, or groups of responses compared with each other?

    Prediction: offline baselines are the cheapest and go stale; baselines drawn from the current policy never do,
    and cost k generations a prompt in every step. With a critic that learns, staleness should cost little. At an
    equal number of generated responses fresh baselines leave far fewer steps, and should lose. Groups get their
    baselines from the rollout itself, but see a quarter of the prompts; they should be about as good.
    """
    ppo, k = Config().ppo, Config().baselines.k
    budget = ppo.iterations * ppo.batch_size + Config().world.train_prompts * k  # responses of the offline method
    group = {"ppo.group_size": 4, "contrastive.source": "group"}
    variants = {
        ("same steps", "plain"): Variant("ppo"), ("same steps", "offline"): Variant("contrastive"),
        ("same steps", "refreshed every 20"): Variant("contrastive", {"contrastive.refresh": 20}),
        ("same steps", "groups of 4"): Variant("contrastive", group),
        ("same steps", "offline, no critic"): Variant("contrastive", {"ppo.critic": "none"}),
        ("same steps", "groups of 4, no critic"): Variant("contrastive", {**group, "ppo.critic": "none"}),
        ("same responses", "offline"): Variant("contrastive"),
        ("same responses", "fresh every step"):
            Variant("contrastive", {"contrastive.refresh": 1, "ppo.iterations": budget // (ppo.batch_size * (1 + k))}),
        ("same responses", "groups of 4"):
            Variant("contrastive", {**group, "ppo.iterations": budget // ppo.batch_size})}
    runs = run_variants(root, variants, seeds, "online")
    rows = results(runs)
    steps = curves(runs, ("gold", "kl", "seconds_rollout", "seconds_scoring", "seconds_update"))
    for row in rows:
        key = (row["setting"], row["method"])
        out, variant = runs[key, row["seed"]], variants[key]
        mine = [step for step in steps if all(step[name] == row[name] for name in ("setting", "method", "seed"))]
        offline_responses, offline_seconds = offline_cost(out, variant)
        row["responses"] = offline_responses + ppo.batch_size * len(mine) + refreshed_responses(variant, len(mine))
        spent = list(itertools.accumulate((sum(step[f"seconds_{phase}"] for phase in ("rollout", "scoring", "update"))
                                           for step in mine), initial=offline_seconds))[1:]
        row["training_seconds"] = spent[-1]
        row["gold_in_time"] = recent_gold(mine, spent, SECONDS)
    write_csv(figures / "online.csv", rows)
    kept = ("setting", "method", "seed", "iteration", "gold", "kl")
    write_csv(figures / "online_curves.csv", [{key: row[key] for key in kept} for row in steps])
    drawing.online(rows, steps, figures / "online.png")
    lines = [f"\n\n| setting | baselines | responses generated | seconds of training | gold after {SECONDS} s |",
             "| --- | --- | --- | --- | --- |"]
    for setting, method in variants:
        seconds = "%.1f ± %.1f" % mean_interval(values(rows, setting, method, "training_seconds"))
        responses = statistics.fmean(values(rows, setting, method, "responses"))
        in_time = "%.3f ± %.3f" % mean_interval(values(rows, setting, method, "gold_in_time"))
        lines.append(f"| {setting} | {method} | {responses:.0f} | {seconds} | {in_time} |")
    return table(rows, "at", "offline") + "\n".join(lines)


def recent_gold(steps, spent, seconds, window=5):
    """Mean gold of the last five rollouts within a time, offline sampling included; of the first if there is none."""
    done = max(sum(moment <= seconds for moment in spent), 1)
    return statistics.fmean(step["gold"] for step in steps[max(0, done - window):done])


def offline_cost(out, variant):
    """(responses, seconds) of the baselines that were drawn before training."""
    if variant.method == "ppo" or variant.settings.get("contrastive.source") == "group":
        return 0, 0.0
    report = read_json(out / "baselines" / "variance.json")
    return report["k"] * len(load_baselines(out / "baselines")), report["seconds"]


def refreshed_responses(variant, iterations):
    """Responses drawn for new baselines during training: k for every prompt that comes until the next refresh."""
    config = configured("", 0, variant.method, variant.settings)
    every, c = config.contrastive.refresh, config.ppo
    some = [len(prompt_order(config.world.train_prompts, c, range(first, min(first + every, iterations)), 0))
            for first in range(every, iterations, every)] if every else []
    return config.baselines.k * sum(some)


def critic(root, figures, seeds=SEEDS):
    """With which critic do contrastive rewards matter most?

    Prediction: a critic that follows the reward absorbs a constant per prompt by itself (GAE(r - b, V - b) is
    GAE(r, V)), so the worse the critic the more contrastive rewards help: most without one (REINFORCE), where the
    variance of the reward is the variance of the advantage; least with one that starts as the reward model. That one
    in turn starts from the wrong target under contrastive rewards: it predicts r and not r - b.
    """
    variants = {(kind, method): Variant(method, {"ppo.critic": kind})
                for kind in CRITICS for method in ("ppo", "contrastive", "adaptive")}
    runs = run_variants(root, variants, seeds, "critic")
    rows, steps = results(runs), curves(runs, ("gold", "kl", "explained_variance", "advantage_std"))
    write_csv(figures / "critic.csv", rows)
    write_csv(figures / "critic_curves.csv", steps)
    drawing.critic(rows, steps, figures / "critic.png")
    lines = ["\n\n| critic | method | explained variance, iterations 0-9 | 20-59 |", "| --- | --- | --- | --- |"]
    for kind, method in variants:
        if kind != "none":
            parts = [mean_over(steps, kind, method, "explained_variance", *part) for part in ((0, 10), (20, 60))]
            lines.append(f"| {kind} | {method} | {parts[0]} | {parts[1]} |")
    return table(rows, "critic") + "\n".join(lines)


def mean_over(steps, setting, method, key, first, last):
    """'mean ± half' over seeds of a metric's mean over some iterations."""
    by_seed = {}
    for row in steps:
        if (row["setting"], row["method"]) == (setting, method) and first <= row["iteration"] < last:
            by_seed.setdefault(row["seed"], []).append(row[key])
    return "%.2f ± %.2f" % mean_interval([statistics.fmean(part) for part in by_seed.values()])
