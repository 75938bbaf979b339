"""Easy and hard prompts: what raw and contrastive rewards say of them, and whose advantages enter the gradient.

    E[r_CR | x] = m_pi(x) - m_ref(x),

the improvement over the SFT policy, in units of the reward; the raw reward says m_pi(x), which holds the prompt's
level. The shares of the gradient follow E[A^2 | x], in a whitened batch and without a critic proportional to

    Var(r | x) + (E[r - c b | x] - batch mean)^2 + c^2 Var(b | x).

Difficulty is known in the embedded world, and so are the constants that raters add to a prompt's rewards.
"""

import numpy as np
import torch

from .. import reviews
from ..baselines import load_baselines
from ..contrastive import aggregate
from ..evaluate import mean_interval
from ..plots import finish, plt
from ..policy import generate
from ..runs import stream
from .drawing import style_of
from .estimators import correlation, fit_line, gradient_shares, quantile_groups
from .harness import SEEDS, Variant, default, run_variants, write_csv
from .variance import EARLY, analyse, open_run

SAMPLES = 8                            # responses per training prompt of each policy
EDGES = (0.0, 0.3, 0.45, 0.55, 0.7)    # of five bins of difficulty
FIFTHS, TENTHS = 5, 10                 # groups by baseline reward, and of the calibration curve
THIRDS = ("easy", "medium", "hard"), ("mild", "middling", "extreme")  # by difficulty, by size of the rater's constant
SIGNALS = {"contrastive reward": "#0072B2", "raw reward": "#D55E00", "raw without constant": "#E69F00"}


# --------------------------------------------------------------------------------------- measuring a seed


def measure(seed, runs):
    """All numbers of one seed: rows {seed, part, policy, group, quantity, value}."""
    pipe = open_run(runs["default", "contrastive"])
    rows = load_baselines(pipe.run.path("baselines"))
    prompts, k = [row["prompt"] for row in rows], len(rows[0]["responses"])
    b = torch.tensor([row["rewards"] for row in rows])  # (N, k)
    gold_b = reviews.gold_reward([x for x in prompts for _ in range(k)], [y for row in rows for y in row["responses"]])
    constants = reviews.NoisyReward(lambda x, y: torch.zeros(len(x)), pipe.config.world.prompt_bias, 0.0, seed)
    facts = {"baseline": aggregate(b), "gold of baselines": gold_b.view(-1, k).mean(1), "b": b,
             "constant": constants(prompts, prompts),
             "difficulty": torch.tensor([reviews.difficulty(x) for x in prompts])}

    last, found = default("ppo.iterations"), []
    fresh = respond(pipe, pipe.model("sft"), prompts, seed, "start")
    policies = {"SFT": fresh, "contrastive": respond(pipe, pipe.model("contrastive"), prompts, seed, "contrastive")}
    for iterations in (*EARLY, last):
        label = "ppo" if iterations == last else f"{iterations} iterations"
        policies[label] = respond(pipe, open_run(runs["default", label]).model("ppo"), prompts, seed, label)
    for policy, (r, gold) in policies.items():
        found += [(*place, value) for place, value in shares(r, facts, policy).items()]
        if policy in ("SFT", "ppo", "contrastive"):
            found += [(*place, value) for place, value in levels(r, gold, facts, policy).items()]
        if policy in ("ppo", "contrastive"):
            found += [(*place, value) for place, value in calibration(r, gold, fresh[1], facts, policy).items()]
    return [{"seed": seed, "part": part, "policy": policy, "group": group, "quantity": quantity, "value": value}
            for part, policy, group, quantity, value in found]


def respond(pipe, policy, prompts, seed, name):
    """(N, m) rewards as PPO sees them, and (N, m) gold scores, of a policy's responses to N prompts."""
    texts, _, _ = generate(policy, pipe.tokenizer(), prompts, pipe.config.data.max_response_tokens,
                           generator=stream(seed, "difficulty", name), k=SAMPLES)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    return [judge(repeated, texts).view(-1, SAMPLES) for judge in (pipe.noisy_reward(), reviews.gold_reward)]


def levels(r, gold, facts, policy):
    """Means by known difficulty and by baseline reward, and slopes on the baseline reward: {place: value}."""
    columns = {"raw": r.mean(1), "contrastive": r.mean(1) - facts["baseline"], "gold": gold.mean(1),
               "progress": gold.mean(1) - facts["gold of baselines"]}
    bins = torch.bucketize(facts["difficulty"], torch.tensor(EDGES[1:]), right=True)
    fifths = quantile_groups(facts["baseline"], FIFTHS)
    found = {}
    for part, groups, x, n in (("difficulty", bins, facts["difficulty"], len(EDGES)),
                               ("baseline reward", fifths, facts["baseline"], FIFTHS)):
        for quantity, values in {**columns, "x": x}.items():
            found |= {(part, policy, g, quantity): values[groups == g].mean().item() for g in range(n)}
        found |= {(part, policy, "slope", quantity): fit_line(x, values)[0] for quantity, values in columns.items()}
    return found


