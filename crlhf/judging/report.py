"""What verdicts on blind pairs come to: a column a judge, Cohen's kappa of every two, and a picture."""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from ..config import JudgeConfig, UserError
from ..evaluate import column
from ..pipeline.output import one_line
from ..pipeline.plots import plt, save_figure
from ..pipeline.tables import markdown_table
from .statistics import EVEN, WIN, accuracy, bootstrap, kappa, length_controlled, outcome_shares

OUTCOMES = {"win": "#0072B2", "tie": "#bbbbbb", "loss": "#D55E00"}
THIRDS = ("smallest", "middle", "largest")
LONGEST_LABEL = 80  # letters


def judging_report(rows: list[dict], config: JudgeConfig) -> str:
    """Markdown: what each judge says of the policy `of`, and what the verdicts say of the judges."""
    readable = readable_by_judge(rows)
    if not readable:
        mend = "the rubric must ask for a last line with [[A]], [[B]] or [[tie]]"
        raise UserError("no answer could be read", mend)
    cells_of = {}
    quantities = {}  # names of lines, in the order in which they come
    for judge, scored in readable.items():
        asked = sum(row["judge"] == judge for row in rows)
        counts = f"{len(scored)}; {asked - len(scored)}"
        cells_of[judge] = {"pairs; unreadable": counts, **judge_cells(scored, config.seed)}
        quantities.update(cells_of[judge])
    lines = []
    for quantity in quantities:
        line = [cells.get(quantity, "") for cells in cells_of.values()]
        lines.append([quantity, *line])
    table = markdown_table(["", *map(one_line, cells_of)], lines)
    head = f"`{config.of}` against `{config.against}`; intervals: bootstrap over prompts, 95%."
    return "\n\n".join([head, table, *agreements(readable)])


def readable_by_judge(rows: list[dict]) -> dict[str, list[dict]]:
    """Judge -> rows that have a score. A judge without any is left out."""
    groups = {}
    for row in rows:
        if row["score"] is not None:
            groups.setdefault(row["judge"], []).append(row)
    return groups


def agreements(readable: dict) -> list[str]:
    """Cohen's kappa of every two judges, on the pairs that both have judged."""
    scores = {}
    for judge, rows in readable.items():
        scores[judge] = {row["id"]: row["score"] for row in rows}
    lines = []
    for first, second in itertools.combinations(scores, 2):
        common = sorted(set(scores[first]) & set(scores[second]))
        if common:
            first_scores = [scores[first][pair_id] for pair_id in common]
            second_scores = [scores[second][pair_id] for pair_id in common]
            value = kappa(first_scores, second_scores)
            lines.append(one_line(f"Cohen's kappa of {first} and {second}, {len(common)} pairs: {value:.2f}"))
    return lines


# ---------------------------------------------------------------------------------------------- one judge


def judge_cells(rows: list[dict], seed: int) -> dict[str, str]:
    """Quantity -> text, from the readable rows of one judge."""
    scores = column(rows, "score")
    words = column(rows, "words")
    other_words = column(rows, "other_words")
    shares = outcome_shares(scores)
    outcomes = [f"{shares[name]:.0%} {share_interval(scores, name, seed)}" for name in OUTCOMES]
    at_equal_length, gamma = length_controlled(scores, words - other_words)
    flips = [row["flipped"] for row in rows if row["flipped"] is not None]
    firsts = sum(row["firsts"] for row in rows)
    choices = sum(row["choices"] for row in rows)
    cells = {
        "win / tie / loss": " / ".join(outcomes),
        "wins minus losses, points": f"{100 * shares['margin']:+.0f} {share_interval(scores, 'margin', seed)}",
        "win rate; at equal length": f"{shares['win_rate']:.1%}; {at_equal_length:.1%} (gamma {gamma:+.2f})",
        "verdicts that flip with the order": f"{sum(flips) / len(flips):.0%}" if flips else "",
        "choices that fell on the first position": f"{firsts / choices:.0%} of {choices}" if choices else "",
        "words of the winner; of the loser": words_text(scores, words, other_words),
    }
    return cells | gold_cells(rows)


def share_interval(scores: Tensor, name: str, seed: int) -> str:
    """'[39, 57]': the interval of a share or of the margin, in points."""
    low, high = bootstrap(scores, lambda resample: outcome_shares(resample)[name], seed)
    return f"[{100 * low:.0f}, {100 * high:.0f}]"


