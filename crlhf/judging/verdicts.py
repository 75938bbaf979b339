"""What verdicts on blind pairs come to: a column a judge, Cohen's kappa of every two, a picture and a CSV."""

import csv
import io
import itertools
from pathlib import Path

import torch

from ..config import JudgeConfig, UserError
from ..engine.files import write_atomic
from ..pipeline.output import one_line
from ..pipeline.plots import finish, plt
from . import judge

OUTCOMES = ("win", "tie", "loss")


def report(verdicts: list[dict], c: JudgeConfig) -> str:
    """What each judge says of the policy `of`, and what the verdicts say of the judges."""
    read = {}
    for row in verdicts:
        read.setdefault(row["judge"], []).extend([row] if row["score"] is not None else [])
    if not any(read.values()):
        raise UserError("no answer could be read: the rubric must ask for a last line with [[A]], [[B]] or [[tie]]")
    columns = {}
    for name, rows in read.items():
        if rows:
            lost = sum(row["judge"] == name for row in verdicts) - len(rows)
            columns[name] = {"pairs; unreadable": f"{len(rows)}; {lost}", **column_of(rows, c.seed)}
    quantities = list(dict.fromkeys(quantity for column in columns.values() for quantity in column))
    lines = [["", *map(one_line, columns)], ["---"] * (1 + len(columns))]
    lines += [[quantity, *(column.get(quantity, "") for column in columns.values())] for quantity in quantities]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    agreement = []
    for first, second in itertools.combinations(columns, 2):
        both = [{row["id"]: row["score"] for row in read[name]} for name in (first, second)]
        common = sorted(set(both[0]) & set(both[1]))
        if common:
            kappa = judge.kappa(*([side[pair] for pair in common] for side in both))
            agreement.append(f"Cohen's kappa of {first} and {second}, {len(common)} pairs: {kappa:.2f}")
    head = f"`{c.of}` against `{c.against}`; intervals: bootstrap over prompts, 95%."
    return "\n\n".join([head, table, *map(one_line, agreement)])


def column_of(read: list[dict], seed: int) -> dict[str, str]:
    """quantity -> text, for one judge."""
    scores = torch.tensor([row["score"] for row in read])
    found = judge.shares(scores)
    longer = torch.tensor([row["words"] - row["other_words"] for row in read], dtype=torch.float64)
    equal, gamma = judge.length_controlled(scores, longer)
    firsts, choices = (sum(row[key] for row in read) for key in ("firsts", "choices"))
    flips = [row["flipped"] for row in read if row["flipped"] is not None]
    column = {
        "win / tie / loss": " / ".join(f"{found[name]:.0%} {inside(scores, name, seed)}" for name in OUTCOMES),
        "wins minus losses, points": f"{100 * found['margin']:+.0f} {inside(scores, 'margin', seed)}",
        "win rate; at equal length": f"{found['win_rate']:.1%}; {equal:.1%} (gamma {gamma:+.2f})",
        "verdicts that flip with the order": f"{sum(flips) / len(flips):.0%}" if flips else "",
        "choices that fell on the first position": f"{firsts / choices:.0%} of {choices}" if choices else "",
        "words of the winner; of the loser": winner_words(read),
    }
    known = [row for row in read if row["gold_gap"] is not None]
    if known:
        gaps, own = (torch.tensor([row[key] for row in known], dtype=torch.float64) for key in ("gold_gap", "score"))
        column["by gold: win / tie / loss"] = as_shares(judge.shares(by_gold(gaps)))
        for name, group in zip(("smallest", "middle", "largest"), judge.accuracy(own, gaps)):
            size = f"differs by {group['low']:.2f} to {group['high']:.2f}, {group['pairs']} pairs"
            column[f"right by gold, {name} third"] = f"{group['right']:.0%} ({size})"
    return column


def inside(scores: torch.Tensor, name: str, seed: int) -> str:
    """'[39, 57]': the interval of a share or of the margin, in points."""
    low, high = judge.bootstrap(scores, lambda some: judge.shares(some)[name], seed)
    return f"[{100 * low:.0f}, {100 * high:.0f}]"


def as_shares(found: dict[str, float]) -> str:
    return " / ".join(f"{found[name]:.0%}" for name in OUTCOMES)


def by_gold(gaps: torch.Tensor) -> torch.Tensor:
    """The verdicts of a judge who knows the truth."""
    return torch.where(gaps == 0, 0.5, (gaps > 0).double())


def winner_words(read: list[dict]) -> str:
    won = [(row["words"], row["other_words"]) for row in read if row["score"] == judge.WIN]
    won += [(row["other_words"], row["words"]) for row in read if row["score"] == judge.LOSS]
    return "; ".join(f"{sum(side) / len(won):.1f}" for side in zip(*won)) if won else "no pair was decided"


def plot(verdicts: list[dict], c: JudgeConfig, path: Path) -> None:
    """Win, tie and loss by each judge and by gold; how often judges are right, by the size of the true difference."""
    read = [row for row in verdicts if row["score"] is not None]
    names = list(dict.fromkeys(row["judge"] for row in read))
    bars = {name: torch.tensor([row["score"] for row in read if row["judge"] == name]) for name in names}
    gaps = {row["id"]: row["gold_gap"] for row in read if row["gold_gap"] is not None}
    figure, axes = plt.subplots(1, 2 if gaps else 1, figsize=(9 if gaps else 5, 2.6 + 0.3 * len(bars)), squeeze=False)
    if gaps:
        for name in names:
            mine = [(row["score"], row["gold_gap"]) for row in read if row["judge"] == name]
            groups = judge.accuracy(*torch.tensor(mine, dtype=torch.float64).T)
            middles = [(group["low"] + group["high"]) / 2 for group in groups]
            axes[0, 1].plot(middles, [group["right"] for group in groups], "o-", label=one_line(name))
        axes[0, 1].axhline(0.5, color="black", linewidth=0.8)
        axes[0, 1].set(
            xlabel="true difference", ylabel="right by gold", ylim=(0, 1.05), title="How often judges are right"
        )
        axes[0, 1].legend(fontsize=8)
        bars["gold"] = by_gold(torch.tensor(list(gaps.values()), dtype=torch.float64))
    for place, scores in enumerate(bars.values()):
        left = 0.0
        for share, color in (("win", "#0072B2"), ("tie", "#bbbbbb"), ("loss", "#D55E00")):
            size = judge.shares(scores)[share]
            axes[0, 0].barh(place, size, left=left, color=color, label=share if place == 0 else None)
            left += size
    axes[0, 0].set_yticks(range(len(bars)), [one_line(name) for name in bars])
    axes[0, 0].set(xlabel="share of pairs", xlim=(0, 1), ylim=(-0.6, len(bars) + 0.2))
    axes[0, 0].set_title(f"{Path(c.of).stem} against {Path(c.against).stem}")
    axes[0, 0].legend(fontsize=8, ncols=3, loc="upper center")
    finish(figure, path)


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())
