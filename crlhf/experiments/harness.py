"""Many runs for one question: every variant with every seed, in parallel, resumable, paired by seed.

A variant is a method and the settings in which it differs from the defaults. Runs of one seed share their data,
SFT policy, preferences and reward model (the "base"), meet the same prompts in the same order and draw from the
same random streams, so differences between variants are paired. Every run is an ordinary run folder: an experiment
that was stopped goes on where it was, and two experiments that need the same run share it.

A run's result is measured on 256 held-out prompts with four responses each. Intervals are 95% Student t intervals
over seeds.
"""

import csv
import io
import json
import math
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config, validate
from ..evaluate import column, compare, evaluate_policy, mean_interval
from ..reviews import EXPLOIT, difficulty, difficulty_name, gold_reward
from ..runs import hide_progress, progress, read_jsonl, write_atomic, write_json, write_jsonl

SEEDS = tuple(range(8))
UPSTREAM = ("data", "sft", "preferences", "reward", "baselines")  # what a run takes over from its base
NOISE = ("world.prompt_bias", "world.score_noise")  # faults of the reward that come after the reward model
RATERS = ("world.label_flips", "world.flips", "world.fooled", "world.pairs")  # faults that it learns
RESPONSES = 4  # per held-out prompt


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, and the settings in which it differs from the defaults."""

    method: str                                   # ppo, contrastive, adaptive or dpo
    settings: dict = field(default_factory=dict)  # {"ppo.kl_coef": 0.05}
    base: str = ""                                # folder name of a base that a question prepares by itself

    def name(self):
        return ",".join([self.method, *([self.base] if self.base else []), *changed(self.settings)])

    def upstream(self):
        """The settings that a base depends on."""
        return {key: value for key, value in self.settings.items() if key not in NOISE
                and key.split(".")[0] in ("world", "data", "model", "sft", "reward")}


def default(key):
    """The default of "ppo.kl_coef"."""
    group, knob = key.split(".")
    return getattr(getattr(Config(), group), knob)


def changed(settings):
    """["ppo.kl_coef=0.05", ...] of the settings that differ from their defaults: the name of a run."""
    return [f"{key}={value}" for key, value in sorted(settings.items()) if value != default(key)]


def configured(folder, seed, method, settings):
    """The default config with some settings changed: configured(f, 0, "ppo", {"ppo.kl_coef": 0.05})."""
    config = Config()
    for key, value in settings.items():
        group, knob = key.split(".")
        setattr(getattr(config, group), knob, value)
    config.run.out, config.run.seed, config.run.methods = str(folder), seed, method
    config.run.threads, config.run.device = 1, "cpu"
    validate(config)
    return config


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- running runs


def take_over(base, out):
    """Link the finished stages of a base into a run folder; the run redoes what its settings change."""
    for stage in UPSTREAM:
        target = Path(out) / stage
        if not target.exists():
            temporary = target.with_name(stage + ".copy")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(Path(base) / stage, temporary, copy_function=link)
            os.replace(temporary, target)
    shutil.copy(Path(base) / "config.json", Path(out) / "config.json")


def copy_base(source, target, stages=UPSTREAM):
    """A base of its own, to be changed by a question: copies, where `take_over` links."""
    for stage in stages:
        shutil.copytree(Path(source) / stage, Path(target) / stage, dirs_exist_ok=True)
    shutil.copy(Path(source) / "config.json", Path(target) / "config.json")


def link(source, target):
    """A hard link where the disk has them: files of finished stages are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def run_base(base, seed, settings, above=None):
    """In a process of its own: everything up to the baselines, and what the SFT policy says on held-out prompts."""
    pipeline = silent_pipeline(configured(base, seed, "contrastive", settings), above)
    pipeline.run_to("baselines", redo=True)
    if not (Path(base) / "held_out.jsonl").exists():
        write_jsonl(Path(base) / "held_out.jsonl", held_out_rows(pipeline, "sft"))


def run_one(out, base, seed, method, settings):
    """In a process of its own: train one variant on its base, then measure it."""
    started = time.monotonic()
    pipeline = silent_pipeline(configured(out, seed, method, settings), base)
    pipeline.run_to(method, redo=True)
    rows = held_out_rows(pipeline, method)
    write_jsonl(Path(out) / "held_out.jsonl", rows)
    write_json(Path(out) / "result.json", {"fingerprint": pipeline.fingerprints()[method],
                                           "seconds": time.monotonic() - started,
                                           **summary(rows, read_jsonl(Path(base) / "held_out.jsonl"))})


def silent_pipeline(config, base):
    from ..pipeline import Pipeline

    if base is not None:
        take_over(base, config.run.out)
    return Pipeline(config, say=lambda text: None)


def held_out_rows(pipeline, stage):
    """A policy's responses to the held-out prompts, with gold score, reward and log-ratio to the SFT policy."""
    c = pipeline.config
    judges = {"reward": pipeline.reward_callable("train"), "gold": gold_reward}
    return evaluate_policy(pipeline.model(stage), pipeline.model("sft"), pipeline.tokenizer(),
                           pipeline.prompts("eval") * RESPONSES, judges, c.data.max_response_tokens, c.run.seed)