def words_text(scores: Tensor, words: Tensor, other_words: Tensor) -> str:
    """Mean lengths of the responses that won and of those that lost."""
    decided = scores != EVEN
    if not decided.any():
        return "no pair was decided"
    winner = torch.where(scores == WIN, words, other_words)[decided].mean()
    loser = torch.where(scores == WIN, other_words, words)[decided].mean()
    return f"{winner:.1f}; {loser:.1f}"


def gold_cells(rows: list[dict]) -> dict:
    """What a judge who knows the truth would say, and how often this one is right; nothing where it isn't known."""
    known = known_gold(rows)
    if not known:
        return {}
    gaps = column(known, "gold_gap")
    shares = outcome_shares(gold_scores(gaps))
    cells = {"by gold: win / tie / loss": " / ".join(f"{shares[name]:.0%}" for name in OUTCOMES)}
    for third, group in zip(THIRDS, accuracy(column(known, "score"), gaps)):
        size = f"differs by {group['low']:.2f} to {group['high']:.2f}, {group['pairs']} pairs"
        cells[f"right by gold, {third} third"] = f"{group['right']:.0%} ({size})"
    return cells


def known_gold(rows: list[dict]) -> list[dict]:
    """The rows of pairs whose true difference is known."""
    return [row for row in rows if row["gold_gap"] is not None]


def gold_scores(gaps: Tensor) -> Tensor:
    """(N,) true differences -> (N,) scores by a judge who knows them."""
    return torch.where(gaps == 0, EVEN, (gaps > 0).double())


# ------------------------------------------------------------------------------------------------ picture


def plot_verdicts(rows: list[dict], config: JudgeConfig, path: Path) -> None:
    """Win, tie and loss by each judge and by gold; how often judges are right, by the size of the true difference."""
    readable = readable_by_judge(rows)
    scores_of = {judge: column(judge_rows, "score") for judge, judge_rows in readable.items()}
    gaps = {}  # each pair once, however many have judged it
    for judge_rows in readable.values():
        gaps |= {row["id"]: row["gold_gap"] for row in known_gold(judge_rows)}
    height = 2.6 + 0.3 * len(scores_of)
    if gaps:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, height))
        draw_accuracy(right, readable)
        scores_of["gold"] = gold_scores(torch.tensor(list(gaps.values()), dtype=torch.float64))
    else:
        figure, left = plt.subplots(figsize=(5, height))
    draw_outcomes(left, scores_of)
    left.set_title(plain_label(f"{Path(config.of).stem} against {Path(config.against).stem}"))
    save_figure(figure, path)


def plain_label(name: str) -> str:
    """A name as the picture shows it: one short line, and no formula whatever dollars it holds."""
    return one_line(name)[:LONGEST_LABEL].replace("$", "\\$")


def draw_outcomes(axis: plt.Axes, scores_of: dict) -> None:
    """A bar a judge, from wins over ties to losses."""
    for height, scores in enumerate(scores_of.values()):
        shares = outcome_shares(scores)
        left = 0.0
        for outcome, color in OUTCOMES.items():
            label = outcome if height == 0 else None
            axis.barh(height, shares[outcome], left=left, color=color, label=label)
            left += shares[outcome]
    axis.set_yticks(range(len(scores_of)), [plain_label(judge) for judge in scores_of])
    axis.set(xlabel="share of pairs", xlim=(0, 1), ylim=(-0.6, len(scores_of) + 0.2))
    axis.legend(fontsize=8, ncols=3, loc="upper center")


def draw_accuracy(axis: plt.Axes, readable: dict) -> None:
    """A line a judge: how often it is right, over the true difference."""
    for judge, rows in readable.items():
        known = known_gold(rows)
        groups = accuracy(column(known, "score"), column(known, "gold_gap"))
        middles = [(group["low"] + group["high"]) / 2 for group in groups]
        axis.plot(middles, [group["right"] for group in groups], "o-", label=plain_label(judge))
    axis.axhline(0.5, color="black", linewidth=0.8)
    axis.set(xlabel="true difference", ylabel="right by gold", ylim=(0, 1.05), title="How often judges are right")
    axis.legend(fontsize=8)
