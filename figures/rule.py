"""A rule: from what the baselines say of a reward, and from what a critic foresees, to what should be subtracted.

    left = (rho - e) / (1 - e),   e the explained variance of plain PPO's critic
    leave it            where left + 1.96 se is below break-even, 1 / (k + 1)
    subtract, or group  where left - 1.96 se is above 1/2
    adapt               otherwise

With e = 0 this is `law.advice`, which a run prints before it knows any critic. "Group" is RLOO, which needs no offline
baselines and no critic; where drawing four responses to each prompt is out of the question, "subtract" stands in its
place. The rule was made from `dose`, constants that follow nothing or the number of sentences. Of the settings that it
is checked on, the results of `words` and `critic` had been seen by then, and weren't used; those of `samples`,
`labels` and `judged` hadn't.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from crlhf.law import advice
from crlhf.pipeline.plots import plt, save_figure

from .dose import NONE, SOURCES, same_at_any_dose
from .harness import SEEDS, default
from .judged import REWARDS
from .plotting import style_of
from .tables import distinct, markdown, read_rows, select, settings_of, write_csv

NEAR = 0.02  # of mean gold: a call is right if it is as close as this to the best
CALLS = {"leave": "ppo", "subtract": "contrastive", "adapt": "adaptive", "group": "RLOO"}
OFFLINE = ("leave", "subtract", "adapt")
RULES = {"call": "the rule", "blind": "the rule, critic unknown (e = 0)"}  # columns of rule.csv


def rule(root: Path, figures: Path, seeds: Sequence[int] = SEEDS[:12]) -> str:
    """How often does the rule make a right call, where it was made and in settings that it wasn't made from?

    Endpoint: a call is right if the mean over seeds of its gold over all iterations is within 0.02 of the best of plain
    PPO, contrastive PPO, adaptive PPO and RLOO (offline: of the first three) in that setting. One call a seed and
    setting, from what the seed's own baselines and its own plain PPO say. All methods have the defaults, but for KL
    prices of `judged`. It trains nothing: it reads what `dose`, `samples`, `labels`, `judged` and `critic` wrote.

    Prediction: right in 8 of 10 calls on settings it wasn't made from, and more often than any single method.
    """
    rows = []
    for part, experiment, setting, k, own in settings(figures):
        gains = {call: gain(own, method) for call, method in CALLS.items()}
        for seed in [seed for seed in distinct(own, "seed") if seed in seeds]:
            plain, adaptive = (select(own, seed=seed, method=method)[0] for method in ("ppo", "adaptive"))
            explained = 0.0 if math.isnan(plain["explained"]) else max(plain["explained"], 0.0)  # nan: no critic
            left = (adaptive["rho"] - explained) / (1 - explained)
            call, blind = (advice(rho, adaptive["rho_se"], k) for rho in (left, adaptive["rho"]))
            place = {"part": part, "experiment": experiment, "setting": setting, "k": k, "seed": seed}
            facts = {key: adaptive[key] for key in ("rho", "rho_se")} | {"explained": explained}
            rows.append(place | facts | {"call": call, "blind": blind} | gains)
    write_csv(figures / "rule.csv", rows)
    plot_rule(rows, figures / "rule.png")
    return report(figures)


def settings(figures: Path) -> list[tuple[str, str, str, int, list[dict]]]:
    """(part, experiment, setting, k, rows of the four methods) of all settings that have them, each once."""
    found, k = [], default("baselines.k")
    dose = read_rows(figures / "dose.csv")
    dose += same_at_any_dose(dose)
    group, known = select(dose, setting=NONE, method="RLOO"), {row["seed"] for row in dose}
    for setting in settings_of(dose):
        part = "held out" if setting.startswith(list(SOURCES)[-1]) else "made from"
        found.append((part, "dose", setting, k, select(dose, setting=setting)))
    samples = read_rows(figures / "samples.csv")
    for setting in settings_of(samples):
        own, drawn = select(samples, setting=setting), int(setting.split("= ")[1])
        if drawn != k:  # which is a setting of `dose`
            if drawn == 1:  # one response can't tell what varies between prompts: ask those with four
                four = values_of(select(samples, setting=setting.replace("= 1", f"= {k}"), method="adaptive"))
                own = [row | four[row["seed"]] if row["method"] == "adaptive" else row for row in own]
            found.append(("held out", "samples", setting, drawn, own + group))
    usual = "flips 0.2", *(f"{name}, kl {default('ppo.kl_coef'):g}" for name in REWARDS)  # settings of `dose`
    for name in ("labels", "judged"):
        rows = read_rows(figures / f"{name}.csv")
        for setting in [setting for setting in settings_of(rows) if setting not in usual]:
            found.append(("held out", name, setting, k, select(rows, setting=setting)))
    critics = [row for row in read_rows(figures / "critic.csv") if row["seed"] in known]
    for setting in settings_of(critics)[1:]:  # the first is a setting of `dose`
        own = [row for row in select(critics, setting=setting) if row["method"] in CALLS.values()]
        found.append(("held out", "critic", setting, k, own + group))
    return found


def values_of(rows: list[dict]) -> dict[int, dict]:
    """seed -> rho and its standard error."""
    return {row["seed"]: {"rho": row["rho"], "rho_se": row["rho_se"]} for row in rows}


def gain(rows: list[dict], method: str) -> float:
    """Mean over seeds of gold over all iterations, minus plain PPO's."""
    mine, plain = ([row["mean_gold"] for row in select(rows, method=name)] for name in (method, "ppo"))
    return statistics.fmean(mine) - statistics.fmean(plain)