def summary(rows, sft_rows):
    """Means of a run over the held-out prompts; win, tie and loss against the SFT policy on the same prompts."""
    result = {name: column(rows, name).mean().item() for name in ("gold", "reward", "kl", "ended")}
    for name in ("easy", "medium", "hard"):
        group = [row["gold"] for row in rows if difficulty_name(difficulty(row["prompt"])) == name]
        result[name] = sum(group) / len(group) if group else math.nan
    shares = compare(column(rows, "gold"), column(sft_rows, "gold"))
    result |= {name: shares[name] for name in ("win", "tie", "loss")}
    return result | {"exploit": sum(EXPLOIT in row["response"] for row in rows) / len(rows)}


def is_done(out, seed, variant):
    """Was this run measured with these settings? An experiment that is repeated asks only this."""
    from ..pipeline import Pipeline

    try:
        found = read_json(out / "result.json")["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    return found == Pipeline(configured(out, seed, variant.method, variant.settings)).fingerprints()[variant.method]


def run_jobs(jobs, title):
    """Call (function, arguments...) jobs in parallel, one process a core. One bar counts the jobs."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, hide_progress) as pool, progress(len(jobs), title) as bar:
        try:
            for future in as_completed([pool.submit(*job) for job in jobs]):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def base_name(settings):
    return ",".join(["base", *changed(settings)])


def prepare_bases(root, seeds, upstreams):
    """The bases of some upstream settings. Those that differ in their raters only start from one SFT policy."""
    first, second = {}, {}
    for seed in seeds:
        folder = Path(root) / f"seed{seed}"
        for settings in upstreams:
            shared = {key: value for key, value in settings.items() if key not in RATERS}
            base, above = folder / base_name(settings), folder / base_name(shared)
            first[above] = (run_base, str(above), seed, shared)
            if base != above:
                second[base] = (run_base, str(base), seed, settings, str(above))
    for bases, title in ((first, "SFT and reward models"), (second, "reward models of other raters")):
        run_jobs([job for base, job in bases.items() if not (base / "held_out.jsonl").exists()], title)


def run_variants(root, variants, seeds=SEEDS, title="runs"):
    """Train every variant with every seed. variants: dict label -> Variant. Returns {(label, seed): run folder}."""
    prepare_bases(root, seeds, [variant.upstream() for variant in variants.values() if not variant.base])
    folders = {(label, seed): Path(root) / f"seed{seed}" / variant.name()
               for seed in seeds for label, variant in variants.items()}
    jobs = {}  # by folder: two labels may stand for one run
    for (label, seed), out in folders.items():
        variant = variants[label]
        base = out.parent / (variant.base or base_name(variant.upstream()))
        if not is_done(out, seed, variant):
            jobs[out] = (run_one, str(out), str(base), seed, variant.method, variant.settings)
    run_jobs(list(jobs.values()), title)
    return folders


# ---------------------------------------------------------------------------------------- results as tables


def results(folders):
    """One row per run: {setting, method, seed, gold, reward, ...}. Labels are (setting, method)."""
    rows = []
    for ((setting, method), seed), out in folders.items():
        found = read_json(out / "result.json")
        del found["fingerprint"]
        rows.append({"setting": setting, "method": method, "seed": seed, **found})
    return rows


def curves(folders, keys):
    """One row per run and iteration with some columns of metrics.jsonl."""
    rows = []
    for ((setting, method), seed), out in folders.items():
        stage = out.name.split(",")[0]  # ppo, contrastive, adaptive
        rows += [{"setting": setting, "method": method, "seed": seed, "iteration": row["iteration"],
                  **{key: row.get(key, "") for key in keys}} for row in read_jsonl(out / stage / "metrics.jsonl")]
    return rows


def values(rows, setting, method, key="gold"):
    """Values of one variant, in the order of their seeds."""
    mine = [row for row in rows if (row["setting"], row["method"]) == (setting, method)]
    return [row[key] for row in sorted(mine, key=lambda row: row["seed"])]


def difference(rows, setting, method, reference="ppo", key="gold", reference_setting=None):
    """(mean, half-width) of a variant minus a reference, paired by seed."""
    others = values(rows, setting if reference_setting is None else reference_setting, reference, key)
    return mean_interval([a - b for a, b in zip(values(rows, setting, method, key), others, strict=True)])


def settings_of(rows):
    return list(dict.fromkeys(row["setting"] for row in rows))


def methods_of(rows, setting=None):
    return list(dict.fromkeys(row["method"] for row in rows if setting in (None, row["setting"])))


def table(rows, heading, reference="ppo"):
    """Mean over seeds, and the paired difference to a reference method in the same setting, as Markdown."""
    lines = [f"| {heading} | method | gold | minus {reference} (paired) | reward | KL | win / tie / loss vs SFT |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for setting in settings_of(rows):
        for method in methods_of(rows, setting):
            mean = lambda key: sum(values(rows, setting, method, key)) / len(values(rows, setting, method, key))
            has_gap = method != reference and reference in methods_of(rows, setting)
            gap = "%+.3f ± %.3f" % difference(rows, setting, method, reference) if has_gap else ""
            gold = "%.3f ± %.3f" % mean_interval(values(rows, setting, method))
            shares = " / ".join(f"{mean(share):.0%}" for share in ("win", "tie", "loss"))
            lines.append(f"| {setting} | {method} | {gold} | {gap} | {mean('reward'):.2f} | {mean('kl'):.1f} | "
                         f"{shares} |")
    return "\n".join(lines)


def write_csv(path, rows):
    """Rows (dicts with the same keys) as a CSV; numbers keep four digits behind the point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    write_atomic(path, text.getvalue())
