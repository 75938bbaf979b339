"""Judged as papers judge: win, tie and loss of one policy against another, by the truth and by judges that are not it.

At a high price of KL a policy stays near SFT, at a low one it goes far, so methods are compared at about one KL. Three
judges see the same responses to the same prompts: gold; the reward model, which PPO was trained on; and a noisy judge,
who prefers a with probability sigmoid(beta * (gold_a - gold_b)), beta chosen so that it agrees with gold on three in
four pairs of SFT responses that gold can tell apart. Equal responses are a tie for every judge.
"""

import itertools
from pathlib import Path

import torch

from crlhf.engine.files import read_jsonl, stream
from crlhf.evaluate import column, compare, mean_interval
from crlhf.pipeline.tables import markdown_table

from .bases import Seeds, base_folder
from .contenders import FOUR, at
from .dose import CANCEL
from .harness import Folders, Label, Study, results
from .plotting import BLUE, GREY, RED, Figure, describe, finished, panels, plot_rows, zero_column
from .runs import RESPONSES, default
from .tables import (
    Rows,
    distinct,
    interval,
    over_seeds,
    p_value,
    plus_minus,
    read_results,
    results_table,
    select,
    settings_of,
    starred,
)

PRICES = (0.02, default("ppo.kl_coef"), 0.1)
REWARDS = {"as it is": {}, "constant of sd 1": {"world.prompt_bias": 1.0}}
THREE = {"gold": "black", "reward": RED, "noisy": BLUE}  # judges
PAIRED = list(itertools.combinations(FOUR, 2))  # methods that are compared with each other
AGREEMENT = 0.75


def judged(study: Study) -> str:
    """Who wins at matched KL, by which judge, and how large must a true difference be for "20% more wins than losses"?

    Endpoint: wins minus losses on 256 held-out prompts with four responses each. Twelve seeds; Holm's correction.

    Prediction. (1) As the reward model comes, no method wins against plain PPO at matched KL by more than 5 points by
    gold. (2) With a constant all others win against it, by 5 to 15. (3) The reward model, judging what was trained on
    it, gives larger margins than gold; the noisy judge smaller ones, by a factor of about two. (4) "20 points" takes a
    difference of about 0.2 in mean gold by gold's own judgement, and of 0.4 by the noisy judge's.
    """
    variants = {}
    for name, faults in REWARDS.items():
        for price in PRICES:
            for method in FOUR:
                own = {} if method in CANCEL else faults  # a constant cancels: one run for both kinds of reward
                variants[priced(name, price), method] = at(method, {"ppo.kl_coef": price, **own})
    runs = study.run(variants)
    rows = results(runs)
    study.write(rows)
    beta = calibrated([read_jsonl(base_folder(study.root, seed, {}) / "held_out.jsonl") for seed in study.seeds])
    pairs, every = judge_all(runs, rows, study.seeds, beta)
    study.write(pairs, "_pairs")
    study.write(every, "_margins")
    return study.answer(judged_report, plot_judged)


def priced(name: str, price: float) -> str:
    """A setting: rewards, and the price of KL."""
    return f"{name}, kl {price:g}"


# -------------------------------------------------------------------------------------------- comparisons


def judge_all(runs: Folders, rows: Rows, seeds: Seeds, beta: float) -> tuple[Rows, Rows]:
    """(methods compared at matched KL, all policies of one kind of reward compared with each other), a row a seed."""
    pairs = []
    every = []
    for name in REWARDS:
        nearest = matched(rows, name)
        for seed in seeds:
            responses = responses_of(runs, name, seed)
            for method, other in PAIRED:
                draw = stream(seed, "noisy judge", name, method, other)
                row = {"rewards": name, "method": method, "other": other, "seed": seed}
                pairs.append(row | margins(responses[nearest[method]], responses[nearest[other]], beta, draw))
            for first, second in itertools.combinations(responses, 2):
                draw = stream(seed, "noisy judge", *first, *second)
                row = {"rewards": name, "first": ", ".join(first), "second": ", ".join(second), "seed": seed}
                every.append(row | margins(responses[first], responses[second], beta, draw))
    return pairs, every


def responses_of(runs: Folders, name: str, seed: int) -> dict[Label, Rows]:
    """The held-out rows of all policies that were trained on one kind of reward with one seed."""
    responses = {}
    for (label, other_seed), out in runs.items():
        if other_seed == seed and label[0].startswith(name):
            responses[label] = read_jsonl(out / "held_out.jsonl")
    return responses


def matched(rows: Rows, name: str) -> dict[str, Label]:
    """For each method its label whose mean KL is nearest to that of contrastive PPO at the default price."""
    target = interval(rows, priced(name, default("ppo.kl_coef")), "contrastive", "kl")[0]
    settings = [setting for setting in settings_of(rows) if setting.startswith(f"{name},")]
    nearest = {}
    for method in FOUR:
        distances = {setting: abs(interval(rows, setting, method, "kl")[0] - target) for setting in settings}
        nearest[method] = min(distances, key=distances.get), method
    return nearest


