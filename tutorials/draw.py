"""The figures that the pages draw, one function each. No page asks you to read them."""

import matplotlib.pyplot as plt
import torch

from crlhf.config import METHODS
from crlhf.contrastive import contrast
from crlhf.evaluate import column
from figures.tables import distinct, select
from tutorials.start import show

# ----------------------------------------------------------------------------------------- 0. the whole thing

PLAIN, OURS = "#eeeeea", "#cfe4f5"
BOXES = {  # name: (x, y, text, colour)
    "x": (3.4, 4.9, "prompts x", PLAIN),
    "step": (0, 3.9, "clipped step", PLAIN),
    "policy": (3.4, 3.9, "policy π", PLAIN),
    "sft": (5.15, 3.9, "SFT policy", PLAIN),
    "whiten": (0, 2.6, "whiten", PLAIN),
    "ref": (1.8, 2.6, "reference\nπ_ref", PLAIN),
    "rm": (3.4, 2.6, "reward\nmodel", PLAIN),
    "rm before": (5.15, 2.6, "reward\nmodel", PLAIN),
    "gae": (0, 1.3, "GAE", PLAIN),
    "token rewards": (1.8, 1.3, "token rewards:\n- β KL, reward\non the last", PLAIN),
    "eos": (3.4, 1.3, "missing-EOS\npenalty", PLAIN),
    "eos before": (5.15, 1.3, "missing-EOS\npenalty", PLAIN),
    "critic": (0, 0, "critic V", PLAIN),
    "scale": (1.8, 0, "scale α\n(optional)", OURS),
    "contrast": (3.4, 0, "contrast\nr - c b", OURS),
    "b": (5.15, 0, "mean over k:\nbaseline b(x)", OURS),
}
ARROWS = {  # (from, to): what flows and its shape
    ("sft", "rm before"): "k responses\n(B k, T)",
    ("rm before", "eos before"): "(B, k)",
    ("eos before", "b"): "(B, k)",
    ("b", "contrast"): "b (B,)",
    ("x", "policy"): "(B, P)",
    ("policy", "rm"): "y (B, T)",
    ("rm", "eos"): "r (B,)",
    ("eos", "contrast"): "r (B,)",
    ("contrast", "scale"): "(B,)",
    ("policy", "ref"): "y, log_probs\n(B, T)",
    ("ref", "token rewards"): "(B, T)",
    ("scale", "token rewards"): "(B,)",
    ("token rewards", "gae"): "R\n(B, T)",
    ("critic", "gae"): "V (B, T)",
    ("gae", "whiten"): "A (B, T)",
    ("whiten", "step"): "A (B, T)",
    ("step", "policy"): "new weights",
}


def picture():
    """The data flow of PPO with contrastive rewards, shapes on the arrows."""
    figure, axis = plt.subplots(figsize=(6.8, 6))
    drawn = {}
    for name, (x, y, text, colour) in BOXES.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "#777777"}
        drawn[name] = axis.text(x, y, text, ha="center", va="center", fontsize=10, bbox=box, zorder=3)
    for (first, second), label in ARROWS.items():
        ends = {"patchA": drawn[first].get_bbox_patch(), "patchB": drawn[second].get_bbox_patch(), "shrinkB": 2}
        (x0, y0), (x1, y1) = BOXES[first][:2], BOXES[second][:2]
        axis.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", **ends})
        if x0 == x1:
            axis.text(x0 + 0.07, (y0 + y1) / 2, label, ha="left", va="center", fontsize=9)
        elif y0 == y1:
            axis.text((x0 + x1) / 2, y0 + 0.06, label, ha="center", va="bottom", fontsize=9)
        else:
            axis.text((x0 + x1) / 2 - 0.1, (y0 + y1) / 2 + 0.1, label, ha="right", va="bottom", fontsize=9)
    bend = {"arrowstyle": "->", "connectionstyle": "arc3,rad=0.6"}
    bend |= {"patchA": drawn["gae"].get_bbox_patch(), "patchB": drawn["critic"].get_bbox_patch()}
    axis.annotate("", BOXES["critic"][:2], BOXES["gae"][:2], arrowprops=bend)
    axis.text(-0.5, 0.65, "returns\nA + V\n(B, T)", ha="right", va="center", fontsize=9)
    axis.text(5.15, 4.35, "once, before PPO:", ha="center", fontsize=10, style="italic", va="center")
    axis.text(-0.4, 4.9, "in every iteration:", fontsize=10, style="italic", va="center")
    axis.set(xlim=(-1.05, 6.1), ylim=(-0.4, 5.2))
    axis.axis("off")
    show(figure, "00_picture")


