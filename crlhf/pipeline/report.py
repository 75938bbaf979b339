"""The end of a run in words: the table, samples, and report.md with its figures."""

import math
from pathlib import Path

from ..engine.files import write_atomic
from ..evaluate import column, compare, mean_interval
from . import plots
from .output import fenced, one_line, printable
from .plots import STYLES
from .tables import markdown_table

SAMPLES = 3  # prompts whose responses are shown


def summarise(results: dict[str, list[dict]], judges: list[str]) -> dict:
    """Per method: mean and interval of every score, KL, share that ended, and comparisons by the last judge.

    results: method -> rows of `evaluate_policy`, all on the same prompts. Also holds the table as text.
    """
    judge = judges[-1]
    summary = {"judge": judge, "methods": {}}
    for method, rows in results.items():
        entry = {name: mean_interval(column(rows, name)) for name in (*judges, "kl")}
        entry["ended"] = column(rows, "ended").mean().item()
        for other in ("sft", "ppo"):
            if other in results and method not in ("sft", other):
                entry[f"against_{other}"] = compare(column(rows, judge), column(results[other], judge))
        summary["methods"][method] = entry
    summary["table"] = summary_table(summary, judges, len(results["sft"]))
    return summary


def summary_table(summary: dict, judges: list[str], n: int) -> str:
    """A Markdown table that also reads well in a terminal."""
    header = ["method", *judges, "KL (nats)", "ended"]
    header += ["vs SFT: win / tie / loss", "vs plain PPO: win / tie / loss", "minus plain PPO"]
    lines = []
    for method, entry in summary["methods"].items():
        against_sft, against_ppo = entry.get("against_sft"), entry.get("against_ppo")
        cells = [STYLES[method].title]
        cells += [with_interval(entry[name]) for name in (*judges, "kl")]
        cells += [f"{entry['ended']:.0%}", win_tie_loss(against_sft), win_tie_loss(against_ppo)]
        cells.append(with_interval(against_ppo["difference"], "+") if against_ppo else "")
        lines.append(cells)
    return (
        f"{markdown_table(header, lines, aligned=True)}\n\n{n} held-out prompts, one response each. ± and [ ] are "
        f"95% intervals over prompts, for this one training seed. {summary['judge']} decides wins."
    )


def win_tie_loss(comparison: dict | None) -> str:
    """'55% [49, 61] / 27% / 18%': wins with their Wilson interval, ties, losses."""
    if comparison is None:
        return ""
    low, high = comparison["win_interval"]
    wins = f"{comparison['win']:.0%} [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{wins} / {comparison['tie']:.0%} / {comparison['loss']:.0%}"


def with_interval(mean_and_half: tuple[float, float], sign: str = "") -> str:
    """'0.16 ± 0.07', with more decimals where the interval is so small that two would hide it."""
    mean, half = mean_and_half
    decimals = 2
    if half > 0:
        decimals = min(max(2, 1 - math.floor(math.log10(half))), 8)
    return f"{mean:{sign}.{decimals}f} ± {half:.{decimals}f}"


def samples_text(results: dict[str, list[dict]], judge: str) -> str:
    """The same first prompts, answered by every method."""
    lines = []
    for i, row in enumerate(results["sft"][:SAMPLES]):
        lines += ["", f"prompt: {one_line(row['prompt'])}"]
        for method, rows in results.items():
            response = one_line(rows[i]["response"]) or "(nothing)"
            lines.append(f"  {STYLES[method].title:<26} {rows[i][judge]:+.2f}  {response}")
    return "\n".join(lines).strip()


def write_report(
    folder: Path, seed: int, summary: dict, results: dict[str, list[dict]], metrics: dict, law: list[str]
) -> str:
    """report.md and its figures in the run folder; returns the samples.

    metrics: method -> rows, for PPO's methods. law: lines about what the baselines foretell of contrast.
    """
    samples = samples_text(results, summary["judge"])
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    names = []
    if metrics:
        names.append(plots.learning_curves(metrics, figures / "learning.png"))
        names.append(plots.variance_curves(metrics, figures / "variance.png"))
    if "gold" in results["sft"][0]:
        names.append(plots.gold_by_difficulty(results, figures / "difficulty.png"))
    pictures = "\n\n".join(f"![{name}](figures/{name}.png)" for name in names)
    foretold = ""
    if law:
        lines = "".join(f"\n- {line}" for line in law)
        foretold = f"\n## The reward, and what the baselines foretell\n{lines}\n"
    write_atomic(
        folder / "report.md",
        f"""# {printable(folder.name)}

{summary["table"]}

{pictures}
{foretold}
## Samples

The first {SAMPLES} held-out prompts, with the judge's score.

{fenced(samples)}

Made by `python -m crlhf` with the settings in `config.json`, seed {seed}. One seed is an anecdote: compare
methods over several.
""",
    )
    return samples
