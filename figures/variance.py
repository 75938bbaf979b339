"""The variance law along training: when does a baseline from the SFT policy take variance away, and when add some?

With m(x) and s^2(x) the mean and variance of the reward given the prompt, for the policy and for the SFT policy,

    Var(r)        = Var_x(m_pi)         + E[s_pi^2]
    Var(r - b_k)  = Var_x(m_pi - m_ref) + E[s_pi^2] + E[s_ref^2] / k,      b_k the mean of k baselines.

The contrast reduces variance if and only if k is above the threshold

    k* = E[s_ref^2] / (Var_x(m_pi) - Var_x(m_pi - m_ref)),

which is E[s^2] / Var_x(m) at the start. The divisor is 2 Cov_x(m_pi, m_ref) - Var_x(m_ref): once the slope of m_pi
on m_ref over prompts is below 1/2, it is negative and no k helps. That is what a stale baseline means, in a number.

The law's four terms come from responses of their own; the points it is compared with come from others to the same
prompts, so the law can fail.
"""

from pathlib import Path

import torch
from torch import Tensor

from crlhf.engine.files import stream
from crlhf.engine.forward import Model
from crlhf.engine.text import Batch
from crlhf.evaluate import mean_interval
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.tables import markdown_table

from .estimators import (
    batch_variance,
    best_share,
    components,
    covariance,
    gradient_trace,
    law,
    score_gradients,
    windows,
)
from .harness import Label, Study, Variant, curves
from .plotting import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    Axes,
    Figure,
    curves_by_seed,
    describe,
    finished,
    panels,
    plot_points,
    zero_line,
)
from .runs import default, open_run, sample_texts
from .tables import Pair, Rows, Values, one_value_rows, plus_minus, read_results

BIASES = {"no constant": 0.0, "constant, sd 1": 1.0}  # that raters add to all rewards of a prompt
METHODS = ("ppo", "contrastive", "adaptive")
EARLY = (8, 20)  # iterations of the shorter runs; the last policy is that of the full run
PROMPTS, SAMPLES = 128, 16  # responses per prompt, of the policy and of the SFT policy
KS, K = (1, 2, 4, 8, 16), 4  # K: along training
SCORED = 4  # responses per prompt whose gradients are taken

COLUMNS = ("setting", "iterations", "quantity", "k")
Place = tuple[str, int]  # (setting, iterations of PPO)


def variance(study: Study) -> str:
    """How much variance does the contrast take away, of rewards and of gradients, and when does it turn around?

    Prediction. (1) Every measured Var(r - b_k) is the law's, within its interval. (2) At the start k* = E[s^2] /
    Var_x(m). The tutorial's run had 0.06 between prompts and 0.38 within: k* is about 6 without constants and 0.4
    with constants of standard deviation 1, and at k = 4 the ratio Var(r - b) / Var(r) about 1.1 and 0.35.
    (3) Without constants training makes prompts alike, so the slope of m_pi on m_ref falls below 1/2, from where no
    k helps: the ratio grows to several. With constants, which no training removes, the slope stays near 1 and the
    ratio well below 1. (4) The adaptive coefficient keeps the ratio at or below 1 in all cases, close to that of
    c = 1 where this is good. Baselines from the current policy are never stale, but without anything between prompts
    they only add noise: ratio 1 + 1/k. (5) The variance of the gradient follows that of the reward (the
    expected gradient is the same for all, so its ratio is one of noise to signal), by ratios within some 20%: long
    responses have longer scores, which the law doesn't know. (6) PPO's advantages are spread less than plain PPO's
    by the square root of (2) with constants, and about equally without; a critic that learns pulls both towards 1.
    """
    full = {}
    short = {}
    for setting, sd in BIASES.items():
        for method in METHODS:
            full[setting, method] = Variant(method, {"world.prompt_bias": sd})
        for n in EARLY:
            short[setting, early_name(n)] = Variant("ppo", {"ppo.iterations": n, "world.prompt_bias": sd})
    folders = study.run(full | short)
    plain = {key: out for key, out in folders.items() if key[0][1] not in METHODS[1:]}
    study.write(study.measure(measure_variance, plain, "variance"))
    steps = curves({key: out for key, out in folders.items() if key[0] in full}, ("advantage_std",))
    study.write(steps, "_training")
    return study.answer(variance_report, plot_variance)


def early_name(iterations: int) -> str:
    """The label of a shorter run."""
    return f"{iterations} iterations"


# --------------------------------------------------------------------------------------- measuring a seed


