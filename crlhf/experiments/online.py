"""When baselines are drawn: once before training, again and again, or in every step from the rollout itself."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..engine.files import read_json, read_jsonl
from ..engine.training import prompt_order
from .harness import STRESS_SEEDS, Variant, configured, curves, default, results, run_variants, stressed
from .plotting import plot_online
from .tables import interval, markdown, plus_minus, select, table, write_csv

SECONDS = 5  # what every method gets when `online` compares at equal wall time
PHASES = ("seconds_rollout", "seconds_scoring", "seconds_update")


def online(root: Path, figures: Path, seeds: Sequence[int] = STRESS_SEEDS) -> str:
    """Offline baselines, refreshed ones, or groups of responses compared with each other?

    Prediction: offline baselines are the cheapest and go stale; baselines drawn from the current policy never do,
    and cost k generations a prompt in every step. With a critic that learns, staleness should cost little. At an
    equal number of generated responses fresh baselines leave far fewer steps, and should lose. Groups get their
    baselines from the rollout itself, but see a quarter of the prompts; they should be about as good.
    """
    batch_size, k = default("ppo.batch_size"), default("baselines.k")
    budget = default("ppo.iterations") * batch_size + default("world.train_prompts") * k  # of the offline method
    group = {"ppo.group_size": 4, "contrastive.source": "group"}
    fresh = {"contrastive.refresh": 1, "ppo.iterations": budget // (batch_size * (1 + k))}
    group_in_budget = {**group, "ppo.iterations": budget // batch_size}
    variants = {
        ("same steps", "plain"): Variant("ppo"),
        ("same steps", "offline"): Variant("contrastive"),
        ("same steps", "refreshed every 20"): Variant("contrastive", {"contrastive.refresh": 20}),
        ("same steps", "groups of 4"): Variant("contrastive", group),
        ("same steps", "offline, no critic"): Variant("contrastive", {"ppo.critic": "none"}),
        ("same steps", "groups of 4, no critic"): Variant("contrastive", {**group, "ppo.critic": "none"}),
        ("same responses", "offline"): Variant("contrastive"),
        ("same responses", "fresh every step"): Variant("contrastive", fresh),
        ("same responses", "groups of 4"): Variant("contrastive", group_in_budget),
    }
    runs = run_variants(root, stressed(variants), seeds, "online")
    rows, steps = results(runs), curves(runs, ("gold", "kl", *PHASES))
    for row in rows:
        label = row["setting"], row["method"]
        run_steps = select(steps, setting=row["setting"], method=row["method"], seed=row["seed"])
        responses, seconds = offline_cost(runs[label, row["seed"]], variants[label])
        responses += batch_size * len(run_steps) + refreshed_responses(variants[label], len(run_steps))
        step_seconds = [sum(step[phase] for phase in PHASES) for step in run_steps]
        spent = list(itertools.accumulate(step_seconds, initial=seconds))[1:]
        row |= {"responses": responses, "training_seconds": spent[-1]}
        row["gold_in_time"] = recent_gold(run_steps, spent, SECONDS)
    write_csv(figures / "online.csv", rows)
    kept = ("setting", "method", "seed", "iteration", "gold", "kl")
    write_csv(figures / "online_curves.csv", [{key: row[key] for key in kept} for row in steps])
    plot_online(rows, steps, figures / "online.png")
    lines = []
    for setting, method in variants:
        responses = f"{interval(rows, setting, method, 'responses')[0]:.0f}"
        seconds = plus_minus(interval(rows, setting, method, "training_seconds"), 1)
        in_time = plus_minus(interval(rows, setting, method, "gold_in_time"), 3)
        lines.append([setting, method, responses, seconds, in_time])
    head = ["setting", "baselines", "responses generated", "seconds of training", f"gold after {SECONDS} s"]
    return table(rows, "at", "offline") + "\n\n" + markdown(head, lines)


def recent_gold(steps: list[dict], spent: list[float], seconds: float, window: int = 5) -> float:
    """Mean gold of the last five rollouts within a time, offline sampling included; of the first if there is none."""
    done = max(sum(moment <= seconds for moment in spent), 1)
    return statistics.fmean(step["gold"] for step in steps[max(0, done - window) : done])


def offline_cost(out: Path, variant: Variant) -> tuple[int, float]:
    """(responses, seconds) of the baselines that were drawn before training."""
    if variant.method == "ppo" or variant.settings.get("contrastive.source") == "group":
        return 0, 0.0
    report = read_json(out / "baselines" / "variance.json")
    return report["k"] * len(read_jsonl(out / "baselines" / "baselines.jsonl")), report["seconds"]


def refreshed_responses(variant: Variant, iterations: int) -> int:
    """Responses drawn for new baselines during training: k for every prompt that comes until the next refresh."""
    config = configured("", 0, variant.method, variant.settings)
    every, prompts = config.contrastive.refresh, 0
    if not every:
        return 0
    for first in range(every, iterations, every):
        coming = range(first, min(first + every, iterations))
        prompts += len(prompt_order(config.world.train_prompts, config.ppo, coming, 0))
    return config.baselines.k * prompts