# ------------------------------------------------------------------------------------------------- 1. policy


def temperature(words, logits):
    """Probabilities of the next word at three temperatures. words: the names of the (n,) likeliest logits."""
    figure, axis = plt.subplots(figsize=(7, 3))
    places = torch.arange(len(words)).numpy()
    for number, tau in enumerate((0.5, 1.0, 2.0)):
        probabilities = (logits / tau).softmax(0)[: len(words)].numpy()
        axis.bar(places + 0.27 * (number - 1), probabilities, 0.25, label=f"τ = {tau:g}")
    axis.set_xticks(places, words, rotation=20)
    axis.set(title="after “the plot was dull . i”", ylabel="probability")
    axis.legend()
    show(figure, "01_temperature")


def distance(gold, trained_gold, log_ratio):
    """What responses are worth before and after training, and how much likelier the trained policy makes its own."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    left.hist(gold.numpy(), bins=20, alpha=0.6, label=f"SFT, mean {gold.mean():+.2f}")
    left.hist(trained_gold.numpy(), bins=20, alpha=0.6, label=f"trained, mean {trained_gold.mean():+.2f}")
    left.set(xlabel="gold", ylabel="responses", title="What they are worth", ylim=(0, 45))
    left.legend(loc="upper left", fontsize=9)
    right.hist(log_ratio.numpy(), bins=30, color="C1")
    right.axvline(0, color="black", linewidth=0.8)
    right.set(xlabel="log π(y|x) − log π_ref(y|x), nats", title="How much likelier training made each response")
    show(figure, "01_distance")


# ------------------------------------------------------------------------------------------- 2. reward model


def right(gold, scores):
    """Reward model against gold: means of prompts, and deviations from them. gold, scores: (N, k)."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    parts = {
        "Means of prompts": lambda values: values.mean(1),
        "Deviations from the prompt's mean": lambda values: (values - values.mean(1, keepdim=True)).flatten(),
    }
    for axis, (title, part) in zip(axes, parts.items()):
        axis.scatter(part(gold), part(scores), s=8, alpha=0.5)
        axis.set(title=title, xlabel="gold", ylabel="reward model")
    show(figure, "02_right")


def flips(rates):
    """The difference that Bradley-Terry learns against the true one, for several shares of flipped labels."""
    figure, axis = plt.subplots(figsize=(6, 3.4))
    delta = torch.linspace(-5, 5, 101)
    for rate in rates:
        seen = rate + (1 - 2 * rate) * torch.sigmoid(delta)
        axis.plot(delta, torch.logit(seen), label=f"{rate:.0%} of labels flipped")
    axis.set(xlabel="true difference Δ", ylabel="difference that is learned", ylim=(-5, 5))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    show(figure, "02_flips")


# ---------------------------------------------------------------------------------------------------- 3. PPO


def clip(clip_range):
    """The clipped loss as a function of the ratio, for a good and for a bad token."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    ratio = torch.linspace(0.5, 1.6, 200)
    for axis, advantage in zip(axes, (1.0, -1.0)):
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        axis.plot(ratio, torch.maximum(-advantage * ratio, -advantage * clipped))
        axis.axvline(1.0, color="grey", linestyle=":")
        axis.set(title=f"advantage {advantage:+.0f}", xlabel="ratio", ylabel="loss")
    show(figure, "03_clip")


def bugs(logs):
    """Gold, KL and length over iterations. logs: {name: rows}, the correct loop first."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    axes[1].set_yscale("symlog", linthresh=10)
    for axis, key in zip(axes, ("gold", "KL", "length")):
        for number, (name, log) in enumerate(logs.items()):
            curve = [row[key] for row in log]
            axis.plot(curve, label=name, color=f"C{number}", linewidth=1.2 if number else 2.5)
        axis.set(title=key, xlabel="iteration", xticks=range(0, len(curve), 2))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    show(figure, "03_bugs")


# -------------------------------------------------------------------------------------------- 4. contrastive


