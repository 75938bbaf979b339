"""Figures of the experiments. Each draws rows of results and writes a PNG; titles are computed from the rows.

Rows hold setting, method, seed and what was measured. Points are means over seeds, bars and bands 95% Student t
intervals over seeds.
"""

import matplotlib.pyplot as plt
import numpy as np

from ..evaluate import mean_interval
from ..plots import STYLES, finish, smooth
from .harness import difference, methods_of, settings_of, values


def style_of(method, number):
    """Label, colour and line of a method; labels that aren't methods take the palette's colours in turn."""
    palette = ("#E69F00", "#56B4E9", "#000000", "#CC79A7", "#009E73", "#777777")
    return STYLES.get(method, (method, palette[number % len(palette)], ("-", "--", "-.", ":")[number % 4]))


def picked(rows, setting, method, key):
    return np.array(values(rows, setting, method, key))


def gap_text(rows, setting, method, reference="ppo", reference_setting=None):
    """'+0.07 ± 0.06': paired difference in gold to a reference."""
    return "%+.2f ± %.2f" % difference(rows, setting, method, reference, reference_setting=reference_setting)


def error_bars(axis, rows, methods, key="gold", reference=None):
    """Mean over seeds and its 95% interval for each setting; with a reference, of the paired difference to it."""
    settings = settings_of(rows)
    for number, method in enumerate(methods):
        there = [place for place, setting in enumerate(settings) if method in methods_of(rows, setting)]
        columns = [picked(rows, settings[place], method, key) for place in there]
        if reference:
            columns = [column - picked(rows, settings[place], reference, key) for column, place in zip(columns, there)]
        means, halves = np.array([mean_interval(column) for column in columns]).T
        label, colour, style = style_of(method, number)
        axis.errorbar(np.array(there) + 0.09 * (number - (len(methods) - 1) / 2), means, halves, color=colour,
                      linestyle=style, marker="o", markersize=4, capsize=3, label=label, linewidth=1.5)
    axis.set_xticks(range(len(settings)), settings)
    axis.grid(alpha=0.25)


def per_seed(rows, method, key):
    """Curves of one method, one list a seed."""
    mine = [row for row in rows if row["method"] == method]
    return [[row[key] for row in mine if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in mine)]


def band(axis, rows, setting, method, key, number=0, window=5):
    """A curve over iterations: mean over seeds, smoothed, and its 95% interval."""
    curves = per_seed([row for row in rows if row["setting"] == setting], method, key)
    means, halves = np.array([mean_interval(column) for column in np.transpose([smooth(c, window) for c in curves])]).T
    label, colour, style = style_of(method, number)
    axis.plot(means, color=colour, linestyle=style, label=label, linewidth=1.8)
    axis.fill_between(range(len(means)), means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)
    axis.grid(alpha=0.25)


def sweep(rows, path):
    """One panel a method: mean gold for every learning rate and KL price."""
    methods = methods_of(rows)
    figure, axes = plt.subplots(1, len(methods), figsize=(2.9 * len(methods), 3.4))
    for axis, method in zip(axes, methods):
        mine = [row for row in rows if row["method"] == method]
        pairs = {row["setting"]: row["setting"].split(", ") for row in mine}
        rates, prices = (list(dict.fromkeys(pair[place] for pair in pairs.values())) for place in (0, 1))
        means = np.array([[picked(mine, f"{rate}, {price}", method, "gold").mean() for price in prices]
                          for rate in rates])
        axis.imshow(means, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(means):
            best = value == means.max()
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", weight="bold" if best else "normal",
                      color="white" if value < means.min() + 0.6 * np.ptp(means) else "black")
        axis.set_xticks(range(len(prices)), prices, fontsize=8)
        axis.set_yticks(range(len(rates)), rates, fontsize=8)
        axis.set_title(style_of(method, 0)[0], fontsize=10)
    figure.suptitle("Gold score by learning rate and KL price, on seeds used for nothing else (best in bold)",
                    fontsize=11)
    return finish(figure, path)