# ---------------------------------------------------------------------------------------- table, figure


def is_right(row: dict, call: str, calls: Sequence[str]) -> bool:
    return row[call] >= max(row[other] for other in calls) - NEAR


def made(row: dict, calls: Sequence[str], by: str) -> str:
    """The call of a rule, or one of the four words. Where a group can be drawn it stands for the rule's "subtract"."""
    if by not in RULES:
        return by
    return "group" if row[by] == "subtract" and "group" in calls else row[by]


def share_right(rows: list[dict], calls: Sequence[str], by: str = "call") -> str:
    return f"{statistics.fmean(is_right(row, made(row, calls, by), calls) for row in rows):.0%}"


def report(figures: Path) -> str:
    rows = read_rows(figures / "rule.csv")
    parts = {name: select(rows, part=name) for name in ("made from", "held out")}
    lines = []
    for by, title in (RULES | {call: f"always {call}" for call in CALLS}).items():
        cells = []
        for calls in (tuple(CALLS), OFFLINE):
            allowed = by in RULES or by in calls
            cells += [share_right(chosen, calls, by) if allowed else "" for chosen in parts.values()]
        lines.append([title, *cells])
    head = ["right calls", "made from", "held out", "made from, no groups", "held out, no groups"]
    counts = ", ".join(f"{len(chosen)} ({name})" for name, chosen in parts.items())
    return "\n\n".join([markdown(head, lines), f"Calls, one a seed and setting: {counts}.", settings_table(rows)])


def settings_table(rows: list[dict]) -> str:
    lines = []
    for experiment, setting in dict.fromkeys((row["experiment"], row["setting"]) for row in rows):
        own = select(rows, experiment=experiment, setting=setting)
        means = [f"{statistics.fmean(row[key] for row in own):.2f}" for key in ("rho", "explained")]
        calls = [row["call"] for row in own]
        said = ", ".join(f"{call} {calls.count(call)}" for call in OFFLINE if call in calls)
        gains = [f"{own[0][call]:+.3f}" for call in list(CALLS)[1:]]
        right = [share_right(own, names) for names in (tuple(CALLS), OFFLINE)]
        lines.append([own[0]["part"], f"{experiment}: {setting}", *means, said, *gains, *right])
    gains = [f"{style_of(method).title} - plain" for method in list(CALLS.values())[1:]]
    head = ["", "setting", "rho", "critic explains", "calls", *gains, "right", "right, no groups"]
    return markdown(head, lines)


def plot_rule(rows: list[dict], path: Path) -> str:
    """A point a setting: what each call gains over plain PPO, against rho."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), sharey=True)
    for axis, call in zip(axes, list(CALLS)[1:]):
        style = style_of(CALLS[call])
        for part, face in (("made from", style.color), ("held out", "white")):
            points = {}
            for row in select(rows, part=part):
                points.setdefault((row["experiment"], row["setting"], row[call]), []).append(row["rho"])
            x = [statistics.fmean(values) for values in points.values()]
            axis.plot(x, [y for *_, y in points], "o", color=style.color, markerfacecolor=face, label=part)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.axvline(1 / (default("baselines.k") + 1), color="#777777", linestyle=":", label="break-even at k = 4")
        axis.set(title=f"{call}: {style.title}", xlabel="rho")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("gold over the run, minus plain PPO's")
    axes[0].legend(fontsize=8, loc="upper left")
    return save_figure(figure, path)
