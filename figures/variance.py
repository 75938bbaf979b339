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

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crlhf.engine.files import stream
from crlhf.engine.forward import Model
from crlhf.engine.text import Batch
from crlhf.evaluate import mean_interval
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.plots import plt, save_figure, smooth
from crlhf.policy import generate

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
from .harness import SEEDS, Label, Variant, analyse, curves, default, open_run, run_variants
from .plotting import plot_band, plot_points
from .tables import distinct, markdown, plus_minus, read_rows, select, write_csv

BIASES = {"no constant": 0.0, "constant, sd 1": 1.0}  # that raters add to all rewards of a prompt
METHODS = ("ppo", "contrastive", "adaptive")
EARLY = (8, 20)  # iterations of the shorter runs; the last policy is that of the full run
PROMPTS, SAMPLES = 128, 16  # responses per prompt, of the policy and of the SFT policy
KS, K = (1, 2, 4, 8, 16), 4  # K: along training
SCORED = 4  # responses per prompt whose gradients are taken
LOGGED = ("reward_variance", "contrastive_variance", "coefficient", "advantage_std")


# --------------------------------------------------------------------------------------- measuring a seed


def measure(seed: int, runs: dict[Label, Path]) -> list[dict]:
    """All numbers of one seed, for both kinds of rater and every policy: rows {seed, setting, iterations, ...}."""
    rows, last = [], default("ppo.iterations")
    for setting in BIASES:
        pipe = open_run(runs[setting, "ppo"])
        baselines = [sample_rewards(pipe, pipe.model("sft"), seed, "baselines", use)[0] for use in ("points", "law")]
        for iterations in (0, *EARLY, last):
            pipe = open_run(runs[setting, f"{iterations} iterations" if iterations in EARLY else "ppo"])
            policy = pipe.model("ppo" if iterations else "sft")
            place = {"seed": seed, "setting": setting, "iterations": iterations}
            for (quantity, k), value in measure_policy(pipe, policy, baselines, seed).items():
                rows.append({**place, "quantity": quantity, "k": k, "value": value})
    return rows


def sample_rewards(pipe: Pipeline, model: Model, seed: int, *names: str) -> tuple[Tensor, Batch]:
    """(N, m) rewards of a model's responses to the first training prompts, and their batch."""
    prompts, generator = pipe.prompts("train")[:PROMPTS], stream(seed, "variance", *names)
    length = pipe.config.data.max_response_tokens
    responses, _, batch = generate(model, pipe.tokenizer(), prompts, length, generator=generator, k=SAMPLES)
    rewards = pipe.noisy_reward()([prompt for prompt in prompts for _ in range(SAMPLES)], responses)
    return rewards.view(len(prompts), SAMPLES), batch


def measure_policy(pipe: Pipeline, policy: Model, baselines: list[Tensor], seed: int) -> dict[tuple, float]:
    """{(quantity, k): value} of one policy. baselines: (N, m) rewards of the SFT policy for the points, for the law."""
    (r, batch), b = sample_rewards(pipe, policy, seed, "policy", "points"), baselines[0]
    parts = components(sample_rewards(pipe, policy, seed, "policy", "law")[0], baselines[1])
    found = {(name, ""): value for name, value in parts.items()}
    found["slope", ""] = covariance(parts) / parts["between_ref"]
    found["raw", ""] = batch_variance(r)
    found["raw law", ""] = parts["between"] + parts["within"]
    advantages = {("raw", ""): r}
    for k in KS:
        share = best_share(parts, k)
        found["coefficient", k] = share
        advantages["contrastive", k] = r - windows(b, k)
        found["contrastive", k] = batch_variance(advantages["contrastive", k])
        found["law", k] = law(parts, k)
        advantages["adaptive", k] = r - share * windows(b, k)
        found["adaptive", k] = batch_variance(advantages["adaptive", k])
        if k < SAMPLES:  # the other responses of the same policy as baselines: never stale
            advantages["online", k] = r - windows(r, k, first=1)
            found["online", k] = batch_variance(advantages["online", k])
            found["online law", k] = parts["within"] * (1 + 1 / k)
    columns = torch.arange(len(batch)).view(-1, SAMPLES)[:, :SCORED].flatten()
    A = torch.stack([values[:, :SCORED].flatten() for values in advantages.values()])  # (kinds, N)
    A = A - A.mean(1, keepdim=True)  # whitening takes the mean of the batch away from raw rewards, too
    square_norms, means = score_gradients(policy, batch[columns], A)
    minibatch = pipe.config.ppo.batch_size // pipe.config.ppo.minibatches
    for kind, (name, k) in enumerate(advantages):
        found[f"gradient, {name}", k] = gradient_trace(square_norms, A[kind], means[kind], minibatch)
    return found


