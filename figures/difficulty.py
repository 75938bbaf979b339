"""Easy and hard prompts: what raw and contrastive rewards say of them, and whose advantages enter the gradient.

    E[r_CR | x] = m_pi(x) - m_ref(x),

the improvement over the SFT policy, in units of the reward; the raw reward says m_pi(x), which holds the prompt's
level. The shares of the gradient follow E[A^2 | x], in a whitened batch and without a critic proportional to

    Var(r | x) + (E[r - c b | x] - batch mean)^2 + c^2 Var(b | x).

Difficulty is known in the embedded world, and so are the constants that raters add to a prompt's rewards.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from crlhf import reviews
from crlhf.contrastive import aggregate
from crlhf.engine.files import stream
from crlhf.engine.forward import Model
from crlhf.evaluate import mean_interval
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.plots import STYLES, plt, save_figure
from crlhf.policy import generate

from .estimators import correlation, fit_line, gradient_shares, quantile_groups
from .harness import SEEDS, Label, Variant, analyse, open_run, run_variants
from .plotting import plot_points
from .tables import markdown, plus_minus, read_rows, select, write_csv
from .variance import EARLY

CONSTANT = {"world.prompt_bias": 1.0}  # without it a raw reward would hide little of what is shown here
SAMPLES = 8  # responses per training prompt of each policy
EDGES = (0.0, 0.3, 0.45, 0.55, 0.7)  # of five bins of difficulty
FIFTHS, TENTHS = 5, 10  # groups by baseline reward, and of the calibration curve
THIRDS = ("easy", "medium", "hard"), ("mild", "middling", "extreme")  # by difficulty, by size of the rater's constant
SIGNALS = {"contrastive reward": "#0072B2", "raw reward": "#D55E00", "raw without constant": "#E69F00"}

Found = dict[tuple, float]  # (part, policy, group, quantity) -> value


# --------------------------------------------------------------------------------------- measuring a seed


def measure(seed: int, runs: dict[Label, Path]) -> list[dict]:
    """All numbers of one seed: rows {seed, part, policy, group, quantity, value}."""
    pipe = open_run(runs["default", "contrastive"])
    rows = pipe.rows("baselines", "baselines")
    prompts, facts = [row["prompt"] for row in rows], facts_of(pipe, rows)
    fresh = sample_scores(pipe, pipe.model("sft"), prompts, seed, "start")
    contrastive = sample_scores(pipe, pipe.model("contrastive"), prompts, seed, "contrastive")
    policies = {"SFT": fresh, "contrastive": contrastive}
    for name in (*early_names(), "ppo"):
        model = open_run(runs["default", name]).model("ppo")
        policies[name] = sample_scores(pipe, model, prompts, seed, name)
    found = {}
    for policy, (r, gold) in policies.items():
        found |= shares(r, facts, policy)
        if policy in ("SFT", "ppo", "contrastive"):
            found |= levels(r, gold, facts, policy)
        if policy in ("ppo", "contrastive"):
            found |= calibration(r, gold, fresh[1], facts, policy)
    names = ("part", "policy", "group", "quantity")
    return [{"seed": seed, **dict(zip(names, place)), "value": value} for place, value in found.items()]


def early_names() -> list[str]:
    """Labels of the shorter runs."""
    return [f"{iterations} iterations" for iterations in EARLY]


def facts_of(pipe: Pipeline, rows: list[dict]) -> dict[str, Tensor]:
    """What is known of N training prompts from their offline baselines and from the world: (N,) each."""
    prompts, k = [row["prompt"] for row in rows], len(rows[0]["responses"])
    repeated = [prompt for prompt in prompts for _ in range(k)]
    gold = reviews.gold_reward(repeated, [response for row in rows for response in row["responses"]])
    sd, seed = pipe.config.world.prompt_bias, pipe.config.run.seed
    constants = reviews.NoisyReward(lambda prompts, responses: torch.zeros(len(prompts)), sd, 0.0, seed)
    return {
        "baseline": aggregate(torch.tensor([row["rewards"] for row in rows])),
        "gold of baselines": gold.view(-1, k).mean(1),
        "constant": constants(prompts, prompts),
        "difficulty": torch.tensor([reviews.difficulty(prompt) for prompt in prompts]),
    }


def sample_scores(pipe: Pipeline, policy: Model, prompts: list[str], seed: int, name: str) -> list[Tensor]:
    """(N, m) rewards as PPO sees them, and (N, m) gold scores, of a policy's responses to N prompts."""
    length, generator = pipe.config.data.max_response_tokens, stream(seed, "difficulty", name)
    responses, *_ = generate(policy, pipe.tokenizer(), prompts, length, generator=generator, k=SAMPLES)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    return [judge(repeated, responses).view(-1, SAMPLES) for judge in (pipe.noisy_reward(), reviews.gold_reward)]


