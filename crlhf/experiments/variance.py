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

import numpy as np
import torch

from ..config import from_dict
from ..evaluate import mean_interval
from ..plots import finish, plt, smooth
from ..policy import generate
from ..runs import stream, write_json
from .estimators import (batch_variance, best_share, components, covariance, gradient_trace, law, score_gradients,
                         windows)
from .harness import (SEEDS, Variant, curves, default, read_json, run_jobs, run_variants, silent_pipeline,
                      write_csv)

BIASES = {"no constant": 0.0, "constant, sd 1": 1.0}  # that raters add to all rewards of a prompt
METHODS = ("ppo", "contrastive", "adaptive")
EARLY = (8, 20)                        # iterations of the shorter runs; the last policy is that of the full run
PROMPTS, SAMPLES = 128, 16             # responses per prompt, of the policy and of the SFT policy
KS, K = (1, 2, 4, 8, 16), 4            # K: along training
SCORED = 4                             # responses per prompt whose gradients are taken
LOGGED = ("reward_variance", "contrastive_variance", "coefficient", "advantage_std")


# --------------------------------------------------------------------------------------- measuring a seed


def analyse(root, name, measure, folders, seeds):
    """Rows that measure(seed, {label: run folder}) finds on finished runs: one process and one JSON a seed.

    A seed that was measured before on the same runs isn't measured again.
    """
    files, jobs = {seed: Path(root) / f"seed{seed}" / f"{name}.json" for seed in seeds}, []
    for seed, file in files.items():
        runs = {label: str(out) for (label, other), out in folders.items() if other == seed}
        prints = [[*label, read_json(Path(out) / "result.json")["fingerprint"]] for label, out in runs.items()]
        if not file.exists() or read_json(file)["runs"] != prints:
            jobs.append((measure_to, str(file), prints, measure, seed, runs))
    run_jobs(jobs, name)
    return [row for file in files.values() for row in read_json(file)["rows"]]


def measure_to(file, prints, measure, seed, runs):
    write_json(file, {"runs": prints, "rows": measure(seed, runs)})


def open_run(folder):
    """The pipeline of a finished run."""
    config = from_dict(read_json(Path(folder) / "config.json"))
    config.run.out = str(folder)
    return silent_pipeline(config, None)


def measure(seed, runs):
    """All numbers of one seed, for both kinds of rater and every policy: rows {seed, setting, iterations, ...}."""
    rows, last = [], default("ppo.iterations")
    for setting in BIASES:
        pipe = open_run(runs[setting, "ppo"])
        baselines = [draw(pipe, pipe.model("sft"), seed, "baselines", use)[0] for use in ("points", "law")]
        for iterations in (0, *EARLY, last):
            pipe = open_run(runs[setting, f"{iterations} iterations" if iterations in EARLY else "ppo"])
            policy = pipe.model("ppo" if iterations else "sft")
            rows += [{"seed": seed, "setting": setting, "iterations": iterations, "quantity": quantity, "k": k,
                      "value": value} for (quantity, k), value in measure_policy(pipe, policy, baselines, seed).items()]
    return rows


def draw(pipe, model, seed, *name):
    """(N, m) rewards of a model's responses to the first training prompts, and their batch."""
    prompts = pipe.prompts("train")[:PROMPTS]
    texts, _, batch = generate(model, pipe.tokenizer(), prompts, pipe.config.data.max_response_tokens,
                               generator=stream(seed, "variance", *name), k=SAMPLES)
    rewards = pipe.noisy_reward()([prompt for prompt in prompts for _ in range(SAMPLES)], texts)
    return rewards.view(len(prompts), SAMPLES), batch