def subtract(clean, raw, contrastive):
    """Raw and contrastive rewards against the reward without the prompts' constants."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4))
    for axis, values, name in zip(axes, (raw, contrastive), ("raw reward r", "contrastive reward r − b")):
        axis.scatter(clean, values, s=8, alpha=0.6)
        axis.set(title=name, xlabel="reward without the constant", ylabel=name)
    show(figure, "04_subtract")


def whitening(advantages, level):
    """Histograms of whitened advantages of a low and a high prompt. advantages: {name: (n,)}; level: (n,)."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3), sharey=True)
    for axis, (name, values) in zip(axes, advantages.items()):
        for value, label in ((level.min(), "low prompt"), (level.max(), "high prompt")):
            axis.hist(values[level == value].numpy(), bins=40, alpha=0.6, label=label)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=name, xlabel="whitened advantage")
    axes[1].legend(loc="upper left")
    show(figure, "04_whitening")


# ------------------------------------------------------------------------------------------------ 5. variance

K = (1, 2, 4, 8, 16)


def law(measured):
    """Variance of the contrastive reward against k. measured: {bias: (law's, measured ones, variance of raw r)}."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, (bias, (predicted, counted, raw)) in zip(axes, measured.items()):
        axis.plot(K, predicted, label="law, from two numbers")
        axis.plot(K, counted, "o", label="measured, r − mean of k")
        axis.axhline(raw, color="C3", linestyle="--", label="measured, raw r")
        axis.set(title=f"constant per prompt: sd {bias:g}", xlabel="k", ylabel="variance", xscale="log", ylim=(0, None))
        axis.set_xticks(K, K)
    axes[0].legend()
    show(figure, "05_law")


def slope(cases):
    """Mean reward of prompts under a policy against that under SFT. cases: {"when, which constant": (r, baselines)}."""
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.4))
    for axis, constant in zip(axes, ("sd 0", "sd 1")):
        for name, (r, baselines) in cases.items():
            if name.endswith(constant):
                axis.scatter(baselines.mean(1), r.mean(1), s=8, alpha=0.6, label=name.split(",")[0])
        axis.axline((0, 0), slope=0.5, color="black", linestyle=":", linewidth=0.8, label="slope ½")
        axis.set(title=f"constant per prompt: {constant}", xlabel="mean reward under SFT", ylabel="under the policy")
        axis.legend(fontsize=7)
    show(figure, "05_slope")


def coefficient(cases, c_star):
    """Variance over that of the raw reward against the share c. cases: {name: (r, baselines)}; c_star: {name: c}."""
    figure, axis = plt.subplots(figsize=(6.5, 3.4))
    shares = torch.linspace(0, 1.2, 61)
    for number, (name, (r, baselines)) in enumerate(cases.items()):
        b, best = baselines[:, :4].mean(1, keepdim=True), c_star[name]
        axis.plot(shares, [contrast(r, b, c).var() / r.var() for c in shares], color=f"C{number}", label=name)
        axis.plot(best, contrast(r, b, best).var() / r.var(), "o", color=f"C{number}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(xlabel="share c", ylabel="variance / raw variance", ylim=(0, 2.5))
    axis.legend(fontsize=8)
    show(figure, "05_coefficient")


def learning(curves):
    """True quality over steps. curves: {spread of the levels: {method: (steps, S)}}."""
    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.2), sharey=True)
    for axis, (spread, methods) in zip(axes, curves.items()):
        for method, curve in methods.items():
            style = METHODS["ppo" if method == "plain" else method]
            axis.plot(curve.mean(1), color=style.color, linestyle=style.line, label=method)
        axis.set(title=f"levels differ by {spread:g}", xlabel="step")
    axes[0].set_ylabel("true quality")
    axes[0].legend()
    show(figure, "05_learning")


# --------------------------------------------------------------------------------------- 6. when to subtract


def chart():
    """The rule as a chart: measure rho on the baselines, then choose."""
    figure, axis = plt.subplots(figsize=(8.5, 3.2))
    boxes = {
        "SFT policy: k responses\nto some hundred prompts,\nscored: rho ± interval": (1.3, 1.5, "#eeeeea"),
        "all of it below 1 / (k + 1):\nleave it": (5.2, 2.6, "#eeeeea"),
        "in between:\nadapt (or a group)": (5.2, 1.5, "#cfe4f5"),
        "all of it above 1/2:\na group, or subtract": (5.2, 0.4, "#cfe4f5"),
        "nothing to gain": (8.6, 2.6, "#ffffff"),
        "small gains at best": (8.6, 1.5, "#ffffff"),
        "learns sooner;\nafter long training:\nslope below 1/2? refresh": (8.6, 0.4, "#ffffff"),
    }
    drawn = []
    for text, (x, y, colour) in boxes.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "#777777"}
        drawn.append(axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box))
    places = list(boxes.values())
    for first, second in ((0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (3, 6)):
        ends = {"patchA": drawn[first].get_bbox_patch(), "patchB": drawn[second].get_bbox_patch()}
        axis.annotate("", places[second][:2], places[first][:2], arrowprops={"arrowstyle": "->", **ends})
    axis.set(xlim=(-0.3, 10.2), ylim=(-0.1, 3.1))
    axis.axis("off")
    show(figure, "06_chart")


def ledger(gains):
    """Gold minus plain PPO's against rho, one dot a setting. gains: {method: [(rho, gap, half)]}."""
    figure, axes = plt.subplots(1, len(gains), figsize=(10.5, 3.4), sharey=True)
    for axis, (method, settings) in zip(axes, gains.items()):
        for rho, gap, half in settings:
            colour = "#0072B2" if gap > half else "#D55E00" if gap < -half else "#999999"
            axis.errorbar(rho, gap, half, color=colour, marker=".", linewidth=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(0.2, color="black", linestyle=":", linewidth=0.8)
        axis.set(title=f"{method}, {len(settings)} settings", xlabel="rho")
    axes[0].set_ylabel("gold over the run, minus plain PPO's")
    show(figure, "06_ledger")


# ---------------------------------------------------------------------------------------------- 7. difficulty


def calibration(difficulty, edges, p_ref, p_pi):
    """Success by difficulty, and each prompt's progress against its baseline's success. p_ref, p_pi: (N,)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.5))
    bins = [(difficulty >= low) & (difficulty < high) for low, high in zip(edges, edges[1:])]
    centres = [difficulty[member].mean() for member in bins]
    lines = (p_ref, "o:", "p_ref, SFT"), (p_pi, "o-", "p_π, after PPO"), (p_pi - p_ref, "s--", "r_CR")
    for values, style, name in lines:
        left.plot(centres, [values[member].mean() for member in bins], style, label=name)
    left.set(xlabel="difficulty of the opening", title="Success and progress", ylim=(-0.05, 1))
    left.legend()
    jitter = 0.02 * torch.randn(2, len(p_ref), generator=torch.Generator().manual_seed(0))
    right.scatter(p_ref + jitter[0], p_pi - p_ref + jitter[1], c=difficulty, s=9, cmap="viridis")
    right.plot([0, 1], [1, 0], color="grey", label="all the room there is: 1 − p_ref")
    right.plot([0, 1], [0, -1], color="grey", linestyle=":", label="all that can be lost")
    right.set(xlabel="p_ref(x)", ylabel="p_π(x) − p_ref(x)", title="One dot a prompt (colour: difficulty)")
    right.legend(fontsize=7)
    show(figure, "07_calibration")


def weights(shares, rates):
    """Whose squared advantages are large. shares: {name: (n,)} for prompts with these success rates."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for number, (name, share) in enumerate(shares.items()):
        axis.bar(torch.arange(len(rates)).numpy() + 0.27 * (number - 1), share, 0.25, label=name)
    axis.set_xticks(range(len(rates)), [f"p = {rate:.2f}" for rate in rates])
    axis.set(title="Whose advantages are large?", ylabel="share of squared advantage", ylim=(0, 0.45))
    axis.legend(ncols=3, loc="upper center")
    show(figure, "07_weights")


# --------------------------------------------------------------------------------------------------- 8. noise


def theorem(truth, reports, predicted, noisy_contrast, e0):
    """What noisy judges report: raw against the truth, and contrasts against the theorem's. All (N,)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.scatter(truth, reports, c=e0, s=9)
    left.set(xlabel="clean reward E[r|x]", ylabel="noisy reward E[r̃|x]", title="Raw: an offset e₀(x) (colour)")
    right.scatter(predicted, noisy_contrast, c=e0, s=9)
    right.plot([-0.3, 1], [-0.3, 1], color="grey", linewidth=0.8)
    right.set(xlabel="(1 − e₀ − e₁) · E[r − r_base | x]", ylabel="E[r̃ − r̃_base | x]", title="Contrastive: the line")
    show(figure, "08_theorem")


# ----------------------------------------------------------------------------------------------- 9. baselines


def budget(curves, plain):
    """True quality against k for 10 and 60 responses. curves: {k: after each step}; plain: after each step."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, N in zip(axes, (10, 60)):
        fit = [k for k in curves if k < N]
        axis.plot(list(curves), [curve[N - 1] for curve in curves.values()], "o-", label="N steps, baselines on top")
        axis.plot(fit, [curves[k][N - k - 1] for k in fit], "s--", label="N responses in all")
        axis.axhline(plain[N - 1], color="C3", linestyle=":", label="plain")
        axis.axvline((N + 1) ** 0.5 - 1, color="grey", linewidth=0.8, label="√(N+1) − 1")
        axis.set(title=f"N = {N}", xlabel="k", xscale="log")
        axis.set_xticks(list(curves), list(curves))
    axes[0].set_ylabel("true quality at the end")
    axes[1].legend(fontsize=7)
    show(figure, "09_budget")


def sampling(bars):
    """Variance that the baseline adds at the start. bars: {name: (bias that differs between prompts, s^2 / k)}."""
    figure, axis = plt.subplots(figsize=(7, 3))
    spread, noise = torch.tensor(list(bars.values())).T.numpy()
    axis.bar(list(bars), spread, label="bias that differs between prompts")
    axis.bar(list(bars), noise, bottom=spread, label="s²/k, k = 4")
    axis.tick_params(axis="x", labelsize=8)
    axis.set(ylabel="variance that the baseline adds", ylim=(0, 0.19))
    axis.legend()
    show(figure, "09_sampling")


# -------------------------------------------------------------------------------------------------- 10. scale


def scale(logs):
    """KL and alpha at the end of nine runs. logs: {(scale, name of the reward): metrics of a run}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    names = list(dict.fromkeys(name for _, name in logs))
    scales = list(dict.fromkeys(scale for scale, _ in logs))
    for number, name in enumerate(names):
        places = [place + 0.27 * (number - 1) for place in range(len(scales))]
        left.bar(places, [logs[scale, name][-1]["kl"] for scale in scales], 0.25, label=name)
        right.bar(places, [logs[scale, name][-1]["scale"] for scale in scales], 0.25, label=name)
    for axis in (left, right):
        axis.set_xticks(range(len(scales)), scales)
    left.set(ylabel="KL from SFT at the end (nats)", title="How far each run goes")
    right.set(ylabel="α at the end", yscale="log", title="Its scale")
    right.axhline(1, color="black", linewidth=0.8)
    left.legend()
    show(figure, "10_scale")


# ------------------------------------------------------------------------------------------------- 11. online


def online(curves, costs):
    """True quality by responses. curves: {(spread, method): (steps,)}; costs: {method: (before, a step)}."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    spreads = list(dict.fromkeys(spread for spread, _ in curves))
    for axis, spread in zip(axes, spreads):
        for (method, (before, each)), line in zip(costs.items(), ("-", "--", "-.", ":")):
            curve = curves[spread, method]
            responses = before + each * torch.arange(1, len(curve) + 1)
            shown = responses <= len(curve)
            axis.plot(responses[shown], curve[shown], line, label=method)
        axis.set(title=f"levels differ by {spread:g}", xlabel="responses generated per prompt")
    axes[0].set_ylabel("true quality")
    axes[0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.52))
    show(figure, "11_online")


