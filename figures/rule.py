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
from crlhf.pipeline.tables import markdown_table

from .contenders import STYLES
from .dose import NONE, same_at_any_dose
from .harness import Study
from .judged import REWARDS, priced
from .runs import default
from .tables import Rows, distinct, read_results, select, settings_of

NEAR = 0.02  # of mean gold: a call is right if it is as close as this to the best
CALLS = {"leave": "ppo", "subtract": "contrastive", "adapt": "adaptive", "group": "RLOO"}
OFFLINE = ("leave", "subtract", "adapt")
RULES = {"call": "the rule", "blind": "the rule, critic unknown (e = 0)"}  # columns of rule.csv
Setting = tuple[str, str, str, int, Rows]  # (part, experiment, setting, k, rows of the four methods)


def rule(study: Study) -> str:
    """How often does the rule make a right call, where it was made and in settings that it wasn't made from?

    Endpoint: a call is right if the mean over seeds of its gold over all iterations is within 0.02 of the best of plain
    PPO, contrastive PPO, adaptive PPO and RLOO (offline: of the first three) in that setting. One call a seed and
    setting, from what the seed's own baselines and its own plain PPO say. All methods have the defaults, but for KL
    prices of `judged`. It trains nothing: it reads what `dose`, `samples`, `labels`, `judged` and `critic` wrote.

    Prediction: right in 8 of 10 calls on settings it wasn't made from, and more often than any single method.
    """
    rows = []
    for part, experiment, setting, k, own in all_settings(study.figures):
        gains = {call: mean_gain(own, method) for call, method in CALLS.items()}
        for seed in [seed for seed in distinct(own, "seed") if seed in study.seeds]:
            row = {"part": part, "experiment": experiment, "setting": setting, "k": k, "seed": seed}
            rows.append(row | calls_of(select(own, seed=seed), k) | gains)
    study.write(rows)
    return rule_report(study.figures)


def calls_of(rows: Rows, k: int) -> dict:
    """What the rule says of one seed in one setting, and what it knew."""
    [plain] = select(rows, method="ppo")
    [adaptive] = select(rows, method="adaptive")
    rho = adaptive["rho"]
    error = adaptive["rho_se"]
    explained = 0.0 if math.isnan(plain["explained"]) else max(plain["explained"], 0.0)  # nan: no critic
    left = (rho - explained) / (1 - explained)
    facts = {"rho": rho, "rho_se": error, "explained": explained}
    return facts | {"call": advice(left, error, k), "blind": advice(rho, error, k)}


def mean_gain(rows: Rows, method: str) -> float:
    """Mean over seeds of gold over all iterations, minus plain PPO's."""
    own = [row["mean_gold"] for row in select(rows, method=method)]
    plain = [row["mean_gold"] for row in select(rows, method="ppo")]
    return statistics.fmean(own) - statistics.fmean(plain)


# -------------------------------------------------------------------------------------------- the settings


def all_settings(figures: Path) -> list[Setting]:
    """All settings that have the four methods, each once."""
    k = default("baselines.k")
    doses = read_results(figures, "dose")
    doses += same_at_any_dose(doses)
    group = select(doses, setting=NONE, method="RLOO")  # without a constant, and with any
    found = []
    for setting in settings_of(doses):
        part = "held out" if setting.startswith("words") else "made from"
        found.append((part, "dose", setting, k, select(doses, setting=setting)))
    found += settings_of_samples(figures, group)
    for experiment in ("labels", "judged"):
        rows = read_results(figures, experiment)
        usual = "flips 0.2", *(priced(name, default("ppo.kl_coef")) for name in REWARDS)  # settings of `dose`
        for setting in settings_of(rows):
            if setting not in usual:
                found.append(("held out", experiment, setting, k, select(rows, setting=setting)))
    seeds = distinct(doses, "seed")
    critics = [row for row in read_results(figures, "critic") if row["seed"] in seeds]
    for setting in settings_of(critics)[1:]:  # the first is a setting of `dose`
        own = [row for row in select(critics, setting=setting) if row["method"] in CALLS.values()]
        found.append(("held out", "critic", setting, k, own + group))
    return found


def settings_of_samples(figures: Path, group: Rows) -> list[Setting]:
    """Those of `samples` with other numbers of baselines than `dose` has."""
    usual = default("baselines.k")
    rows = read_results(figures, "samples")
    found = []
    for setting in settings_of(rows):
        own = select(rows, setting=setting)
        k = int(setting.split("= ")[1])
        if k == 1:  # one response can't tell what varies between prompts: ask those with four
            four = select(rows, setting=setting.replace("= 1", f"= {usual}"), method="adaptive")
            known = {row["seed"]: {"rho": row["rho"], "rho_se": row["rho_se"]} for row in four}
            own = [row | known[row["seed"]] if row["method"] == "adaptive" else row for row in own]
        if k != usual:
            found.append(("held out", "samples", setting, k, own + group))
    return found


# ---------------------------------------------------------------------------------------- table, figure


def is_right(row: dict, call: str, calls: Sequence[str]) -> bool:
    return row[call] >= max(row[other] for other in calls) - NEAR


def call_made(row: dict, calls: Sequence[str], by: str) -> str:
    """The call of a rule, or one of the four words. Where a group can be drawn it stands for the rule's "subtract"."""
    if by not in RULES:
        return by
    return "group" if row[by] == "subtract" and "group" in calls else row[by]


def share_right(rows: Rows, calls: Sequence[str], by: str = "call") -> str:
    return f"{statistics.fmean(is_right(row, call_made(row, calls, by), calls) for row in rows):.0%}"


def rule_report(figures: Path) -> str:
    rows = read_results(figures, "rule")
    parts = {name: select(rows, part=name) for name in ("made from", "held out")}
    lines = []
    for by, title in (RULES | {call: f"always {call}" for call in CALLS}).items():
        cells = []
        for calls in (tuple(CALLS), OFFLINE):
            allowed = by in RULES or by in calls
            cells += [share_right(own, calls, by) if allowed else "" for own in parts.values()]
        lines.append([title, *cells])
    head = ["right calls", "made from", "held out", "made from, no groups", "held out, no groups"]
    counts = ", ".join(f"{len(own)} ({name})" for name, own in parts.items())
    counted = f"Calls, one a seed and setting: {counts}."
    return "\n\n".join([markdown_table(head, lines), counted, settings_table(rows)])


def settings_table(rows: Rows) -> str:
    lines = []
    for experiment, setting in dict.fromkeys((row["experiment"], row["setting"]) for row in rows):
        own = select(rows, experiment=experiment, setting=setting)
        rho = statistics.fmean(row["rho"] for row in own)
        gains = [f"{own[0][call]:+.3f}" for call in list(CALLS)[1:]]
        right = [share_right(own, names) for names in (tuple(CALLS), OFFLINE)]
        lines.append([own[0]["part"], f"{experiment}: {setting}", f"{rho:.2f}", *gains, *right])
    gains = [f"{STYLES[method].title} - plain" for method in list(CALLS.values())[1:]]
    head = ["", "setting", "rho", *gains, "right", "right, no groups"]
    return markdown_table(head, lines)