def measure_variance(seed: int, runs: dict[Label, Path]) -> Rows:
    """All numbers of one seed, for both kinds of rater and every policy: rows {seed, setting, iterations, ...}."""
    last = default("ppo.iterations")
    measured = {}
    for setting in BIASES:
        sft = open_run(runs[setting, "ppo"])
        baselines = [sample_rewards(sft, sft.model("sft"), "baselines", use)[0] for use in ("points", "law")]
        for iterations in (0, *EARLY, last):
            run = open_run(runs[setting, early_name(iterations) if iterations in EARLY else "ppo"])
            policy = run.model("ppo" if iterations else "sft")
            for (quantity, k), value in measure_policy(run, policy, baselines).items():
                measured[setting, iterations, quantity, k] = value
    return one_value_rows(seed, COLUMNS, measured)


def sample_rewards(pipe: Pipeline, policy: Model, *names: str) -> tuple[Tensor, Batch]:
    """(N, m) rewards of a policy's responses to the first training prompts, and their batch."""
    generator = stream(pipe.config.run.seed, "variance", *names)
    prompts, responses, batch = sample_texts(pipe, policy, pipe.prompts("train")[:PROMPTS], generator, SAMPLES)
    return pipe.noisy_reward()(prompts, responses).view(-1, SAMPLES), batch


def measure_policy(pipe: Pipeline, policy: Model, baselines: list[Tensor]) -> dict[tuple, float]:
    """{(quantity, k): value} of one policy. baselines: (N, m) rewards of the SFT policy for the points, for the law."""
    r, batch = sample_rewards(pipe, policy, "policy", "points")
    b, b_of_law = baselines
    parts = components(sample_rewards(pipe, policy, "policy", "law")[0], b_of_law)
    measured = {(name, ""): value for name, value in parts.items()}
    measured["slope", ""] = covariance(parts) / parts["between_ref"]
    measured["raw", ""] = batch_variance(r)
    for k in KS:
        measured["contrastive", k] = batch_variance(r - windows(b, k))
        measured["law", k] = law(parts, k)
    share = best_share(parts, K)
    measured["coefficient", K] = share
    measured["adaptive", K] = batch_variance(r - share * windows(b, K))
    measured["online", K] = batch_variance(r - windows(r, K, first=1))  # the policy's other responses: never stale
    return measured | gradient_variances(pipe, policy, batch, {"raw": r, "contrastive": r - windows(b, K)})


def gradient_variances(pipe: Pipeline, policy: Model, batch: Batch, rewards: dict[str, Tensor]) -> dict[tuple, float]:
    """{("gradient, NAME", K): trace of the covariance of a minibatch's gradient} for each kind of reward."""
    columns = torch.arange(len(batch)).view(-1, SAMPLES)[:, :SCORED].flatten()
    A = torch.stack([values[:, :SCORED].flatten() for values in rewards.values()])  # (kinds, N)
    A = A - A.mean(1, keepdim=True)  # whitening takes the mean of the batch away from raw rewards, too
    square_norms, means = score_gradients(policy, batch[columns], A)
    minibatch = pipe.config.ppo.batch_size // pipe.config.ppo.minibatches
    measured = {}
    for kind, name in enumerate(rewards):
        measured[f"gradient, {name}", K] = gradient_trace(square_norms, A[kind], means[kind], minibatch)
    return measured


# ------------------------------------------------------------------------------------- what the rows say


def places_of(values: Values) -> list[Place]:
    return list(dict.fromkeys((setting, iterations) for setting, iterations, *_ in values.by_place))


def ratio_to_raw(values: Values, place: Place, quantity: str, k: int = K) -> Pair:
    """(mean, half) over seeds of a variance over that of the raw reward, of the reward or of the gradient."""
    raw = values[*place, "gradient, raw", K] if quantity.startswith("gradient") else values[*place, "raw", ""]
    return mean_interval(values[*place, quantity, k] / raw)


def threshold(values: Values, place: Place) -> str:
    """k* from means over seeds: the terms are added, so their means are the law's."""
    between = values[*place, "between", ""].mean()
    moved = values[*place, "moved", ""].mean()
    within_ref = values[*place, "within_ref", ""].mean()
    return f"{within_ref / (between - moved):.1f}" if between > moved else "no k helps"


def fit_of_law(values: Values) -> str:
    """Measured Var(r - b_k) beside the law's, of every setting, policy and k."""
    errors = []
    for place in places_of(values):
        for k in KS:
            errors.append(mean_interval(values[*place, "contrastive", k] / values[*place, "law", k] - 1))
    inside = sum(abs(mean) <= half for mean, half in errors)
    worst = max(abs(mean) for mean, _ in errors)
    held = f"Measured against the law: {inside} of {len(errors)} intervals hold it"
    return f"{held}; the largest mean error is {worst:.0%}."


# ----------------------------------------------------------------------------------------- table, figure