# ----------------------------------------------------------------------------------------- the experiment


def variance(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:8]) -> str:
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
    variants, short = {}, {}
    for setting, sd in BIASES.items():
        for method in METHODS:
            variants[setting, method] = Variant(method, {"world.prompt_bias": sd})
        for n in EARLY:
            short[setting, f"{n} iterations"] = Variant("ppo", {"ppo.iterations": n, "world.prompt_bias": sd})
    folders = run_variants(root, variants | short, seeds, "variance")
    plain = {(label, seed): out for (label, seed), out in folders.items() if label[1] not in METHODS[1:]}
    rows = analyse(root, "variance", measure, plain, seeds)
    steps = curves({key: out for key, out in folders.items() if key[0] in variants}, LOGGED)
    write_csv(figures / "variance.csv", rows)
    write_csv(figures / "variance_training.csv", steps)
    plot_variance(*(read_rows(figures / f"variance{part}.csv") for part in ("", "_training")), figures / "variance.png")
    return report(figures)


def report(figures: Path) -> str:
    return variance_table(*(read_rows(figures / f"variance{part}.csv") for part in ("", "_training")))


def by_seed(rows: list[dict], setting: str, iterations: int, quantity: str, k: int | str = "") -> Tensor:
    """(seeds,) values of one quantity."""
    chosen = select(rows, setting=setting, iterations=iterations, quantity=quantity, k=k)
    return torch.tensor([row["value"] for row in sorted(chosen, key=lambda row: row["seed"])], dtype=torch.float64)


def ratio(rows: list[dict], setting: str, iterations: int, quantity: str, k: int = K) -> tuple[float, float]:
    """(mean, half) over seeds of a variance over that of the raw reward, of the reward or of the gradient."""
    raw = "gradient, raw" if quantity.startswith("gradient") else "raw"
    return mean_interval(by_seed(rows, setting, iterations, quantity, k) / by_seed(rows, setting, iterations, raw))


def threshold(rows: list[dict], setting: str, iterations: int) -> float:
    """k* from means over seeds: the terms are added, so their means are the law's; infinite where no k helps."""
    names = ("between", "moved", "within_ref")
    between, moved, within_ref = (by_seed(rows, setting, iterations, name).mean().item() for name in names)
    return within_ref / (between - moved) if between > moved else float("inf")


def law_errors(rows: list[dict]) -> list[tuple[float, float]]:
    """[(mean, half)] of measured Var(r - b_k) over the law's, minus 1, of every setting, policy and k."""
    errors = []
    predictions = select(rows, quantity="law")
    for setting, iterations, k in dict.fromkeys((row["setting"], row["iterations"], row["k"]) for row in predictions):
        measured, predicted = (by_seed(rows, setting, iterations, name, k) for name in ("contrastive", "law"))
        errors.append(mean_interval(measured / predicted - 1))
    return errors