def levels(r: Tensor, gold: Tensor, facts: dict[str, Tensor], policy: str) -> Found:
    """Means by known difficulty and by baseline reward, and slopes on the baseline reward."""
    columns = {
        "raw": r.mean(1),
        "contrastive": r.mean(1) - facts["baseline"],
        "gold": gold.mean(1),
        "progress": gold.mean(1) - facts["gold of baselines"],
    }
    bins = torch.bucketize(facts["difficulty"], torch.tensor(EDGES[1:]), right=True)
    fifths, found = quantile_groups(facts["baseline"], FIFTHS), {}
    for part, groups, x, n in (
        ("difficulty", bins, facts["difficulty"], len(EDGES)),
        ("baseline reward", fifths, facts["baseline"], FIFTHS),
    ):
        for quantity, values in {**columns, "x": x}.items():
            for g in range(n):
                found[part, policy, g, quantity] = values[groups == g].mean().item()
        for quantity, values in columns.items():
            found[part, policy, "slope", quantity] = fit_line(x, values)[0]
    return found


def shares(r: Tensor, facts: dict[str, Tensor], policy: str) -> Found:
    """Share of the squared whitened advantages by third of difficulty, and by third of the constant's size."""
    information, found = r.var(1), {}  # what is left of A^2 if every prompt's level is known
    for part, names, values in (
        ("share by difficulty", THIRDS[0], facts["difficulty"]),
        ("share by constant", THIRDS[1], facts["constant"].abs()),
    ):
        groups = quantile_groups(values, 3)
        for quantity, rewards in (("raw", r), ("contrastive", r - facts["baseline"][:, None])):
            for name, share in zip(names, gradient_shares(rewards, groups, 3).tolist()):
                found[part, policy, name, quantity] = share
        for g, name in enumerate(names):
            found[part, policy, name, "information"] = (information[groups == g].sum() / information.sum()).item()
    return found


def calibration(r: Tensor, gold: Tensor, fresh_gold: Tensor, facts: dict[str, Tensor], policy: str) -> Found:
    """Rewards per prompt against true improvement, over the prompt's own baselines and over fresh SFT responses."""
    raw, own_gain = r.mean(1), gold.mean(1) - facts["gold of baselines"]
    signals = dict(zip(SIGNALS, (raw - facts["baseline"], raw, raw - facts["constant"])))
    found = {}
    for over, gain in (("own baselines", own_gain), ("fresh SFT", gold.mean(1) - fresh_gold.mean(1))):
        for signal, x in signals.items():
            slope, intercept = fit_line(x, gain)
            found["calibration", policy, over, f"{signal}: slope"] = slope
            found["calibration", policy, over, f"{signal}: intercept"] = intercept
            found["calibration", policy, over, f"{signal}: correlation"] = correlation(x, gain)
    for signal, x in signals.items():
        tenths = quantile_groups(x, TENTHS)
        for g in range(TENTHS):
            found["curve", policy, g, f"{signal}: x"] = x[tenths == g].mean().item()
            found["curve", policy, g, f"{signal}: y"] = own_gain[tenths == g].mean().item()
    return found


# ----------------------------------------------------------------------------------------- the experiment


def difficulty(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:8]) -> str:
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
    variants = {("default", method): Variant(method, CONSTANT) for method in ("ppo", "contrastive")}
    for name, iterations in zip(early_names(), EARLY):
        variants["default", name] = Variant("ppo", {"ppo.iterations": iterations, **CONSTANT})
    rows = analyse(root, "difficulty", measure, run_variants(root, variants, seeds, "difficulty"), seeds)
    write_csv(figures / "difficulty.csv", rows)
    plot_difficulty(rows, figures / "difficulty.png")
    return report(figures)


def report(figures: Path) -> str:
    return difficulty_table(read_rows(figures / "difficulty.csv"))


def over_seeds(rows: list[dict], part: str, policy: str, group: str | int, quantity: str) -> tuple[float, float]:
    """(mean, half) over seeds. A bin that is empty in some seed is left out there."""
    chosen = [row["value"] for row in select(rows, part=part, policy=policy, group=group, quantity=quantity)]
    return mean_interval([value for value in chosen if not math.isnan(value)])


# ----------------------------------------------------------------------------------------- table, figure


def difficulty_table(rows: list[dict]) -> str:
    def texts(part: str, policy: str, group: str, quantities: Sequence[str]) -> list[str]:
        return [plus_minus(over_seeds(rows, part, policy, group, quantity)) for quantity in quantities]

    slopes, parts, lines = [], [], []
    for part in ("difficulty", "baseline reward"):
        for policy in ("SFT", "ppo", "contrastive"):
            found = texts(part, policy, "slope", ("raw", "contrastive", "gold", "progress"))
            slopes.append([f"of {part}", policy, *found])
    for part, group, name in (
        ("share by difficulty", "easy", "easy third"),
        ("share by difficulty", "hard", "hard third"),
        ("share by constant", "extreme", "extreme third (constants)"),
    ):
        for policy in ("SFT", *early_names(), "ppo", "contrastive"):
            parts.append([name, policy, *texts(part, policy, group, ("raw", "contrastive", "information"))])
    for over in ("own baselines", "fresh SFT"):
        for policy in ("ppo", "contrastive"):
            for signal in SIGNALS:
                quantities = [f"{signal}: {name}" for name in ("slope", "intercept", "correlation")]
                found = texts("calibration", policy, over, quantities)
                lines.append([f"{signal}, gold gained over {over}", policy, *found])
    rewards = ["raw reward", "contrastive reward", "gold", "progress in gold"]
    heads = (
        ["slope per unit", "policy", *rewards],
        ["share of squared advantages", "policy", "raw", "contrastive", "information"],
        ["calibration per prompt", "policy", "slope", "intercept", "correlation"],
    )
    tables = [markdown(head, body) for head, body in zip(heads, (slopes, parts, lines))]
    return "\n\n".join(tables)