def calibrated(bases: list[Rows]) -> float:
    """The noisy judge's beta: it agrees with gold on AGREEMENT of the pairs of SFT responses that gold can tell apart.

    Pairs are responses to one prompt, the first and the second that each base holds.
    """
    gaps = []
    for rows in bases:
        gold = column(rows, "gold")
        n = len(rows) // RESPONSES
        gaps.append((gold[:n] - gold[n : 2 * n]).abs())
    gaps = torch.cat(gaps)
    gaps = gaps[gaps > 0]
    low = 0.0
    high = 100.0
    for _ in range(50):
        beta = (low + high) / 2
        if (beta * gaps).sigmoid().mean() < AGREEMENT:
            low = beta
        else:
            high = beta
    return beta


def margins(rows: Rows, others: Rows, beta: float, draw: torch.Generator) -> dict[str, float]:
    """Difference in mean gold, and wins minus losses by each judge, of two policies' responses to the same prompts."""
    gold = column(rows, "gold") - column(others, "gold")
    reward = column(rows, "reward") - column(others, "reward")
    differ = torch.tensor([a["response"] != b["response"] for a, b in zip(rows, others)])
    chosen = torch.rand(len(gold), generator=draw, dtype=torch.float64) < (beta * gold).sigmoid()
    result = {"difference": gold.mean().item()}
    for judge, verdict in (("gold", gold), ("reward", reward), ("noisy", (chosen.double() - 0.5) * differ)):
        shares = compare(verdict, torch.zeros_like(verdict))
        result[f"{judge}_margin"] = shares["win"] - shares["loss"]
    return result


def slope_through_origin(every: Rows, judge: str) -> float:
    """Of a judge's margin on the difference in mean gold."""
    square = sum(row["difference"] ** 2 for row in every)
    return sum(row["difference"] * row[f"{judge}_margin"] for row in every) / square


def needed_difference(every: Rows, judge: str) -> list[float]:
    """For each seed the difference in mean gold at which a judge sees 20 points more wins than losses."""
    return [0.2 / slope_through_origin(select(every, seed=seed), judge) for seed in distinct(every, "seed")]


# ---------------------------------------------------------------------------------------- tables, figure


def judged_report(figures: Path) -> str:
    rows = read_results(figures, "judged")
    pairs = read_results(figures, "judged_pairs")
    every = read_results(figures, "judged_margins")
    lines = [[judge, plus_minus(mean_interval(needed_difference(every, judge)))] for judge in THREE]
    needed = markdown_table(["judge", "difference in mean gold that it calls 20 points better"], lines)
    return "\n\n".join([results_table(rows, "rewards"), pairs_table(pairs), needed])


def pairs_table(pairs: Rows) -> str:
    """Each pair of methods at matched KL, by three judges. A star: p < 0.05 after Holm's correction of the table."""
    starts = []
    cells = []
    p_values = []
    for name in REWARDS:
        for method, other in PAIRED:
            own = select(pairs, rewards=name, method=method, other=other)
            gap = plus_minus(over_seeds(own, "difference"), 3, "+")
            starts.append([name, f"{method} against {other}", gap])
            for judge in THREE:
                margin = [100 * row[f"{judge}_margin"] for row in own]
                cells.append(plus_minus(mean_interval(margin), 0, "+"))
                p_values.append(p_value(margin))
    cells = starred(cells, p_values)
    lines = [start + cells[3 * i : 3 * i + 3] for i, start in enumerate(starts)]
    head = [f"{judge}: wins minus losses, points" for judge in THREE]
    return markdown_table(["rewards", "pair", "difference in gold", *head], lines)


def plot_judged(figures: Path) -> Figure:
    """Left: margins at matched KL by each judge. Right: margin against true difference, over all pairs of policies."""
    pairs = read_results(figures, "judged_pairs")
    every = read_results(figures, "judged_margins")
    figure, (left, right) = panels(1, 2, 12, 4.6, width_ratios=(1.3, 1))
    places = [(name, method, other) for name in REWARDS for method, other in PAIRED][::-1]
    for number, (judge, color) in enumerate(THREE.items()):
        points = [{**row, "points": 100 * row[f"{judge}_margin"]} for row in pairs]
        means = [over_seeds(points, "points", rewards=name, method=a, other=b) for name, a, b in places]
        heights = [place + 0.2 * (1 - number) for place in range(len(places))]
        plot_rows(left, heights, means, color=color, markersize=4, capsize=2, label=judge)
        y = [100 * row[f"{judge}_margin"] for row in every]
        right.plot([row["difference"] for row in every], y, ".", color=color, markersize=2, alpha=0.4)
        right.axline((0, 0), slope=20 / mean_interval(needed_difference(every, judge))[0], color=color)
    left.set_yticks(range(len(places)), [f"{name}: {a} - {b}" for name, a, b in places], fontsize=8)
    zero_column(left)
    title = "At matched KL, by gold, reward model and noisy judge"
    describe(left, title, "wins minus losses, points", legend="best")
    right.axhline(20, color=GREY, linestyle=":")
    describe(right, 'What "20 points better" takes', "difference in mean gold", "wins minus losses, points")
    return finished(figure)
