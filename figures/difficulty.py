"""Easy and hard prompts: what raw and contrastive rewards say of them, and whose advantages enter the gradient.

    E[r_CR | x] = m_pi(x) - m_ref(x),

the improvement over the SFT policy, in units of the reward; the raw reward says m_pi(x), which holds the prompt's
level. The shares of the gradient follow E[A^2 | x], in a whitened batch and without a critic proportional to

    Var(r | x) + (E[r - c b | x] - batch mean)^2 + c^2 Var(b | x).

Difficulty is known in the embedded world, and so are the constants that raters add to a prompt's rewards.
"""

from pathlib import Path

import torch
from torch import Tensor

from crlhf import reviews
from crlhf.contrastive import aggregate
from crlhf.engine.files import stream
from crlhf.engine.forward import Model
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table

from .estimators import correlation, fit_line, gradient_shares, quantile_groups
from .harness import Label, Study, Variant
from .plotting import BLUE, GREEN, GREY, ORANGE, RED, Axes, Figure, describe, finished, panels, plot_points, zero_line
from .runs import open_run, sample_texts
from .tables import Rows, Values, one_value_rows, read_results

CONSTANT = {"world.prompt_bias": 1.0}  # without it a raw reward would hide little of what is shown here
SAMPLES = 8  # responses per training prompt of each policy
EDGES = (0.0, 0.3, 0.45, 0.55, 0.7)  # of five bins of difficulty
TENTHS = 10  # groups of prompts, of the calibration curve
POLICIES = ("SFT", "contrastive")  # before and after training
THIRDS = {"difficulty": ("easy", "medium", "hard"), "constant": ("mild", "middling", "extreme")}
QUANTITIES = ("raw", "contrastive", "gold", "progress")  # of a prompt: its rewards, gold, and gold gained
SIGNALS = ("contrastive reward", "raw reward", "raw without constant")
COLUMNS = ("part", "of", "group", "quantity")  # of: a policy, or what gold is compared with

Measured = dict[tuple, float]  # (part, of, group, quantity) -> value


def difficulty(study: Study) -> str:
    """What do raw and contrastive rewards say of easy and hard prompts, and who gets the gradient?

    Prediction, for raters with constants of standard deviation 1 per prompt. (1) The opening counts in gold, so gold
    falls by 3 per unit of difficulty for any continuation of the same quality; comparisons within a prompt can't
    teach a reward model that, so raw rewards fall far less. The writers' mood follows the opening, so SFT leaves
    more room after scornful ones: progress and r_CR grow with difficulty, where the raw reward is flat.
    (2) By baseline reward, the raw reward rises with a slope near 0.9, the reliability Var_x(m) / Var(b), and r_CR
    falls by the rest, about -0.1, already before any training: regression to the mean, no progress.
    (3) Shares of the gradient without a critic: by thirds of difficulty about a third each, raw or contrastive, as
    constants don't know difficulty. The third of prompts with the most extreme constants takes (0.82 + W/3) /
    (1 + W) = 0.67 of the raw gradient, with W = 0.44 the variance without constants, and a third of the contrastive.
    With training W shrinks, and the raw share rises towards 0.82. (4) Calibration: gold improvement is linear in
    r_CR, about 1 gold per unit of reward, and 0 at 0. The correlation with the improvement over the own baselines is
    about 0.7 for r_CR and less than half of that for the raw reward, which the constants dilute.
    """
    runs = study.run({("default", "contrastive"): Variant("contrastive", CONSTANT)})
    study.write(study.measure(measure_difficulty, runs, "difficulty"))
    return study.answer(difficulty_report, plot_difficulty)


# --------------------------------------------------------------------------------------- measuring a seed