def logged(steps: list[dict], setting: str, method: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, seeds) numerators and denominators of a logged ratio: reward variances, or spreads of advantages.

    They are kept apart so that they can be averaged over iterations first: late batches may hold no variance at all.
    """
    if quantity == "variance":
        above, below = (method, "contrastive_variance"), (method, "reward_variance")
    else:
        above, below = (method, "advantage_std"), ("ppo", "advantage_std")
    return logged_columns(steps, setting, *above), logged_columns(steps, setting, *below)


def logged_columns(steps: list[dict], setting: str, method: str, key: str) -> np.ndarray:
    chosen = select(steps, setting=setting, method=method)
    return np.array([[row[key] for row in select(chosen, seed=seed)] for seed in distinct(chosen, "seed")]).T


# ----------------------------------------------------------------------------------------- table, figure

KINDS = {"contrastive": ("c = 1", "#0072B2"), "adaptive": ("adaptive c", "#009E73"), "online": ("online", "#CC79A7")}
LINES = {"no constant": "-", "constant, sd 1": "--"}
MARKERS = {"no constant": "o", "constant, sd 1": "s"}


def variance_table(rows: list[dict], steps: list[dict]) -> str:
    places = list(dict.fromkeys((row["setting"], row["iterations"]) for row in rows))

    def level(name: str, quantity: str, k: int | str = "") -> list[str]:
        pairs = [mean_interval(by_seed(rows, *place, quantity, k)) for place in places]
        return [name] + [plus_minus(pair) for pair in pairs]

    def share(name: str, quantity: str, k: int = K) -> list[str]:
        return [name] + [plus_minus(ratio(rows, *place, quantity, k)) for place in places]

    thresholds = [threshold(rows, *place) for place in places]
    lines = [
        level("Var(r)", "raw"),
        level("between prompts, Var_x(m_pi)", "between"),
        level("within, E[s_pi^2]", "within"),
        level("Var_x(m_pi - m_ref)", "moved"),
        level("slope of m_pi on m_ref", "slope"),
        ["threshold k*"] + ["no k helps" if k == float("inf") else f"{k:.1f}" for k in thresholds],
    ]
    lines += [share(f"Var(r - b) / Var(r), k = {k}", "contrastive", k) for k in KS]
    lines.append(level(f"adaptive, k = {K}: coefficient", "coefficient", K))
    lines += [share(f"{kind}, k = {K}: ratio", kind) for kind in ("adaptive", "online")]
    for kind in ("gradient, contrastive", "gradient, adaptive", "gradient, online"):
        lines.append(share(f"{kind}, k = {K}: ratio", kind))
    head = ["quantity"] + [f"{setting}: {f'after {n}' if n else 'start'}" for setting, n in places]

    errors = law_errors(rows)
    inside, worst = sum(abs(mean) <= half for mean, half in errors), max(abs(mean) for mean, _ in errors)
    fit = f"Measured against the law: {inside} of {len(errors)} intervals hold it; "
    fit += f"the largest mean error is {worst:.0%}."
    return "\n\n".join([markdown(head, lines), fit, logged_table(steps)])


def logged_table(steps: list[dict]) -> str:
    """Ratios that the runs logged themselves, early, later and at the end."""
    lines, names = [], {"variance": "Var(r - c b) / Var(r)", "spread": "sd of advantages / plain PPO's"}
    for setting in BIASES:
        for method in METHODS[1:]:
            for quantity, name in names.items():
                above, below = logged(steps, setting, method, quantity)
                third = len(above) // 3
                cells = [f"{setting}, {method}: {name}"]
                for part in (slice(0, 5), slice(third, third + 5), slice(-5, None)):
                    cells.append(plus_minus(mean_interval(above[part].mean(0) / below[part].mean(0))))
                lines.append(cells)
    return markdown(["logged by the runs, over five iterations", "first", "from a third on", "last"], lines)


def plot_variance(rows: list[dict], steps: list[dict], path: Path) -> str:
    iterations = sorted(distinct(rows, "iterations"))
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))
    plot_law(axes[0, 0], rows, iterations)
    plot_ratios(axes[0, 1], rows, iterations, "")
    axes[0, 1].set_title(f"Variance of the reward, k = {K}")
    plot_ratios(axes[1, 0], rows, iterations, "gradient, ")
    axes[1, 0].set_title(f"Variance of the gradient (trace of Cov), k = {K}")
    plot_spreads(axes[1, 1], steps)
    for axis in axes.flat:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.25, which="both")
    for axis, columns in ((axes[0, 0], 1), (axes[0, 1], 2), (axes[1, 0], 2)):
        axis.set_ylim(0.003, 30)  # room below the lines
        axis.legend(fontsize=7, loc="lower left", ncols=columns)
    axes[1, 1].legend(fontsize=8, loc="upper left")
    changes = []
    for setting in BIASES:
        start, end = (plus_minus(ratio(rows, setting, n, "contrastive")) for n in (0, iterations[-1]))
        changes.append(f"{start} to {end}")
    worst = max(ratio(rows, setting, n, "adaptive")[0] for setting in BIASES for n in iterations)
    figure.suptitle(
        f"Over training Var(r − b) / Var(r) at k = {K} goes from {changes[0]} without constants per prompt,\n"
        f"and from {changes[1]} with constants of sd 1; adaptive is at most {worst:.2f}",
        fontsize=11,
    )
    return save_figure(figure, path)


def plot_law(axis: plt.Axes, rows: list[dict], iterations: list[int]) -> None:
    """Over k, at the start and at the end: the law as lines, what was measured as points."""
    for setting, (early, late) in zip(BIASES, (("#D55E00", "#E69F00"), ("#0072B2", "#56B4E9"))):
        for n, color, line, marker in ((iterations[0], early, "-", "o"), (iterations[-1], late, "--", "s")):
            raw = by_seed(rows, setting, n, "raw law").mean()
            axis.plot(KS, [by_seed(rows, setting, n, "law", k).mean() / raw for k in KS], color=color, linestyle=line)
            pairs = [ratio(rows, setting, n, "contrastive", k) for k in KS]
            label = f"{setting}: after {n} iterations" if n else f"{setting}: start"
            points = {"linestyle": "", "marker": marker, "markersize": 5, "capsize": 3}
            plot_points(axis, KS, pairs, color=color, label=label, **points)
    axis.set(xscale="log", yscale="log", xlabel="k, baselines per prompt", ylabel="Var(r − b) / Var(r)")
    axis.set_title("Law (lines) and measured (points)")
    axis.set_xticks(KS, KS)


def plot_ratios(axis: plt.Axes, rows: list[dict], iterations: list[int], prefix: str) -> None:
    """Along training: variances of the reward, or with a prefix of its gradient, over those of the raw reward."""
    for setting in BIASES:
        for number, (kind, (label, color)) in enumerate(KINDS.items()):
            x = [n + 0.6 * (number - 1) for n in iterations]
            pairs = [ratio(rows, setting, n, prefix + kind) for n in iterations]
            style = {"marker": MARKERS[setting], "linestyle": LINES[setting]}
            plot_points(axis, x, pairs, color=color, label=f"{label}, {setting}", **style)
    axis.set(yscale="log", xlabel="iterations of plain PPO", ylabel="variance / that with the raw reward")
    axis.set_xticks(iterations)


def plot_spreads(axis: plt.Axes, steps: list[dict]) -> None:
    for setting in BIASES:
        for method in METHODS[1:]:
            above, below = logged(steps, setting, method, "spread")
            ratios = np.array([smooth(own) / smooth(plain) for own, plain in zip(above.T, below.T)])
            label, color = KINDS[method]
            plot_band(axis, ratios, color, linestyle=LINES[setting], label=f"{label}, {setting}")
    axis.set(xlabel="PPO iteration", ylabel="sd of advantages / plain PPO's")
    axis.set_title("Advantages of PPO with its critic")
