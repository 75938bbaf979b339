"""Evidence: one function a question, several seeds, one figure and one CSV each.

    python -m crlhf experiment compare

An experiment is a set of ordinary runs that differ in a few settings. Runs of one seed share their data, SFT
policy, preferences and reward model, and meet the same prompts in the same order, so that differences between
methods are paired. Every run is a run folder, so an experiment that was stopped goes on where it was.

Intervals are 95% Student t intervals over seeds.
"""

import csv
import io
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from .config import Config, UserError
from .evaluate import mean_interval
from .runs import progress, read_jsonl, write_atomic

SHARES = ("win", "tie", "loss")
UPSTREAM = ("data", "sft", "preferences", "reward")  # what all runs of one seed share


# ------------------------------------------------------------------------------------------- running runs


def configured(folder, seed, **groups):
    """The default config with some settings changed: configured(f, 0, world={"prompt_bias": 0.0})."""
    config = Config()
    for group, values in groups.items():
        setattr(config, group, replace(getattr(config, group), **values))
    config.run = replace(config.run, out=str(folder), seed=seed, threads=1, device="cpu")
    return config


def run_one(config, last, base):
    """In a process of its own: take over the finished stages of `base`, then run to `last`."""
    from .pipeline import Pipeline

    os.environ["TQDM_DISABLE"] = "1"
    if base is not None:
        for stage in UPSTREAM:
            target = Path(config.run.out) / stage
            if not target.exists():
                temporary = target.with_name(stage + ".copy")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(Path(base) / stage, temporary)
                os.replace(temporary, target)
        shutil.copy(Path(base) / "config.json", Path(config.run.out) / "config.json")
    Pipeline(config, say=lambda text: None).run_to(last, redo=True)


def run_all(jobs, title):
    """Run (config, last stage, base folder) jobs in parallel, one process a core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool, progress(len(jobs), title) as bar:
        for future in as_completed([pool.submit(run_one, *job) for job in jobs]):
            future.result()
            bar.update()


def run_variants(folder, seeds, variants):
    """One run per seed and variant (name -> changed settings). Returns {(variant, seed): run folder}."""
    folder = Path(folder)
    bases = {seed: folder / f"seed{seed}" / "base" for seed in seeds}
    run_all([(configured(base, seed), "reward", None) for seed, base in bases.items()], "SFT and reward models")
    runs = {(name, seed): folder / f"seed{seed}" / name for name in variants for seed in seeds}
    run_all([(configured(run, seed, **variants[name]), "all", bases[seed]) for (name, seed), run in runs.items()],
            "runs")
    return runs


def write_csv(path, rows):
    """Rows (dicts with the same keys) as a CSV; numbers keep four digits behind the point."""


    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    write_atomic(path, text.getvalue())


# -------------------------------------------------------------------------------------------- experiments


def compare(folder, figures, seeds=range(8)):
    """Does contrastive PPO beat plain PPO in true reward, without and with a rater bias per prompt?

    Prediction: a constant per prompt doesn't change the optimum, so all methods approach the same gold score.
    Without bias plain PPO has little to lose and contrastive PPO gains little. With a bias of standard deviation
    1 plain PPO learns from a reward most of whose variance is useless, and should be slower; contrastive PPO
    should not notice the bias at all.
    """
    from . import plots

    variants = {f"bias{bias:g}": {"world": {"prompt_bias": bias}} for bias in (0.0, 1.0)}
    runs = run_variants(folder, seeds, variants)
    curves, finals = [], []
    for (variant, seed), run in runs.items():
        summary = json.loads((run / "evaluation" / "summary.json").read_text())["methods"]
        for method, entry in summary.items():
            finals.append({"prompt_bias": float(variant[4:]), "method": method, "seed": seed, "gold": entry["gold"][0],
                           "reward": entry["reward"][0], "kl": entry["kl"][0],
                           **{share: entry["against_sft"][share] if method != "sft" else "" for share in SHARES}})
            if method != "sft":
                curves += [{"prompt_bias": float(variant[4:]), "method": method, "seed": seed, "iteration": row["iteration"],
                            "gold": row["gold"], "kl": row["kl"]} for row in read_jsonl(run / method / "metrics.jsonl")]
    write_csv(figures / "compare.csv", finals)
    write_csv(figures / "compare_curves.csv", curves)
    plots.compare(curves, finals, figures / "compare.png")
    return compare_table(finals)


def compare_table(finals):
    """Mean over seeds and paired differences to plain PPO, as a Markdown table."""
    lines = ["| rater bias | method | gold | minus plain PPO (paired) | KL (nats) | win / tie / loss vs SFT |",
             "| --- | --- | --- | --- | --- | --- |"]
    for bias in sorted({row["prompt_bias"] for row in finals}):
        plain = {row["seed"]: row["gold"] for row in finals if row["prompt_bias"] == bias and row["method"] == "ppo"}
        for method in dict.fromkeys(row["method"] for row in finals):
            rows = [row for row in finals if row["prompt_bias"] == bias and row["method"] == method]
            mean, half = mean_interval([row["gold"] for row in rows])
            gap = "%+.3f ± %.3f" % mean_interval([row["gold"] - plain[row["seed"]] for row in rows])
            shares = " / ".join(f"{sum(row[s] for row in rows) / len(rows):.0%}" for s in SHARES) if method != "sft" else ""
            kl = sum(row["kl"] for row in rows) / len(rows)
            lines.append(f"| {bias:g} | {method} | {mean:.3f} ± {half:.3f} | {gap if method not in ('ppo', 'sft') else ''} "
                         f"| {kl:.1f} | {shares} |")
    return "\n".join(lines)


EXPERIMENTS = {"compare": compare}


def main(name, folder="runs/experiments", figures="figures"):
    """Run one experiment, or all; print its table."""
    if name not in (*EXPERIMENTS, "all"):
        raise UserError(f"there is no experiment '{name}': choose from all, {', '.join(EXPERIMENTS)}")
    for each in EXPERIMENTS if name == "all" else [name]:
        print(EXPERIMENTS[each](Path(folder) / each, Path(figures)))
