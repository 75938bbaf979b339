"""The end of a run in words: the table, samples, and report.md with its figures."""

from pathlib import Path

from . import plots
from .evaluate import column, compare, mean_interval
from .runs import write_atomic

TITLES = {"sft": "SFT", "ppo": "plain PPO", "contrastive": "contrastive PPO", "adaptive": "contrastive PPO, adaptive",
          "dpo": "DPO"}


def summarise(results, judges, deciding):
    """Per method: mean and interval of every score, KL, share that ended, and comparisons by the deciding judge.

    results: method -> rows of `evaluate_policy`, all on the same prompts. Also holds the table as text.
    """
    summary = {"judge": deciding, "methods": {}}
    for method, rows in results.items():
        entry = {name: mean_interval(column(rows, name)) for name in (*judges, "kl")}
        entry["ended"] = column(rows, "ended").mean().item()
        for other in ("sft", "ppo"):
            if other in results and other != method and method != "sft":
                entry[f"against_{other}"] = compare(column(rows, deciding), column(results[other], deciding))
        summary["methods"][method] = entry
    summary["table"] = table(summary, judges, len(results["sft"]))
    return summary


def table(summary, judges, n):
    """A Markdown table that also reads well in a terminal."""
    header = ["method", *judges, "KL (nats)", "ended", "vs SFT: win / tie / loss", "vs plain PPO: win / tie / loss",
              "minus plain PPO"]
    lines = []
    for method, entry in summary["methods"].items():
        versus, plain = entry.get("against_sft"), entry.get("against_ppo")
        lines.append([TITLES[method], *(pm(entry[name]) for name in (*judges, "kl")), f"{entry['ended']:.0%}",
                      shares(versus), shares(plain), pm(plain["difference"], sign=True) if plain else ""])
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    body = "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
                     for line in [header, rule, *lines])
    return (f"{body}\n\n{n} held-out prompts, one response each. ± and [ ] are 95% intervals over prompts, for this one "
            f"training seed. {summary['judge']} decides wins.")


def shares(comparison):
    """'55% [49, 61] / 27% / 18%': wins with their Wilson interval, ties, losses."""
    if comparison is None:
        return ""
    low, high = comparison["win_interval"]
    return f"{comparison['win']:.0%} [{100 * low:.0f}, {100 * high:.0f}] / {comparison['tie']:.0%} / {comparison['loss']:.0%}"


def pm(mean_and_half, sign=False):
    mean, half = mean_and_half
    return f"{mean:{'+' if sign else ''}.2f} ± {half:.2f}"


def samples_text(results, deciding, n):
    """The same first prompts, answered by every method."""
    lines = []
    for i in range(min(n, len(results["sft"]))):
        lines += ["", f"prompt: {results['sft'][i]['prompt'].strip()}"]
        lines += [f"  {TITLES[method]:<26} {rows[i][deciding]:+.2f}  {rows[i]['response'].strip() or '(nothing)'}"
                  for method, rows in results.items()]
    return "\n".join(lines)


def write_report(folder, config, summary, results, metrics, world):
    """report.md and its figures in the run folder."""
    folder = Path(folder)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    names = []
    if metrics:
        names.append(plots.learning_curves(metrics, figures / "learning.png"))
        names.append(plots.variance_curves(metrics, figures / "variance.png"))
    if world:
        names.append(plots.gold_by_difficulty(results, figures / "difficulty.png"))
    pictures = "\n\n".join(f"![{name}](figures/{name}.png)" for name in names)
    write_atomic(folder / "report.md", f"""# {folder.name}

{summary['table']}

{pictures}

## Samples

The first {config.eval.samples} held-out prompts, with the judge's score.

```text
{samples_text(results, summary['judge'], config.eval.samples).strip()}
```

Made by `python -m crlhf` with the settings in `config.json`, seed {config.run.seed}. One seed is an anecdote: compare
methods over several.
""")