def measure_policy(pipe, policy, baselines, seed):
    """{(quantity, k): value} of one policy. baselines: (N, m) rewards of the SFT policy for the points, for the law."""
    (r, batch), b = draw(pipe, policy, seed, "policy", "points"), baselines[0]
    parts = components(draw(pipe, policy, seed, "policy", "law")[0], baselines[1])
    found = {(name, ""): value for name, value in parts.items()}
    found |= {("slope", ""): covariance(parts) / parts["between_ref"], ("raw", ""): batch_variance(r),
              ("raw law", ""): parts["between"] + parts["within"]}
    advantages = {("gradient, raw", ""): r}
    for k in KS:
        share, contrastive = best_share(parts, k), r - windows(b, k)
        found |= {("coefficient", k): share, ("contrastive", k): batch_variance(contrastive), ("law", k): law(parts, k),
                  ("adaptive", k): batch_variance(r - share * windows(b, k))}
        advantages |= {("gradient, contrastive", k): contrastive, ("gradient, adaptive", k): r - share * windows(b, k)}
        if k < SAMPLES:  # the other responses of the same policy as baselines: never stale
            online = r - windows(r, k, first=1)
            found |= {("online", k): batch_variance(online), ("online law", k): parts["within"] * (1 + 1 / k)}
            advantages |= {("gradient, online", k): online}
    ppo = pipe.config.ppo
    columns = torch.arange(len(batch)).view(-1, SAMPLES)[:, :SCORED].flatten()
    A = torch.stack([values[:, :SCORED].flatten() for values in advantages.values()])  # (kinds, N)
    A = A - A.mean(1, keepdim=True)  # whitening takes the mean of the batch away from raw rewards, too
    square_norms, means = score_gradients(policy, batch[columns], A)
    return found | {key: gradient_trace(square_norms, A[kind], means[kind], ppo.batch_size // ppo.minibatches)
                    for kind, key in enumerate(advantages)}


# ----------------------------------------------------------------------------------------- the experiment


def variance(root, figures, seeds=SEEDS):
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
    variants = {(setting, method): Variant(method, {"world.prompt_bias": sd})
                for setting, sd in BIASES.items() for method in METHODS}
    short = {(setting, f"{n} iterations"): Variant("ppo", {"ppo.iterations": n, "world.prompt_bias": sd})
             for setting, sd in BIASES.items() for n in EARLY}
    folders = run_variants(root, variants | short, seeds, "variance")
    rows = analyse(root, "variance", measure, {(label, seed): out for (label, seed), out in folders.items()
                                               if label[1] not in METHODS[1:]}, seeds)
    steps = curves({key: out for key, out in folders.items() if key[0] in variants}, LOGGED)
    write_csv(figures / "variance.csv", rows)
    write_csv(figures / "variance_training.csv", steps)
    draw_variance(rows, steps, figures / "variance.png")
    return variance_table(rows, steps)


def by_seed(rows, setting, iterations, quantity, k=""):
    mine = [row for row in rows if (row["setting"], row["iterations"], row["quantity"], row["k"]) ==
            (setting, iterations, quantity, k)]
    return torch.tensor([row["value"] for row in sorted(mine, key=lambda row: row["seed"])], dtype=torch.float64)


def ratio(rows, setting, iterations, quantity, k=K):
    """(mean, half-width) over seeds of a variance over that of the raw reward, of the reward or of the gradient."""
    raw = "gradient, raw" if quantity.startswith("gradient") else "raw"
    return mean_interval(by_seed(rows, setting, iterations, quantity, k) / by_seed(rows, setting, iterations, raw))


def threshold(rows, setting, iterations):
    """k* from means over seeds: the terms are added, so their means are the law's; infinite where no k helps."""
    mean = lambda quantity: by_seed(rows, setting, iterations, quantity).mean().item()
    saved = mean("between") - mean("moved")
    return mean("within_ref") / saved if saved > 0 else float("inf")


def law_errors(rows):
    """[(setting, iterations, k, mean, half)] of measured Var(r - b_k) over the law's, minus 1."""
    cells = dict.fromkeys((row["setting"], row["iterations"], row["k"]) for row in rows if row["quantity"] == "law")
    return [(*cell, *mean_interval(by_seed(rows, cell[0], cell[1], "contrastive", cell[2])
                                   / by_seed(rows, cell[0], cell[1], "law", cell[2]) - 1)) for cell in cells]


def logged(steps, setting, method, quantity):
    """(iterations, seeds) numerators and denominators of a logged ratio: reward variances, or spreads of advantages.

    They are kept apart so that they can be averaged over iterations first: late batches may hold no variance at all.
    """
    def columns(method, key):
        mine = [row for row in steps if (row["setting"], row["method"]) == (setting, method)]
        seeds = dict.fromkeys(row["seed"] for row in mine)
        return np.array([[row[key] for row in mine if row["seed"] == seed] for seed in seeds]).T

    if quantity == "variance":
        return columns(method, "contrastive_variance"), columns(method, "reward_variance")
    return columns(method, "advantage_std"), columns("ppo", "advantage_std")


# ----------------------------------------------------------------------------------------- table, figure


def variance_table(rows, steps):
    places = list(dict.fromkeys((row["setting"], row["iterations"]) for row in rows))
    head = ["quantity", *(f"{setting}: {f'after {n}' if n else 'start'}" for setting, n in places)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]

    def line(name, value):
        lines.append(f"| {name} | " + " | ".join(value(*place) for place in places) + " |")

    plain = lambda quantity, k="": lambda *place: "%.2f ± %.2f" % mean_interval(by_seed(rows, *place, quantity, k))
    over = lambda quantity, k=K: lambda *place: "%.2f ± %.2f" % ratio(rows, *place, quantity, k)
    for name, quantity in (("Var(r)", "raw"), ("between prompts, Var_x(m_pi)", "between"),
                           ("within, E[s_pi^2]", "within"), ("Var_x(m_pi - m_ref)", "moved"),
                           ("slope of m_pi on m_ref", "slope")):
        line(name, plain(quantity))
    line("threshold k*", lambda *place: f"{threshold(rows, *place):.1f}".replace("inf", "no k helps"))
    for k in KS:
        line(f"Var(r - b) / Var(r), k = {k}", over("contrastive", k))
    line(f"adaptive, k = {K}: coefficient", plain("coefficient", K))
    line(f"adaptive, k = {K}: ratio", over("adaptive"))
    line(f"online, k = {K}: ratio", over("online"))
    for method in ("contrastive", "adaptive", "online"):
        line(f"gradient, {method}, k = {K}: ratio", over(f"gradient, {method}"))
    found = law_errors(rows)
    inside, worst = sum(abs(mean) <= half for *_, mean, half in found), max(abs(mean) for *_, mean, _ in found)
    lines.append(f"\nMeasured against the law: {inside} of {len(found)} intervals hold it; the largest mean error is "
                 f"{worst:.0%}.\n")
    lines += ["| logged by the runs, over five iterations | first | from a third on | last |",
              "| --- | --- | --- | --- |"]
    for setting in BIASES:
        for method in METHODS[1:]:
            for quantity, name in (("variance", "Var(r - c b) / Var(r)"), ("spread", "sd of advantages / plain PPO's")):
                above, below = logged(steps, setting, method, quantity)
                parts = [slice(0, 5), slice(len(above) // 3, len(above) // 3 + 5), slice(-5, None)]
                values = [mean_interval(above[part].mean(0) / below[part].mean(0)) for part in parts]
                text = " | ".join("%.2f ± %.2f" % value for value in values)
                lines.append(f"| {setting}, {method}: {name} | {text} |")
    return "\n".join(lines)


def draw_variance(rows, steps, path):
    (none, constant), iterations = BIASES, sorted({row["iterations"] for row in rows})
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7.6))
    kinds = {(none, iterations[0]): ("#D55E00", "-", "o"), (none, iterations[-1]): ("#E69F00", "--", "s"),
             (constant, iterations[0]): ("#0072B2", "-", "o"), (constant, iterations[-1]): ("#56B4E9", "--", "s")}
    for (setting, n), (colour, style, marker) in kinds.items():
        raw = by_seed(rows, setting, n, "raw law").mean()
        theory = [by_seed(rows, setting, n, "law", k).mean() / raw for k in KS]
        axes[0, 0].plot(KS, theory, color=colour, linestyle=style)
        means, halves = zip(*(ratio(rows, setting, n, "contrastive", k) for k in KS))
        axes[0, 0].errorbar(KS, means, halves, color=colour, linestyle="", marker=marker, markersize=5, capsize=3,
                            label=f"{setting}: {f'after {n} iterations' if n else 'start'}")
    axes[0, 0].set(xscale="log", yscale="log", xlabel="k, baselines per prompt", ylabel="Var(r − b) / Var(r)",
                   title="Law (lines) and measured (points)")
    axes[0, 0].set_xticks(KS, KS)
    styles = {none: ("o", "-"), constant: ("s", "--")}
    colours = {"contrastive": ("c = 1", "#0072B2"), "adaptive": ("adaptive c", "#009E73"),
               "online": ("online", "#CC79A7")}
    for axis, prefix, name in ((axes[0, 1], "", "reward"), (axes[1, 0], "gradient, ", "gradient (trace of Cov)")):
        for setting, (marker, style) in styles.items():
            for shift, (kind, (label, colour)) in enumerate(colours.items()):
                means, halves = zip(*(ratio(rows, setting, n, prefix + kind) for n in iterations))
                axis.errorbar([n + 0.6 * (shift - 1) for n in iterations], means, halves, color=colour, marker=marker,
                              markersize=4, linestyle=style, capsize=2, label=f"{label}, {setting}")
        axis.set(yscale="log", xlabel="iterations of plain PPO", ylabel="variance / that with the raw reward",
                 title=f"Variance of the {name}, k = {K}", xticks=iterations)
    for setting, (_, style) in styles.items():
        for method in METHODS[1:]:
            label, colour = colours[method]
            above, below = logged(steps, setting, method, "spread")
            ratios = np.array([smooth(a) / smooth(b) for a, b in zip(above.T, below.T)])  # (seeds, iterations)
            means, halves = np.array([mean_interval(column) for column in ratios.T]).T
            axes[1, 1].plot(means, color=colour, linestyle=style, label=f"{label}, {setting}")
            axes[1, 1].fill_between(range(len(means)), means - halves, means + halves, color=colour, alpha=0.15,
                                    linewidth=0)
    axes[1, 1].set(xlabel="PPO iteration", ylabel="sd of advantages / plain PPO's",
                   title="Advantages of PPO with its critic")
    for axis in axes.flat:
        axis.axhline(1, color="black", linewidth=0.8)
        axis.grid(alpha=0.25, which="both")
    for axis, place in ((axes[0, 0], "lower left"), (axes[1, 0], "center right"), (axes[1, 1], "best")):
        axis.legend(fontsize=7, loc=place)  # the upper right panel has the lines of the lower left one
    values = {(setting, n): ratio(rows, setting, n, "contrastive") for setting in BIASES for n in (0, iterations[-1])}
    text = lambda setting: "%.2f ± %.2f to %.2f ± %.2f" % (*values[setting, 0], *values[setting, iterations[-1]])
    worst = max(ratio(rows, setting, n, "adaptive")[0] for setting in BIASES for n in iterations)
    figure.suptitle(f"Over training Var(r − b) / Var(r) at k = {K} goes from {text(none)} without constants per "
                    f"prompt,\nand from {text(constant)} with constants of sd 1; adaptive is at most {worst:.2f}",
                    fontsize=11)
    return finish(figure, path)