def compare(steps, rows, path):
    """Gold score over iterations, one panel for each kind of rater."""
    settings = settings_of(steps)
    figure, axes = plt.subplots(1, len(settings), figsize=(4 * len(settings), 4.2), sharey=True)
    for axis, setting in zip(np.atleast_1d(axes), settings):
        for number, method in enumerate(methods_of(steps)):
            band(axis, steps, setting, method, "gold", number)
        axis.set_title(f"{setting}:\ncontrastive ends {gap_text(rows, setting, 'contrastive')} from plain", fontsize=10)
        axis.set_xlabel("PPO iteration")
    dpo = [row["gold"] for row in rows if row["method"] == "dpo"]
    for axis in np.atleast_1d(axes) if dpo else ():
        axis.axhline(np.mean(dpo), color=style_of("dpo", 0)[1], linestyle=":", label="DPO, at its end")
    np.atleast_1d(axes)[0].set_ylabel("true (gold) reward")
    np.atleast_1d(axes)[-1].legend(loc="lower right", fontsize=8)
    return finish(figure, path)


def frontier(rows, gains, path):
    """Left: gold against KL, one line a method over its KL prices. Right: improvement of each prompt over SFT."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    bins = np.arange(-1.53125, 2.5, 0.125)  # gains are multiples of 1/16: two of them in every bin
    for number, method in enumerate(methods_of(rows)):
        mine = [row for row in rows if row["method"] == method]
        points = [[mean_interval(picked(mine, setting, method, key)) for key in ("kl", "gold")]
                  for setting in settings_of(mine)]
        (kl, kl_half), (gold, gold_half) = np.array(points).transpose(1, 2, 0)
        label, colour, style = style_of(method, number)
        left.errorbar(kl, gold, gold_half, kl_half, color=colour, linestyle=style, marker="o", markersize=4,
                      capsize=2, label=label, linewidth=1.5, elinewidth=0.7)
        gain = np.array([row["gain"] for row in gains if row["method"] == method])
        right.hist(gain, bins, histtype="step", density=True, color=colour, linestyle=style,
                   linewidth=1.5, label=f"{label}: {np.mean(gain > 0):.0%} of prompts up, mean {gain.mean():+.2f}")
    left.set(xlabel="KL from the SFT policy (nats)", ylabel="gold score on held-out prompts",
             title="Each point is one KL price (or beta)")
    right.set(xlabel="gold of a prompt minus SFT's, at about one KL", ylabel="density",
              title="Who improves, and by how much")
    right.axvline(0, color="black", linewidth=0.8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    right.set_ylim(top=1.35 * right.get_ylim()[1])  # room for the legend
    prices = [setting for setting in settings_of(rows) if setting.startswith("kl")]
    figure.suptitle("Contrastive - plain PPO in gold: " +
                    ", ".join(f"{gap_text(rows, price, 'contrastive')} at {price}" for price in prices), fontsize=10)
    return finish(figure, path)


def noise(rows, path):
    """One column for each kind of noise: gold above, the paired difference to plain PPO below."""
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, len(axes_names), figsize=(12, 6.4), sharey="row")
    for (top, bottom), name in zip(panels.T, axes_names):
        mine = [{**row, "setting": row["setting"].split(" ")[-1]} for row in rows if row["axis"] == name]
        methods = methods_of(mine)
        error_bars(top, mine, methods)
        error_bars(bottom, mine, [method for method in methods if method != "ppo"], reference="ppo")
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set_xlabel(name)
    panels[0, 0].set_ylabel("gold score")
    panels[1, 0].set_ylabel("minus plain PPO, paired")
    panels[0, 0].legend(fontsize=8)
    biases = [row["setting"] for row in rows if row["axis"].startswith("rater bias")]
    figure.suptitle(f"Rater bias from {biases[0].split()[-1]} to {biases[-1].split()[-1]} moves contrastive - plain "
                    f"from {gap_text(rows_of(rows, 'rater bias'), biases[0], 'contrastive')} to "
                    f"{gap_text(rows_of(rows, 'rater bias'), biases[-1], 'contrastive')} gold", fontsize=11)
    return finish(figure, path)


def rows_of(rows, axis):
    return [row for row in rows if row["axis"].startswith(axis)]


def samples(rows, path):
    """Gold and learning speed against k, and what the baselines cost."""
    mine = [row for row in rows if row["method"] == "contrastive"]
    mine = [{**row, "setting": row["setting"].removeprefix("k=")} for row in mine]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8))
    for axis, key, name in zip(axes, ("gold", "iterations_to_half", "baseline_seconds"),
                               ("gold score at the end", "iterations to half of plain PPO's gain",
                                "seconds of offline sampling")):
        error_bars(axis, mine, ["contrastive"], key)
        plain = mean_interval(picked(rows, "none", "ppo", key))
        if key != "baseline_seconds":
            axis.axhline(plain[0], color=style_of("ppo", 0)[1], label="plain PPO")
            axis.axhspan(plain[0] - plain[1], plain[0] + plain[1], color=style_of("ppo", 0)[1], alpha=0.1,
                         linewidth=0)
        axis.set(xlabel="k, offline responses per prompt", ylabel=name)
    axes[0].legend(fontsize=8)
    fewest, *_, most = settings_of(mine)
    figure.suptitle(f"From k = {fewest} to {most} gold changes by "
                    f"{gap_text(mine, most, 'contrastive', 'contrastive', fewest)} (paired)", fontsize=11)
    return finish(figure, path)


def sampling(rows, path):
    """What temperature and p do to the baselines, to the variance of the reward, and to gold."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.9))
    for axis, key, name in zip(axes, ("bias", "start_variance", "gold"),
                               ("baseline mean minus that at T = 1", "Var(r - b) in the first iterations",
                                "gold score at the end")):
        error_bars(axis, rows, ["contrastive"], key)
        axis.set_ylabel(name)
        axis.tick_params(axis="x", labelsize=7)
        axis.lines[0].set_linestyle("none")
    others = [setting for setting in settings_of(rows) if setting != "T 1"]
    gaps = ", ".join(f"{gap_text(rows, setting, 'contrastive', 'contrastive', 'T 1')} ({setting})" for setting in others)
    figure.suptitle(f"Gold minus that with baselines at T = 1, paired: {gaps}", fontsize=10)
    return finish(figure, path)


