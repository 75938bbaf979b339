"""Judged as papers judge: win, tie and loss of one policy against another, by the truth and by judges that are not it.

At a high price of KL a policy stays near SFT, at a low one it goes far, so methods are compared at about one KL. Three
judges see the same responses to the same prompts: gold; the reward model, which PPO was trained on; and a noisy judge,
who prefers a with probability sigmoid(beta * (gold_a - gold_b)), beta chosen so that it agrees with gold on three in
four pairs of SFT responses that gold can tell apart. Equal responses are a tie for every judge.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from crlhf.engine.files import read_jsonl, stream
from crlhf.evaluate import column, mean_interval
from crlhf.evaluate import compare as compare_scores
from crlhf.pipeline.plots import plt, save_figure

from .contenders import at
from .harness import RESPONSES, SEEDS, base_name, default, results, run_variants
from .tables import (
    distinct,
    holm,
    interval,
    markdown,
    p_value,
    plus_minus,
    read_rows,
    select,
    settings_of,
    table,
    write_csv,
)

METHODS = ("ppo", "contrastive", "adaptive", "RLOO")
PRICES = (0.02, default("ppo.kl_coef"), 0.1)
REWARDS = {"as it is": {}, "constant of sd 1": {"world.prompt_bias": 1.0}}
JUDGES = {"gold": "#000000", "reward": "#D55E00", "noisy": "#0072B2"}
AGREEMENT = 0.75


def judged(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
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
            for method in METHODS:
                cancels = method in ("contrastive", "RLOO")  # a constant: one run for both kinds of reward
                settings = {"ppo.kl_coef": price, **({} if cancels else faults)}
                variants[f"{name}, kl {price:g}", method] = at(method, settings)
    runs = run_variants(root, variants, seeds, "judged")
    rows = results(runs)
    write_csv(figures / "judged.csv", rows)
    bases = [read_jsonl(root / f"seed{seed}" / base_name({}) / "held_out.jsonl") for seed in seeds]
    beta, pairs, every = calibrated(bases), [], []
    for name, seed in itertools.product(REWARDS, seeds):
        chosen = matched(rows, name)
        own = {label: read_jsonl(out / "held_out.jsonl") for (label, n), out in runs.items() if n == seed}
        for method, other in itertools.combinations(METHODS, 2):
            place = {"rewards": name, "method": method, "other": other, "seed": seed}
            draw = stream(seed, "noisy judge", name, method, other)
            pairs.append(place | margins(own[chosen[method], method], own[chosen[other], other], beta, draw))
        for first, second in itertools.combinations([label for label in own if label[0].startswith(name)], 2):
            place = {"rewards": name, "first": ", ".join(first), "second": ", ".join(second), "seed": seed}
            draw = stream(seed, "noisy judge", *first, *second)
            every.append(place | margins(own[first], own[second], beta, draw))
    write_csv(figures / "judged_pairs.csv", pairs)
    write_csv(figures / "judged_margins.csv", every)
    plot_judged(pairs, every, figures / "judged.png")
    return report(figures)


def report(figures: Path) -> str:
    rows, pairs, every = (read_rows(figures / f"judged{part}.csv") for part in ("", "_pairs", "_margins"))
    return "\n\n".join([table(rows, "rewards"), pairs_table(pairs), needed_table(every)])


def matched(rows: list[dict], name: str) -> dict[str, str]:
    """For each method the setting whose mean KL is nearest to that of contrastive PPO at the default price."""
    target = interval(rows, f"{name}, kl {default('ppo.kl_coef'):g}", "contrastive", "kl")[0]
    settings = [setting for setting in settings_of(rows) if setting.startswith(f"{name},")]
    found = {}
    for method in METHODS:
        found[method] = min(settings, key=lambda setting: abs(interval(rows, setting, method, "kl")[0] - target))
    return found


def calibrated(bases: list[list[dict]]) -> float:
    """The noisy judge's beta: it agrees with gold on AGREEMENT of the pairs of SFT responses that gold can tell apart.

    Pairs are responses to one prompt, the first and the second that each base holds.
    """
    gaps = []
    for rows in bases:
        gold, n = column(rows, "gold"), len(rows) // RESPONSES
        gaps.append((gold[:n] - gold[n : 2 * n]).abs())
    gaps = torch.cat(gaps)
    gaps, low, high = gaps[gaps > 0], 0.0, 100.0
    for _ in range(50):
        beta = (low + high) / 2
        low, high = (beta, high) if (beta * gaps).sigmoid().mean() < AGREEMENT else (low, beta)
    return beta


def margins(rows: list[dict], others: list[dict], beta: float, draw: torch.Generator) -> dict[str, float]:
    """Difference in mean gold, and win, tie and loss by each judge, of two policies' responses to the same prompts."""
    gold, reward = (column(rows, key) - column(others, key) for key in ("gold", "reward"))
    differ = torch.tensor([a["response"] != b["response"] for a, b in zip(rows, others)])
    chosen = torch.rand(len(gold), generator=draw, dtype=torch.float64) < (beta * gold).sigmoid()
    verdicts = {"gold": gold, "reward": reward, "noisy": (chosen.double() - 0.5) * differ}
    found = {"difference": gold.mean().item(), "kl_gap": (column(rows, "kl") - column(others, "kl")).mean().item()}
    for judge, verdict in verdicts.items():
        shares = compare_scores(verdict, torch.zeros_like(verdict))
        found |= {f"{judge}_{name}": shares[name] for name in ("win", "tie", "loss")}
        found[f"{judge}_margin"] = shares["win"] - shares["loss"]
    return found


