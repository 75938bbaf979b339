"""Many runs for one question: every variant with every seed, in parallel, resumable, paired by seed.

A variant is a method and the settings in which it differs from the defaults. Runs of one seed share their data,
SFT policy, preferences and reward model (the "base"), meet the same prompts in the same order and draw from the
same random streams, so differences between variants are paired. Every run is an ordinary run folder: an experiment
that was stopped goes on where it was, and two experiments that need the same run share it.

Two endpoints, fixed before any run: `mean_gold`, the true reward of the rollouts, over all iterations; and `gold`, that
of four responses to each of 256 held-out prompts at the end. Seeds for tuning, for pilots and for results are disjoint.
How many: of two runs of one seed `mean_gold` differs by chance with a standard deviation of 0.03 (pilots), so 24 seeds
see a difference of 0.02 in nine cases of ten. None were added after a look. Intervals are 95% Student t intervals.
"""

import math
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crlhf.config import Config
from crlhf.engine.files import Progress, read_json, read_jsonl, write_json, write_jsonl
from crlhf.evaluate import column, compare, evaluate_policy
from crlhf.pipeline.options import from_dict, validate
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.plan import make_plan
from crlhf.pipeline.run import run_to
from crlhf.reviews import EXPLOIT, difficulty_name, gold_reward

TUNING_SEEDS = tuple(range(200, 206))
SEEDS = tuple(range(1000, 1024))  # of all results
START = {"world.prompt_bias": 0.0}  # where experiments differ from the defaults: nothing is added to rewards unasked
UPSTREAM = ("data", "sft", "preferences", "reward", "baselines")  # what a run takes over from its base
NOISE = ("world.prompt_bias", "world.score_noise")  # faults of the reward that come after the reward model
RATERS = ("world.label_flips", "world.flips", "world.fooled", "world.pairs")  # faults that it learns
RESPONSES = 4  # per held-out prompt

Label = tuple[str, str]  # (setting, method), as tables and figures show them
Folders = dict[tuple[Label, int], Path]  # (label, seed) -> run folder


@dataclass(frozen=True)
class Variant:
    """One way to train: a method, and the settings in which it differs from the defaults."""

    method: str  # ppo, contrastive, adaptive or dpo
    settings: dict = field(default_factory=dict)  # {"ppo.kl_coef": 0.05}
    base: str = ""  # folder name of a base that a question prepares by itself

    def name(self) -> str:
        base = [self.base] if self.base else []
        return ",".join([self.method, *base, *changed(self.settings)])

    def upstream(self) -> dict:
        """The settings that a base depends on."""
        groups = ("world", "data", "model", "sft", "reward")
        return {key: v for key, v in self.settings.items() if key.split(".")[0] in groups and key not in NOISE}


def default(key: str) -> Any:
    """The value of "ppo.kl_coef" in a run that changes nothing."""
    group, knob = key.split(".")
    return START.get(key, getattr(getattr(Config(), group), knob))


def changed(settings: dict) -> list[str]:
    """["ppo.kl_coef=0.05", ...] of the settings that differ from their defaults: the name of a run."""
    return [f"{key}={value}" for key, value in sorted(settings.items()) if value != default(key)]


def configured(folder: str | Path, seed: int, method: str, settings: dict) -> Config:
    """The default config with some settings changed: configured(f, 0, "ppo", {"ppo.kl_coef": 0.05})."""
    config = Config()
    for key, value in {**START, **settings}.items():
        group, knob = key.split(".")
        setattr(getattr(config, group), knob, value)
    config.run.out, config.run.seed, config.run.methods = str(folder), seed, method
    config.run.threads, config.run.device = 1, "cpu"
    validate(config)
    return config


# ------------------------------------------------------------------------------------------- running runs


def take_over(base: Path, out: Path) -> None:
    """Link the finished stages of a base into a run folder; the run redoes what its settings change."""
    for stage in UPSTREAM:
        target = out / stage
        if not target.exists():
            temporary = target.with_name(stage + ".copy")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(base / stage, temporary, copy_function=link)
            os.replace(temporary, target)
    shutil.copy(base / "config.json", out / "config.json")


def copy_base(source: Path, target: Path, stages: Sequence[str] = UPSTREAM) -> None:
    """A base of its own, to be changed by a question: copies, where `take_over` links."""
    for stage in stages:
        shutil.copytree(source / stage, target / stage, dirs_exist_ok=True)
    shutil.copy(source / "config.json", target / "config.json")