def scale(rows, steps, path):
    """Gold and KL over the scale of the reward, and lambda over time."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    methods = methods_of(rows)
    short = [{**row, "setting": row["setting"].removeprefix("reward ")} for row in rows]
    for axis, key, name in zip(axes, ("gold", "kl"), ("gold score at the end", "KL from the SFT policy (nats)")):
        error_bars(axis, short, methods, key)
        axis.set(xlabel="all rewards multiplied by", ylabel=name)
    for number, method in enumerate(methods):
        if method not in ("ppo", "contrastive"):
            band(axes[2], steps, "reward x 1", method, "scale", number, window=1)
    axes[2].set(xlabel="PPO iteration", ylabel="lambda, at reward x 1")
    axes[0].legend(fontsize=7)
    spread = {method: np.ptp([picked(rows, setting, method, "gold").mean() for setting in settings_of(rows)])
              for method in methods if method != "contrastive, magnitude"}
    steady = min(spread, key=spread.get)
    figure.suptitle(f"Over scales 0.1 to 10 gold moves by {spread['ppo']:.2f} with plain PPO, by "
                    f"{spread['contrastive']:.2f} with contrastive, and least ({spread[steady]:.2f}) with: {steady}",
                    fontsize=11)
    return finish(figure, path)


def online(rows, steps, path):
    """Gold over iterations at equal steps, and the ends at equal steps and at equal generated responses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(1.2, 1))
    for number, method in enumerate(methods_of(steps, "same steps")):
        band(left, steps, "same steps", method, "gold", number)
    left.set(xlabel="PPO iteration (64 responses each)", ylabel="gold score of the rollouts")
    left.legend(fontsize=7)
    labels = [(setting, method) for setting, method in dict.fromkeys((row["setting"], row["method"]) for row in rows)
              if method != "offline"]
    for place, (setting, method) in enumerate(reversed(labels)):
        gap, half = mean_interval(picked(rows, setting, method, "gold") - picked(rows, setting, "offline", "gold"))
        right.errorbar(gap, place, xerr=half, color="#0072B2" if setting == "same steps" else "#D55E00", marker="o",
                       capsize=3)
    right.set_yticks(range(len(labels)), [f"{method}\n({setting})" for setting, method in reversed(labels)],
                     fontsize=7)
    right.axvline(0, color="black", linewidth=0.8)
    right.grid(alpha=0.25)
    right.set_xlabel("gold minus offline baselines, paired by seed")
    right.locator_params(axis="x", nbins=5)
    fresh, groups = (gap_text(rows, "same responses", method, "offline")
                     for method in ("fresh every step", "groups of 4"))
    figure.suptitle(f"At equal generated responses fresh baselines end {fresh} from offline ones, groups {groups}",
                    fontsize=11)
    return finish(figure, path)