def shares(r, facts, policy):
    """Share of the squared whitened advantages by third of difficulty, and by third of the constant's size."""
    kinds = {"raw": r, "contrastive": r - facts["baseline"][:, None]}
    information = r.var(1)  # what is left of A^2 if every prompt's level is known
    found = {}
    for part, names, values in (("share by difficulty", THIRDS[0], facts["difficulty"]),
                                ("share by constant", THIRDS[1], facts["constant"].abs())):
        groups = quantile_groups(values, 3)
        for quantity, rewards in kinds.items():
            found |= {(part, policy, name, quantity): share.item()
                      for name, share in zip(names, gradient_shares(rewards, groups, 3))}
        found |= {(part, policy, name, "information"): (information[groups == g].sum() / information.sum()).item()
                  for g, name in enumerate(names)}
    return found


def calibration(r, gold, fresh_gold, facts, policy):
    """Rewards per prompt against true improvement, over the prompt's own baselines and over fresh SFT responses."""
    signals = {"contrastive reward": r.mean(1) - facts["baseline"], "raw reward": r.mean(1),
               "raw without constant": r.mean(1) - facts["constant"]}
    gains = {"own baselines": gold.mean(1) - facts["gold of baselines"], "fresh SFT": gold.mean(1) - fresh_gold.mean(1)}
    found = {}
    for over, gain in gains.items():
        for signal, x in signals.items():
            slope, intercept = fit_line(x, gain)
            found |= {("calibration", policy, over, f"{signal}: slope"): slope,
                      ("calibration", policy, over, f"{signal}: intercept"): intercept,
                      ("calibration", policy, over, f"{signal}: correlation"): correlation(x, gain)}
    for signal, x in signals.items():
        tenths = quantile_groups(x, TENTHS)
        for g in range(TENTHS):
            found |= {("curve", policy, g, f"{signal}: {axis}"): values[tenths == g].mean().item()
                      for axis, values in (("x", x), ("y", gains["own baselines"]))}
    return found


# ----------------------------------------------------------------------------------------- the experiment


def difficulty(root, figures, seeds=SEEDS):
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
    variants = {("default", method): Variant(method) for method in ("ppo", "contrastive")}
    variants |= {("default", f"{n} iterations"): Variant("ppo", {"ppo.iterations": n}) for n in EARLY}
    rows = analyse(root, "difficulty", measure, run_variants(root, variants, seeds, "difficulty"), seeds)
    write_csv(figures / "difficulty.csv", rows)
    draw_difficulty(rows, figures / "difficulty.png")
    return difficulty_table(rows)


def over_seeds(rows, part, policy, group, quantity):
    """(mean, half-width) over seeds. A bin that is empty in some seed is left out there."""
    mine = [row["value"] for row in rows if (row["part"], row["policy"], row["group"], row["quantity"]) ==
            (part, policy, group, quantity)]
    return mean_interval([value for value in mine if value == value])


# ----------------------------------------------------------------------------------------- table, figure


def difficulty_table(rows):
    text = lambda *place: "%.2f ± %.2f" % over_seeds(rows, *place)
    lines = ["| slope per unit | policy | raw reward | contrastive reward | gold | progress in gold |",
             "| --- | --- | --- | --- | --- | --- |"]
    for part in ("difficulty", "baseline reward"):
        for policy in ("SFT", "ppo", "contrastive"):
            values = " | ".join(text(part, policy, "slope", key) for key in ("raw", "contrastive", "gold", "progress"))
            lines.append(f"| of {part} | {policy} | {values} |")
    lines += ["", "| share of squared advantages | policy | raw | contrastive | information |",
              "| --- | --- | --- | --- | --- |"]
    for part, group in (("share by difficulty", "easy"), ("share by difficulty", "hard"),
                        ("share by constant", "extreme")):
        for policy in ("SFT", *(f"{n} iterations" for n in EARLY), "ppo", "contrastive"):
            values = " | ".join(text(part, policy, group, key) for key in ("raw", "contrastive", "information"))
            lines.append(f"| {group} third{' (constants)' * (group == 'extreme')} | {policy} | {values} |")
    lines += ["", "| calibration per prompt | policy | slope | intercept | correlation |",
              "| --- | --- | --- | --- | --- |"]
    for over in ("own baselines", "fresh SFT"):
        for policy in ("ppo", "contrastive"):
            for signal in SIGNALS:
                values = " | ".join(text("calibration", policy, over, f"{signal}: {key}")
                                    for key in ("slope", "intercept", "correlation"))
                lines.append(f"| {signal}, gold gained over {over} | {policy} | {values} |")
    return "\n".join(lines)