# ------------------------------------------------------------------------------------------------ 12. hacking


def best_of_n(kls, rewards, golds, possible):
    """What the pick of n responses promises, what it is worth, and what the best by gold would be worth."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    axis.plot(kls, rewards, "o-", label="reward of the pick")
    axis.plot(kls, golds, "s--", label="gold of the pick")
    axis.plot(kls, possible, "^:", label="gold, if gold had picked")
    axis.set(xlabel="KL from SFT (nats), bound", title="Best of n = 1, 2, 4 … 64")
    axis.legend()
    show(figure, "12_best_of_n")


def fallen(runs):
    """How many runs of each method fell, against the KL at which its runs end. runs: rows with method, kl and fell."""
    figure, axis = plt.subplots(figsize=(7.5, 3.2))
    for number, method in enumerate(distinct(runs, "method")):
        own = select(runs, method=method)
        share, kl = column(own, "fell").mean(), column(own, "kl").mean()
        axis.plot(kl, share, "os^vDPX*h"[number % 9], markersize=8, label=method)
    axis.set(xlabel="mean KL of all runs (nats)", ylabel="share of runs that fell", ylim=(-0.015, None))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    show(figure, "12_fallen")


# ---------------------------------------------------------------------------------------------- 13. adversary


def hole(results):
    """Gold and the share of the phrase, from SFT to the mended reward. results: {name: (gold, share)}."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    places = range(len(results))
    left.barh(places, [gold for gold, _ in results.values()], color="#0072B2")
    left.set_yticks(places, list(results))
    left.axvline(0, color="black", linewidth=0.8)
    left.invert_yaxis()
    left.set(xlabel="gold")
    right.barh(places, [share for _, share in results.values()], color="#D55E00")
    right.set(xlabel="share of responses with the phrase", xlim=(0, 1))
    show(figure, "13_hole")