def plot_difficulty(rows: list[dict], path: Path) -> str:
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))
    plot_levels(axes[0, 0], rows, "difficulty", len(EDGES))
    axes[0, 0].set_xlabel("difficulty of the opening (0 praise, 1 scorn)")
    axes[0, 0].legend(fontsize=8, loc=(0.02, 0.13))
    plot_levels(axes[0, 1], rows, "baseline reward", FIFTHS)
    axes[0, 1].set_xlabel("mean reward of the prompt's baselines")
    plot_shares(axes[1, 0], rows)
    plot_calibration(axes[1, 1], rows)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    kinds = ("raw", "contrastive")
    raw, contrastive = (over_seeds(rows, "share by constant", "SFT", "extreme", kind)[0] for kind in kinds)
    slope = over_seeds(rows, "calibration", "contrastive", "own baselines", "contrastive reward: slope")
    fresh = over_seeds(rows, "calibration", "contrastive", "fresh SFT", "contrastive reward: correlation")
    figure.suptitle(
        f"The third of prompts with the most extreme rater constants takes {raw:.0%} of the raw gradient and "
        f"{contrastive:.0%} of the contrastive one;\na unit of contrastive reward stands for {plus_minus(slope)} of "
        "gold over the same baselines; with gain over fresh SFT responses it correlates by " + plus_minus(fresh),
        fontsize=10,
    )
    return save_figure(figure, path)


def plot_groups(axis: plt.Axes, rows: list[dict], places: list[tuple], x: str, y: str, **style: object) -> None:
    """One line over groups. places: (part, policy, group) of each; x and y: their quantities."""
    xs = [over_seeds(rows, *place, x)[0] for place in places]
    plot_points(axis, xs, [over_seeds(rows, *place, y) for place in places], **style)


def plot_levels(axis: plt.Axes, rows: list[dict], part: str, n: int) -> None:
    for quantity, policy, label, color, line, marker in (
        ("raw", "contrastive", "raw reward", "#D55E00", "-", "o"),
        ("contrastive", "contrastive", "contrastive reward", "#0072B2", "--", "s"),
        ("progress", "contrastive", "progress in gold", "#009E73", "-.", "^"),
        ("contrastive", "SFT", "contrastive reward, before training", "#777777", ":", "v"),
    ):
        places, style = [(part, policy, g) for g in range(n)], {"color": color, "linestyle": line, "marker": marker}
        plot_groups(axis, rows, places, "x", quantity, label=label, **style)
    axis.set(ylabel="reward, or gold points", title=f"After contrastive PPO, by {part}")


def plot_shares(axis: plt.Axes, rows: list[dict]) -> None:
    policies, colors = ("SFT", *early_names(), "ppo"), {"raw": STYLES["ppo"].color}
    colors["contrastive"] = STYLES["contrastive"].color
    for part, group, name, line in (
        ("share by constant", "extreme", "third with extreme constants", "-"),
        ("share by difficulty", "hard", "hard third", ":"),
    ):
        for shift, (kind, color) in zip((-0.06, 0.06), colors.items()):
            pairs = [over_seeds(rows, part, policy, group, kind) for policy in policies]
            places = [place + shift for place in range(len(policies))]
            plot_points(axis, places, pairs, color=color, linestyle=line, label=f"{kind}: {name}")
    axis.axhline(1 / 3, color="black", linewidth=0.8)
    axis.set_xticks(range(len(policies)), ["0", *map(str, EARLY), "end"])
    axis.set(xlabel="iterations of plain PPO", ylabel="share of squared advantages", ylim=(0, 1))
    axis.set_title("Who gets the gradient (no critic)")
    axis.legend(fontsize=8, loc=(0.3, 0.45))


def plot_calibration(axis: plt.Axes, rows: list[dict]) -> None:
    """Prompts in tenths by each signal: does the gold that they gained rise with it?"""
    for number, ((signal, color), line, marker) in enumerate(zip(SIGNALS.items(), ("--", "-", ":"), "so^")):
        fit = over_seeds(rows, "calibration", "contrastive", "own baselines", f"{signal}: correlation")
        style = {"color": color, "linestyle": line, "marker": marker}
        gained = [over_seeds(rows, "curve", "contrastive", g, f"{signal}: y") for g in range(TENTHS)]
        x = [g + 1 + 0.12 * (number - 1) for g in range(TENTHS)]
        plot_points(axis, x, gained, label=f"{signal}: correlation {plus_minus(fit)}", **style)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xlabel="tenth of the prompts, by the reward named", ylabel="gold gained over its baselines")
    axis.set_title("Calibration after contrastive PPO")
    axis.legend(fontsize=8)