def critic(rows, steps, path):
    """Gold by critic, the difference to plain PPO, and how well each critic predicts."""
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.1))
    methods = methods_of(rows)
    error_bars(axes[0], rows, methods)
    error_bars(axes[1], rows, methods[1:], reference="ppo")
    axes[1].axhline(0, color="black", linewidth=0.8)
    for number, method in enumerate(methods):
        band(axes[2], steps, "reward_model", method, "explained_variance", number)
    axes[2].set_ylim(bottom=max(-1.5, axes[2].get_ylim()[0]))
    axes[0].set(xlabel="critic", ylabel="gold score at the end")
    axes[1].set(xlabel="critic", ylabel="minus plain PPO, paired by seed")
    axes[2].set(xlabel="PPO iteration", ylabel="explained variance, reward_model critic")
    for line in (*axes[0].lines, *axes[1].lines):
        if line.get_marker() == "o":
            line.set_linestyle("none")  # kinds of critic have no order
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Contrastive - plain: {gap_text(rows, 'reward_model', 'contrastive')} gold with a critic from the "
                    f"reward model, {gap_text(rows, 'none', 'contrastive')} without a critic", fontsize=11)
    return finish(figure, path)


def overoptimisation(steps, path):
    """Reward and gold over iterations and against KL, without a KL price."""
    setting = settings_of(steps)[0]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    for axis, key, name in zip(axes, ("reward", "gold", "kl"),
                               ("reward that PPO sees", "gold score", "KL from SFT (nats)")):
        for number, method in enumerate(methods_of(steps)):
            band(axis, steps, setting, method, key, number)
        axis.set(xlabel="PPO iteration", ylabel=name)
    axes[0].legend(fontsize=8)
    drops = []
    for method in ("ppo", "contrastive"):
        means = np.convolve(np.mean(per_seed(steps, method, "gold"), 0), np.ones(5) / 5, "valid")
        drops.append(f"{means[-1] - means.max():+.2f} ({style_of(method, 0)[0]})")
    figure.suptitle(f"Without a KL price: gold at the end minus at its best: {', '.join(drops)}", fontsize=11)
    return finish(figure, path)


def adversary(rows, path):
    """Gold and the share of responses with the phrase, for every kind of rater and method."""
    labels = list(dict.fromkeys((row["setting"], row["method"]) for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    colours = dict(zip(settings_of(rows), ("#777777", "#D55E00", "#0072B2")))
    for axis, key, name in zip(axes, ("gold", "exploit"), ("gold score", "share of responses with the phrase")):
        for place, (setting, method) in enumerate(reversed(labels)):
            mean, half = mean_interval(picked(rows, setting, method, key))
            axis.errorbar(mean, place, xerr=half, color=colours[setting], marker="o", capsize=3)
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    names = [f"{setting}: {style_of(method, 0)[0]}" for setting, method in reversed(labels)]
    axes[0].set_yticks(range(len(labels)), names, fontsize=8)
    contrast = gap_text(rows, "fooled raters", "contrastive")
    mended = gap_text(rows, "retrained on exploits", "ppo", "ppo", "fooled raters")
    figure.suptitle(f"Fooled raters: contrastive - plain {contrast} gold; reward model retrained on exploits {mended}",
                    fontsize=11)
    return finish(figure, path)