def measure_difficulty(seed: int, runs: dict[Label, Path]) -> Rows:
    """All numbers of one seed: rows {seed, part, policy, group, quantity, value}."""
    pipe = open_run(runs["default", "contrastive"])
    baselines = pipe.rows("baselines", "baselines")
    prompts = [row["prompt"] for row in baselines]
    facts = facts_of(pipe, baselines)
    before, gold_before = sample_scores(pipe, pipe.model("sft"), prompts, "start")
    after, gold_after = sample_scores(pipe, pipe.model("contrastive"), prompts, "contrastive")
    measured = calibration(after, gold_after, gold_before, facts)
    for policy, r, gold in (("SFT", before, gold_before), ("contrastive", after, gold_after)):
        measured |= shares(r, facts, policy)
        measured |= levels(r, gold, facts, policy)
    return one_value_rows(seed, COLUMNS, measured)


def facts_of(pipe: Pipeline, baselines: Rows) -> dict[str, Tensor]:
    """What is known of N training prompts from their offline baselines and from the world: (N,) each."""
    prompts = [row["prompt"] for row in baselines]
    k = len(baselines[0]["responses"])
    repeated = [prompt for prompt in prompts for _ in range(k)]
    responses = [response for row in baselines for response in row["responses"]]
    gold = reviews.gold_reward(repeated, responses)
    sd = pipe.config.world.prompt_bias
    constants = reviews.NoisyReward(lambda x, y: torch.zeros(len(x)), sd, 0.0, pipe.config.run.seed)
    return {
        "baseline": aggregate(torch.tensor([row["rewards"] for row in baselines])),
        "gold of baselines": gold.view(-1, k).mean(1),
        "constant": constants(prompts, prompts),
        "difficulty": torch.tensor([reviews.difficulty(prompt) for prompt in prompts]),
    }


def sample_scores(pipe: Pipeline, policy: Model, prompts: list[str], name: str) -> tuple[Tensor, Tensor]:
    """(N, m) rewards as PPO sees them, and (N, m) gold scores, of a policy's responses to N prompts."""
    generator = stream(pipe.config.run.seed, "difficulty", name)
    repeated, responses, _ = sample_texts(pipe, policy, prompts, generator, SAMPLES)
    rewards = pipe.noisy_reward()(repeated, responses)
    gold = reviews.gold_reward(repeated, responses)
    return rewards.view(-1, SAMPLES), gold.view(-1, SAMPLES)


def levels(r: Tensor, gold: Tensor, facts: dict[str, Tensor], policy: str) -> Measured:
    """Means by known difficulty, and slopes on difficulty and on the baseline reward."""
    columns = {
        "raw": r.mean(1),
        "contrastive": r.mean(1) - facts["baseline"],
        "gold": gold.mean(1),
        "progress": gold.mean(1) - facts["gold of baselines"],
    }
    bins = torch.bucketize(facts["difficulty"], torch.tensor(EDGES[1:]), right=True)
    measured = {}
    for quantity, values in {**columns, "x": facts["difficulty"]}.items():
        for g in range(len(EDGES)):
            measured["difficulty", policy, g, quantity] = values[bins == g].mean().item()
    for part, x in (("difficulty", facts["difficulty"]), ("baseline reward", facts["baseline"])):
        for quantity, values in columns.items():
            measured[part, policy, "slope", quantity] = fit_line(x, values)[0]
    return measured


def shares(r: Tensor, facts: dict[str, Tensor], policy: str) -> Measured:
    """Share of the squared whitened advantages by third of difficulty, and by third of the constant's size."""
    rewards = {"raw": r, "contrastive": r - facts["baseline"][:, None]}
    measured = {}
    for fact, names in THIRDS.items():
        part = f"share by {fact}"
        groups = quantile_groups(facts[fact].abs(), 3)
        for quantity, values in rewards.items():
            for name, share in zip(names, gradient_shares(values, groups, 3).tolist()):
                measured[part, policy, name, quantity] = share
    return measured


def calibration(r: Tensor, gold: Tensor, fresh_gold: Tensor, facts: dict[str, Tensor]) -> Measured:
    """Rewards per prompt against true improvement, over the prompt's own baselines and over fresh SFT responses."""
    raw = r.mean(1)
    signals = dict(zip(SIGNALS, (raw - facts["baseline"], raw, raw - facts["constant"])))
    gains = {"own baselines": gold.mean(1) - facts["gold of baselines"], "fresh SFT": gold.mean(1) - fresh_gold.mean(1)}
    measured = {}
    for over, gain in gains.items():
        for signal, x in signals.items():
            slope, intercept = fit_line(x, gain)
            measured["calibration", over, signal, "slope"] = slope
            measured["calibration", over, signal, "intercept"] = intercept
            measured["calibration", over, signal, "correlation"] = correlation(x, gain)
    for signal, x in signals.items():
        tenths = quantile_groups(x, TENTHS)
        for g in range(TENTHS):
            measured["curve", "own baselines", signal, g] = gains["own baselines"][tenths == g].mean().item()
    return measured