def variance_report(figures: Path) -> str:
    values = Values(read_results(figures, "variance"), *COLUMNS)
    spreads = spreads_table(read_results(figures, "variance_training"))
    return "\n\n".join([terms_table(values), fit_of_law(values), spreads])


def terms_table(values: Values) -> str:
    """The law's terms, and variances over that of the raw reward, in every setting and of every policy."""
    places = places_of(values)

    def level(name: str, quantity: str, k: int | str = "") -> list[str]:
        return [name, *(values.text(*place, quantity, k) for place in places)]

    def ratio(name: str, quantity: str, k: int = K) -> list[str]:
        return [name, *(plus_minus(ratio_to_raw(values, place, quantity, k)) for place in places)]

    lines = [
        level("Var(r)", "raw"),
        level("between prompts, Var_x(m_pi)", "between"),
        level("within, E[s_pi^2]", "within"),
        level("Var_x(m_pi - m_ref)", "moved"),
        level("slope of m_pi on m_ref", "slope"),
        ["threshold k*", *(threshold(values, place) for place in places)],
    ]
    lines += [ratio(f"Var(r - b) / Var(r), k = {k}", "contrastive", k) for k in KS]
    lines.append(level(f"adaptive, k = {K}: coefficient", "coefficient", K))
    for kind in ("adaptive", "online", "gradient, contrastive"):
        lines.append(ratio(f"{kind}, k = {K}: ratio", kind))
    head = ["quantity", *(f"{setting}: {f'after {n}' if n else 'start'}" for setting, n in places)]
    return markdown_table(head, lines)


def spreads_table(steps: Rows) -> str:
    """How far PPO's advantages spread, early, later and at the end. (Over single batches a ratio may be anything.)"""
    lines = []
    for setting in BIASES:
        plain = curves_by_seed(steps, "advantage_std", setting=setting, method="ppo")
        third = plain.shape[1] // 3
        for method in METHODS[1:]:
            spread = curves_by_seed(steps, "advantage_std", setting=setting, method=method)
            cells = [f"{setting}, {method}"]
            for part in (slice(0, 5), slice(third, third + 5), slice(-5, None)):
                cells.append(plus_minus(mean_interval(spread[:, part].mean(1) / plain[:, part].mean(1))))
            lines.append(cells)
    head = ["sd of advantages / plain PPO's, over five iterations", "first", "from a third on", "last"]
    return markdown_table(head, lines)


def plot_variance(figures: Path) -> Figure:
    values = Values(read_results(figures, "variance"), *COLUMNS)
    iterations = sorted({n for _, n in places_of(values)})
    figure, (left, right) = panels(1, 2, 10.5, 4.4)
    plot_law(left, values, iterations[-1])
    plot_ratios(right, values, iterations)
    for axis in (left, right):
        zero_line(axis, at=1)
        axis.set_ylim(0.006, 30)  # room below the lines
        axis.legend(fontsize=8, loc="lower left")
    return finished(figure)


def plot_law(axis: Axes, values: Values, last: int) -> None:
    """Over k, at the start and at the end: the law as lines, what was measured as points."""
    for setting, n, color, line, marker in (
        ("no constant", 0, RED, "-", "o"),
        ("no constant", last, ORANGE, "--", "s"),
        ("constant, sd 1", 0, BLUE, "-", "o"),
        ("constant, sd 1", last, "#56B4E9", "--", "s"),
    ):
        raw = values[setting, n, "between", ""].mean() + values[setting, n, "within", ""].mean()
        predicted = [values[setting, n, "law", k].mean() / raw for k in KS]
        axis.plot(KS, predicted, color=color, linestyle=line)
        pairs = [ratio_to_raw(values, (setting, n), "contrastive", k) for k in KS]
        label = f"{setting}: after {n} iterations" if n else f"{setting}: start"
        plot_points(axis, KS, pairs, color=color, label=label, linestyle="", marker=marker)
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(KS, KS)
    describe(axis, "Law (lines) and measured (points)", "k, baselines per prompt", "Var(r − b) / Var(r)")


def plot_ratios(axis: Axes, values: Values, iterations: list[int]) -> None:
    """Along training: the variance of the reward with c = 1 and with the adaptive share, over that of the raw one."""
    for setting, line in (("no constant", "-"), ("constant, sd 1", "--")):
        for kind, color in (("contrastive", BLUE), ("adaptive", GREEN)):
            pairs = [ratio_to_raw(values, (setting, n), kind) for n in iterations]
            plot_points(axis, iterations, pairs, color=color, linestyle=line, label=f"{kind}, {setting}")
    axis.set_yscale("log")
    axis.set_xticks(iterations)
    describe(axis, f"Along training, k = {K}", "iterations of plain PPO", "variance / that of the raw reward")