def pairs_table(pairs: list[dict]) -> str:
    """Each pair of methods at matched KL, by three judges. A star: p < 0.05 after Holm's correction of the table."""
    lines, p_values = [], []
    for name in REWARDS:
        for method, other in itertools.combinations(METHODS, 2):
            chosen = select(pairs, rewards=name, method=method, other=other)
            cells = [plus_minus(mean_interval([row["difference"] for row in chosen]), 3, "+")]
            for judge in JUDGES:
                margins = [100 * row[f"{judge}_margin"] for row in chosen]
                (mean, half), shares = mean_interval(margins), []
                for share in ("win", "tie", "loss"):
                    shares.append(f"{sum(row[f'{judge}_{share}'] for row in chosen) / len(chosen):.0%}")
                cells.append(f"{' / '.join(shares)}: {mean:+.0f} ± {half:.0f}")
                p_values.append(p_value(margins))
            lines.append([name, f"{method} against {other}", *cells])
    stars = iter(" *" if p < 0.05 else "" for p in holm(p_values))
    lines = [[*line[:3], *(cell + next(stars) for cell in line[3:])] for line in lines]
    head = [f"{judge}: win / tie / loss: margin" for judge in JUDGES]
    return markdown(["rewards", "pair", "difference in gold", *head], lines)


def needed(every: list[dict], judge: str) -> list[float]:
    """For each seed the difference in mean gold at which a judge sees 20 points more wins than losses.

    From the slope, through the origin, of the margin on the difference over all pairs of the seed's policies.
    """
    found = []
    for seed in distinct(every, "seed"):
        own = select(every, seed=seed)
        square = sum(row["difference"] ** 2 for row in own)
        found.append(0.2 * square / sum(row["difference"] * row[f"{judge}_margin"] for row in own))
    return found


def needed_table(every: list[dict]) -> str:
    lines = [[judge, plus_minus(mean_interval(needed(every, judge)))] for judge in JUDGES]
    return markdown(["judge", "difference in mean gold that it calls 20 points better"], lines)


def plot_judged(pairs: list[dict], every: list[dict], path: Path) -> str:
    """Left: margins at matched KL by each judge. Right: margin against true difference, over all pairs of policies."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1.3, 1))
    labels = [(name, *pair) for name in REWARDS for pair in itertools.combinations(METHODS, 2)][::-1]
    for number, (judge, color) in enumerate(JUDGES.items()):
        for place, (name, method, other) in enumerate(labels):
            chosen = select(pairs, rewards=name, method=method, other=other)
            mean, half = mean_interval([100 * row[f"{judge}_margin"] for row in chosen])
            shown = {"color": color, "marker": "o", "markersize": 4, "capsize": 2}
            left.errorbar(mean, place + 0.2 * (1 - number), xerr=half, **shown, label=judge if place == 0 else None)
        x = [row["difference"] for row in every]
        right.plot(x, [100 * row[f"{judge}_margin"] for row in every], ".", color=color, markersize=2, alpha=0.4)
        right.axline((0, 0), slope=20 / (sum(needed(every, judge)) / len(distinct(every, "seed"))), color=color)
    left.set_yticks(range(len(labels)), [f"{name}: {method} - {other}" for name, method, other in labels], fontsize=8)
    left.axvline(0, color="black", linewidth=0.8)
    left.set(xlabel="wins minus losses, points", title="At matched KL, by gold, reward model and noisy judge")
    right.axhline(20, color="#777777", linestyle=":")
    right.set(
        xlabel="difference in mean gold", ylabel="wins minus losses, points", title='What "20 points better" takes'
    )
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return save_figure(figure, path)