# ------------------------------------------------------------------------------------------- 15. real models


def real_rho(rows, k):
    """The share of the variance between prompts in the two real runs. rows: of real_law.csv. k: baselines a prompt."""
    figure, axis = plt.subplots(figsize=(7, 2.2))
    names = {"real_reviews": "film reviews", "real_hh": "HH-RLHF"}
    found = {row["run"]: row for row in rows if row["quantity"] == "rho"}
    for place, run in enumerate(names):
        row = found[run]
        half = (row["high"] - row["low"]) / 2
        axis.errorbar(row["value"], place, xerr=half, fmt="o", color="#0072B2", capsize=4)
    label = f"contrast pays from here on (k = {k})"
    axis.axvline(1 / (k + 1), color="black", linestyle="--", linewidth=0.8, label=label)
    axis.set_yticks(range(len(names)), names.values())
    axis.set(xlabel="share of the reward's variance between prompts, ρ", xlim=(0, 0.5), ylim=(-0.6, 1.6))
    axis.legend(loc="upper right")
    show(figure, "15_rho")


# --------------------------------------------------------------------------------------------- 16. your data


def sick(logs):
    """What PPO's metrics look like in healthy and in sick runs. logs: {name: metrics, one dict an iteration}."""
    panels = {"reward": "reward", "gold": "gold", "kl": "KL, nats", "ended": "share that ended"}
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.6))
    for axis, (key, title) in zip(axes.flat, panels.items()):
        for name, log in logs.items():
            axis.plot([row[key] for row in log], label=name)
        axis.set(xlabel="iteration", title=title)
    axes[1, 0].set_yscale("symlog", linthresh=1)
    axes[1, 1].legend(loc="center right")
    show(figure, "16_sick")