def link(source: str, target: str) -> None:
    """A hard link where the disk has them: files of finished stages are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def silent_pipeline(config: Config) -> Pipeline:
    return Pipeline(config, log=lambda text: None)


def open_run(folder: Path) -> Pipeline:
    """The pipeline of a finished run."""
    config = from_dict(read_json(folder / "config.json"))
    config.run.out = str(folder)
    return silent_pipeline(config)


def run_base(base: Path, seed: int, settings: dict, above: Path | None = None) -> None:
    """In a process of its own: everything up to the baselines, and what the SFT policy says on held-out prompts."""
    if above is not None:
        take_over(above, base)
    pipeline = silent_pipeline(configured(base, seed, "contrastive", settings))
    run_to(pipeline, "baselines", redo=True)
    if not is_finished(base):
        write_jsonl(base / "held_out.jsonl", held_out_rows(pipeline, "sft"))


def run_one(out: Path, base: Path, seed: int, method: str, settings: dict) -> None:
    """In a process of its own: train one variant on its base, then measure it."""
    started = time.monotonic()
    take_over(base, out)
    pipeline = silent_pipeline(configured(out, seed, method, settings))
    run_to(pipeline, method, redo=True)
    rows = held_out_rows(pipeline, method)
    write_jsonl(out / "held_out.jsonl", rows)
    measured = summary(rows, read_jsonl(base / "held_out.jsonl"))
    measured |= course(out / method, pipeline.config.ppo.critic_warmup)
    done = {"fingerprint": make_plan(pipeline.config)[method].fingerprint, "seconds": time.monotonic() - started}
    write_json(out / "result.json", done | measured)


def held_out_rows(pipeline: Pipeline, stage: str) -> list[dict]:
    """A policy's responses to the held-out prompts, with gold score, reward and log-ratio to the SFT policy."""
    judges = {"reward": pipeline.reward_callable("train"), "gold": gold_reward}
    policies, prompts = (pipeline.model(stage), pipeline.model("sft")), pipeline.prompts("eval") * RESPONSES
    return evaluate_policy(*policies, pipeline.tokenizer(), prompts, judges, pipeline.job("evaluation"))


def summary(rows: list[dict], sft_rows: list[dict]) -> dict[str, float]:
    """Means of a run over the held-out prompts; win, tie and loss against the SFT policy on the same prompts."""
    result = {name: column(rows, name).mean().item() for name in ("gold", "reward", "kl", "ended")}
    for name in ("easy", "medium", "hard"):
        group = [row["gold"] for row in rows if difficulty_name(row["prompt"]) == name]
        result[name] = sum(group) / len(group) if group else math.nan
    shares = compare(column(rows, "gold"), column(sft_rows, "gold"))
    result |= {name: shares[name] for name in ("win", "tie", "loss")}
    return result | {"exploit": sum(EXPLOIT in row["response"] for row in rows) / len(rows)}


def course(stage: Path, skip: int = 0) -> dict[str, float]:
    """What a PPO run was like on its way: true reward over all iterations but the first `skip`, in which the policy
    stood still; how much the critic foresaw; what contrast did to the variance."""
    rows = [row for row in read_jsonl(stage / "metrics.jsonl") if "explained_variance" in row][skip:]

    def mean(key: str, of: slice = slice(None)) -> float:
        found = [row[key] for row in rows[of] if key in row]
        return statistics.fmean(found) if found else math.nan

    way = {"mean_gold": mean("gold"), "explained": mean("explained_variance", slice(20, None))}
    way |= {"coefficient": mean("coefficient"), "variance": mean("reward_variance")}
    for name, part in (("start", slice(0, 3)), ("end", slice(-10, None))):
        way[f"ratio_{name}"] = mean("contrastive_variance", part) / mean("reward_variance", part)
    return way