# ---------------------------------------------------------------------------------------- table, figure


def difficulty_report(figures: Path) -> str:
    values = Values(read_results(figures, "difficulty"), *COLUMNS)
    slopes = []
    thirds = []
    for policy in POLICIES:
        for part in ("difficulty", "baseline reward"):
            texts = [values.text(part, policy, "slope", quantity) for quantity in QUANTITIES]
            slopes.append([f"of {part}", policy, *texts])
        for fact, third in (("difficulty", "easy"), ("difficulty", "hard"), ("constant", "extreme")):
            texts = [values.text(f"share by {fact}", policy, third, quantity) for quantity in ("raw", "contrastive")]
            thirds.append([f"{third} third by {fact}", policy, *texts])
    fits = []
    for over in ("own baselines", "fresh SFT"):
        for signal in SIGNALS:
            texts = [values.text("calibration", over, signal, name) for name in ("slope", "intercept", "correlation")]
            fits.append([f"{signal}, gold gained over {over}", *texts])
    tables = [
        markdown_table(["slope per unit", "policy", *QUANTITIES], slopes),
        markdown_table(["share of squared advantages", "policy", "raw", "contrastive"], thirds),
        markdown_table(["calibration per prompt", "slope", "intercept", "correlation"], fits),
    ]
    return "\n\n".join(tables)


def plot_difficulty(figures: Path) -> Figure:
    values = Values(read_results(figures, "difficulty"), *COLUMNS)
    figure, (left, right) = panels(1, 2, 10.5, 4.4)
    plot_levels(left, values)
    plot_calibration(right, values)
    return finished(figure)


def plot_levels(axis: Axes, values: Values) -> None:
    """By difficulty: rewards and progress after contrastive PPO, and r_CR before any."""
    for quantity, policy, label, color, line, marker in (
        ("raw", "contrastive", "raw reward", RED, "-", "o"),
        ("contrastive", "contrastive", "contrastive reward", BLUE, "--", "s"),
        ("progress", "contrastive", "progress in gold", GREEN, "-.", "^"),
        ("contrastive", "SFT", "contrastive reward, before training", GREY, ":", "v"),
    ):
        x = [values.mean("difficulty", policy, g, "x")[0] for g in range(len(EDGES))]
        pairs = [values.mean("difficulty", policy, g, quantity) for g in range(len(EDGES))]
        plot_points(axis, x, pairs, label=label, color=color, linestyle=line, marker=marker)
    title = "After contrastive PPO, by difficulty"
    describe(axis, title, "difficulty of the opening (0 praise, 1 scorn)", "reward, or gold points")
    axis.legend(fontsize=8, loc=(0.02, 0.16))


def plot_calibration(axis: Axes, values: Values) -> None:
    """Prompts in tenths by each signal: does the gold that they gained rise with it?"""
    for signal, color, line, marker, shift in (
        ("contrastive reward", BLUE, "--", "s", -0.12),
        ("raw reward", RED, "-", "o", 0.0),
        ("raw without constant", ORANGE, ":", "^", 0.12),
    ):
        fit = values.text("calibration", "own baselines", signal, "correlation")
        gained = [values.mean("curve", "own baselines", signal, g) for g in range(TENTHS)]
        x = [g + 1 + shift for g in range(TENTHS)]
        label = f"{signal}: correlation {fit}"
        plot_points(axis, x, gained, label=label, color=color, linestyle=line, marker=marker)
    zero_line(axis)
    title = "Calibration after contrastive PPO"
    describe(axis, title, "tenth of the prompts, by the reward named", "gold gained over its baselines", legend="best")