def draw_difficulty(rows, path):
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))

    def curve(axis, part, policy, groups, x, y, **style):
        points = np.array([[*over_seeds(rows, part, policy, g, x)[:1], *over_seeds(rows, part, policy, g, y)]
                           for g in groups])
        axis.errorbar(points[:, 0], points[:, 1], points[:, 2], markersize=4, capsize=2, **style)

    lines = (("raw", "contrastive", "raw reward", "#D55E00", "-", "o"),
             ("contrastive", "contrastive", "contrastive reward", "#0072B2", "--", "s"),
             ("progress", "contrastive", "progress in gold", "#009E73", "-.", "^"),
             ("contrastive", "SFT", "contrastive reward, before training", "#777777", ":", "v"))
    for axis, part, n, name in ((axes[0, 0], "difficulty", len(EDGES), "difficulty of the opening (0 praise, 1 scorn)"),
                                (axes[0, 1], "baseline reward", FIFTHS, "mean reward of the prompt's baselines")):
        for key, policy, label, colour, style, marker in lines:
            curve(axis, part, policy, range(n), "x", key, color=colour, linestyle=style, marker=marker, label=label)
        axis.set(xlabel=name, ylabel="reward, or gold points", title=f"After contrastive PPO, by {part}")
    axes[0, 0].legend(fontsize=8, loc=(0.02, 0.13))

    policies = {"SFT": "0", **{f"{n} iterations": str(n) for n in EARLY}, "ppo": "end"}
    panels = (("share by constant", "extreme", "extreme constants", "-"), ("share by difficulty", "hard", "hard", ":"))
    for part, group, name, style in panels:
        for number, (kind, method) in enumerate((("raw", "ppo"), ("contrastive", "contrastive"))):
            _, colour, _ = style_of(method, 0)
            means, halves = zip(*(over_seeds(rows, part, policy, group, kind) for policy in policies))
            axes[1, 0].errorbar(np.arange(len(policies)) + 0.06 * (2 * number - 1), means, halves, color=colour,
                                linestyle=style, marker="o", markersize=4, capsize=2, label=f"{kind}: third with {name}"
                                if group == "extreme" else f"{kind}: hard third")
    axes[1, 0].axhline(1 / 3, color="black", linewidth=0.8)
    axes[1, 0].set_xticks(range(len(policies)), policies.values())
    axes[1, 0].set(xlabel="iterations of plain PPO", ylabel="share of squared advantages", ylim=(0, 1),
                   title="Who gets the gradient (no critic)")
    axes[1, 0].legend(fontsize=8, loc=(0.3, 0.45))

    for (signal, colour), style, marker in zip(SIGNALS.items(), ("--", "-", ":"), "so^"):
        r = over_seeds(rows, "calibration", "contrastive", "own baselines", f"{signal}: correlation")
        curve(axes[1, 1], "curve", "contrastive", range(TENTHS), f"{signal}: x", f"{signal}: y", color=colour,
              linestyle=style, marker=marker, label=f"{signal}: correlation %.2f ± %.2f" % r)
    axes[1, 1].axhline(0, color="black", linewidth=0.8)
    axes[1, 1].set(xlabel="reward of a prompt (mean of a tenth of the prompts)",
                   ylabel="gold gained over its baselines", title="Calibration after contrastive PPO")
    axes[1, 1].legend(fontsize=8)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    shares_of = {kind: over_seeds(rows, "share by constant", "SFT", "extreme", kind) for kind in ("raw", "contrastive")}
    slope = over_seeds(rows, "calibration", "contrastive", "own baselines", "contrastive reward: slope")
    fresh = over_seeds(rows, "calibration", "contrastive", "fresh SFT", "contrastive reward: correlation")
    figure.suptitle("The third of prompts with the most extreme rater constants takes %.0f%% of the raw gradient and "
                    "%.0f%% of the contrastive one;\na unit of contrastive reward stands for %.2f ± %.2f of gold over "
                    "the same baselines; with gain over fresh SFT responses it correlates by %.2f ± %.2f"
                    % (100 * shares_of["raw"][0], 100 * shares_of["contrastive"][0], *slope, *fresh), fontsize=10)
    return finish(figure, path)