def is_done(out: Path, seed: int, variant: Variant) -> bool:
    """Was this run measured with these settings? An experiment that is repeated asks only this."""
    try:
        found = read_json(out / "result.json")["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    plan = make_plan(configured(out, seed, variant.method, variant.settings))
    return found == plan[variant.method].fingerprint


def hide_progress() -> None:
    """In a worker process: the bars of several processes would overwrite each other."""
    Progress.hidden = True


def run_jobs(jobs: list[tuple], title: str) -> None:
    """Call (function, arguments...) jobs in parallel, one process a core. One bar counts the jobs."""
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context, hide_progress) as pool, Progress(len(jobs), title) as bar:
        try:
            for future in as_completed([pool.submit(*job) for job in jobs]):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def base_name(settings: dict) -> str:
    return ",".join(["base", *changed(settings)])


def is_finished(base: Path) -> bool:
    """What the SFT policy says is written last."""
    return (base / "held_out.jsonl").exists()


def prepare_bases(root: Path, seeds: Sequence[int], upstreams: list[dict]) -> None:
    """The bases of some upstream settings. Those that differ in their raters only start from one SFT policy."""
    first, second = {}, {}
    for seed in seeds:
        folder = root / f"seed{seed}"
        for settings in upstreams:
            shared = {key: value for key, value in settings.items() if key not in (*RATERS, *NOISE)}
            base, above = folder / base_name(settings), folder / base_name(shared)
            first[above] = (run_base, above, seed, shared)
            if base != above:
                second[base] = (run_base, base, seed, settings, above)
    for bases, title in ((first, "SFT and reward models"), (second, "reward models of other raters")):
        run_jobs([job for base, job in bases.items() if not is_finished(base)], title)


def run_variants(root: Path, variants: dict[Label, Variant], seeds: Sequence[int], title: str) -> Folders:
    """Train every variant with every seed, and return all run folders."""
    prepare_bases(root, seeds, [variant.upstream() for variant in variants.values() if not variant.base])
    folders, jobs = {}, {}  # jobs by folder: two labels may stand for one run
    for seed in seeds:
        for label, variant in variants.items():
            folder = root / f"seed{seed}"
            out, base = folder / variant.name(), folder / (variant.base or base_name(variant.upstream()))
            folders[label, seed] = out
            if not is_done(out, seed, variant):
                jobs[out] = (run_one, out, base, seed, variant.method, variant.settings)
    run_jobs(list(jobs.values()), title)
    return folders


# ------------------------------------------------------------------------------------------------ results


def results(folders: Folders) -> list[dict]:
    """One row per run: {setting, method, seed, gold, reward, ...}.

    rho and its standard error, from the baselines, stand in rows of adaptive runs only: a run of another method may
    stand for several constants, since it cancels them, or have no baselines.
    """
    rows = []
    for ((setting, method), seed), out in folders.items():
        found = read_json(out / "result.json")
        del found["fingerprint"]
        law = read_json(out / "baselines" / "variance.json") if method == "adaptive" else {}
        found |= {key: law.get(key, math.nan) for key in ("rho", "rho_se")}
        rows.append({"setting": setting, "method": method, "seed": seed, **found})
    return rows


def curves(folders: Folders, keys: Sequence[str]) -> list[dict]:
    """One row per run and iteration with some columns of metrics.jsonl."""
    rows = []
    for ((setting, method), seed), out in folders.items():
        trained = out.name.split(",")[0]  # ppo, contrastive, adaptive
        for row in read_jsonl(out / trained / "metrics.jsonl"):
            place = {"setting": setting, "method": method, "seed": seed, "iteration": row["iteration"]}
            rows.append(place | {key: row.get(key, "") for key in keys})
    return rows


def analyse(root: Path, name: str, measure: Callable, folders: Folders, seeds: Sequence[int]) -> list[dict]:
    """Rows that measure(seed, {label: run folder}) finds on finished runs: one process and one JSON a seed.

    A seed that was measured before on the same runs isn't measured again.
    """
    files, jobs = {seed: root / f"seed{seed}" / f"{name}.json" for seed in seeds}, []
    for seed, file in files.items():
        runs = {label: out for (label, other), out in folders.items() if other == seed}
        stamps = [[*label, read_json(out / "result.json")["fingerprint"]] for label, out in runs.items()]
        if not file.exists() or read_json(file)["runs"] != stamps:
            jobs.append((measure_to, file, stamps, measure, seed, runs))
    run_jobs(jobs, name)
    return [row for file in files.values() for row in read_json(file)["rows"]]


def measure_to(file: Path, stamps: list, measure: Callable, seed: int, runs: dict[Label, Path]) -> None:
    write_json(file, {"runs": stamps, "rows": measure(seed, runs)})