def negative_variance(estimates, standard_errors, found):
    """Estimates of a variance between prompts that is truly 0, with their 95% intervals; and one that was found."""
    figure, axis = plt.subplots(figsize=(7, 2.6))
    order = estimates.argsort()
    axis.errorbar(range(len(order)), estimates[order], yerr=1.96 * standard_errors[order], fmt=".", elinewidth=0.6)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(found, color="#D55E00", linestyle="--", label="the rehearsal")
    axis.legend(loc="upper left")
    axis.set(xlabel="simulated run, sorted", ylabel="variance between prompts")
    show(figure, "16_negative")


# ------------------------------------------------------------------------------------------------ 17. beyond


def cancels(changes):
    """How much advantages change when a baseline per prompt is subtracted. changes: {estimator: relative change}."""
    figure, axis = plt.subplots(figsize=(7, 3.4))
    colors = ["#0072B2" if change > 1e-9 else "grey" for change in changes.values()]
    axis.barh(list(changes), list(changes.values()), color=colors)
    axis.set(xlabel="change of the advantages, in units of their size")
    axis.set_title("Subtract a baseline per prompt: who notices?")
    axis.invert_yaxis()
    show(figure, "17_cancels")


# ------------------------------------------------------------------------------------------------ 18. build it


def broken(rows, right):
    """The broken loop's curves on those of one_file.py. rows, right: a row of numbers for each iteration."""
    figure, axes = plt.subplots(2, 3, figsize=(8.5, 5))
    for axis, name in zip(axes.flat, ("gold", "reward", "kl", "length", "clip_fraction")):
        axis.plot([row[name] for row in right], color="#999999", linewidth=4, label="one_file.py")
        axis.plot([row[name] for row in rows], color="#D55E00", label="broken.py")
        axis.set(title=name, xlabel="iteration")
    axes[1, 2].axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes[1, 2].legend(handles, labels, loc="center")
    show(figure, "18_broken")
