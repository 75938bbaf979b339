"""One run: which stages there are, what each depends on, what has to be done again.

    data -> sft -> preferences -> reward -> baselines -> ppo, contrastive, adaptive, dpo -> evaluation -> report

A finished stage is reused while its settings, the files that it read, and those of all it builds on, are unchanged.
What a stage does stands in `stages.py`, how it lies on the disk in `folder.py`.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..config import METHODS, Config, UserError
from ..engine.files import read_json, write_json
from ..engine.peak import peak_bytes, start_peak
from . import folder, stages
from .checks import check_answers, check_batch, check_size, naming_the_knob
from .pipeline import Pipeline
from .report import write_report

DERIVED = ("evaluation",)  # redone without asking when something before them changed


@dataclass
class Stage:
    build: Callable  # (pipeline, folder) -> summary in one line
    settings: dict  # everything that the result depends on, besides the stages below
    needs: tuple[str, ...]  # stages it reads
    fingerprint: str = ""  # of its settings and of all it builds on


# ------------------------------------------------------------------------------------------------ the plan


def make_plan(c: Config) -> dict[str, Stage]:
    """All stages of a run in order, by name."""
    seed = {"seed": c.run.seed, "precision": c.run.precision}
    size = {"sampling_batch_size": c.run.sampling_batch_size}
    world = asdict(c.world) if c.data.dataset == "reviews" else {}
    raters = {key: world.pop(key) for key in ("pairs", "label_flips", "flips", "fooled") if key in world}
    noise = {key: world.pop(key) for key in ("prompt_bias", "bias_from", "score_noise") if key in world}
    files = {
        "files": [stamp for name in (c.data.dataset, c.data.eval_dataset, c.model.name) for stamp in file_stamps(name)]
    }
    plan = {"data": Stage(stages.build_data, {**seed, **world, **asdict(c.data), **asdict(c.model), **files}, ())}
    plan["sft"] = Stage(stages.build_sft, {**seed, **asdict(c.sft)}, ("data",))
    trains_reward = c.reward.source == "train"
    if trains_reward or "dpo" in c.method_list():
        plan["preferences"] = Stage(stages.build_preferences, {**seed, **raters, **size}, ("sft",))
    files = {"files": file_stamps(c.reward.source)}
    needs = ("sft", "preferences") if trains_reward else ("data",)
    plan["reward"] = Stage(stages.build_reward, {**seed, **size, **asdict(c.reward), **files}, needs)
    sampled = {**seed, **noise}
    if c.contrastive.source != "group":
        # prompts that PPO never meets need no baselines: these two numbers say which it meets
        served = {"iterations": stages.offline_iterations(c), "prompts": c.ppo.batch_size // c.ppo.group_size}
        served = {"prompts": "all"} if c.baselines.prompts == "all" else served
        settings = {**sampled, **size, **asdict(c.baselines), **served}
        plan["baselines"] = Stage(stages.build_baselines, settings, ("sft", "reward"))
    for name in c.method_list():
        contrastive, needs = {}, ("sft", "reward")
        if name == "dpo":
            plan[name] = Stage(stages.build_dpo, {**seed, **asdict(c.dpo)}, ("sft", "preferences"))
            continue
        if METHODS[name].contrast:
            contrastive = {"contrastive": asdict(c.contrastive)}
            needs += ("baselines",) if "baselines" in plan else ()
        plan[name] = Stage(
            partial(stages.build_ppo, name=name), {**sampled, **size, **asdict(c.ppo), **contrastive}, needs
        )
    settings = {**seed, **size, **asdict(c.eval), "temperature": c.ppo.temperature, "files": file_stamps(c.eval.judge)}
    plan["evaluation"] = Stage(stages.build_evaluation, settings, ("sft", "reward", *c.method_list()))
    for name, stage in plan.items():
        stage.fingerprint = fingerprint([name, stage.settings, [plan[need].fingerprint for need in stage.needs]])
    return plan


def fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_stamps(name: str) -> list[list]:
    """Name, size and time of change of what a knob names on this disk: FILE, FILE.py:FUNCTION, or all of a folder."""
    if name in ("", "reviews", "tiny", "train", "gold", "reward", "auto"):
        return []
    path = Path(name.rpartition(":")[0] if ".py:" in name else name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def requirements(plan: dict[str, Stage], name: str) -> set[str]:
    """The stage and everything it builds on, directly or not."""
    return {name}.union(*(requirements(plan, need) for need in plan[name].needs))


# ------------------------------------------------------------------------------------------------- the run


def run_to(pipe: Pipeline, last: str = "all", redo: bool = False) -> None:
    """Run every stage that `last` builds on, then `last` itself; 'all' runs everything."""
    check_size(pipe.config)
    check_answers(pipe, functions=True)
    plan = make_plan(pipe.config)
    if last != "all" and last not in plan:
        raise UserError(f"stage '{last}' is not part of this run: its stages are {', '.join(plan)}")
    folder.check(pipe.folder, plan)
    with folder.lock(pipe.folder):
        check_stale(pipe, plan, redo)
        write_json(pipe.folder / "config.json", asdict(pipe.config))
        wanted = set(plan) if last == "all" else requirements(plan, last)
        for name, stage in plan.items():
            if name in wanted:
                run_stage(pipe, name, stage)
        if "evaluation" in wanted:
            show_results(pipe)


def run_stage(pipe: Pipeline, name: str, stage: Stage) -> None:
    """Reuse a finished stage, or build it: from nothing, or from where it was stopped."""
    final, part = pipe.path(name), pipe.path(f"{name}.part")
    if folder.is_finished(final, stage.fingerprint):
        pipe.log(f"{name}: done before, reused")
        return
    folder.begin(part, stage.fingerprint, stage.settings)
    if (part / "checkpoint.pt").exists():
        pipe.log(f"{name}: going on from a checkpoint")
    started = time.monotonic()
    start_peak(pipe.device)
    with naming_the_knob(name):
        summary = stage.build(pipe, part)
    cost = {"seconds": time.monotonic() - started, "peak_bytes": peak_bytes(pipe.device)}
    write_json(part / "cost.json", cost)
    (part / "checkpoint.pt").unlink(missing_ok=True)  # not before: what comes after training may fail
    folder.finish(part, final)
    memory = "" if pipe.tiny else f", {cost['peak_bytes'] / 1e9:.1f} GB"
    pipe.log(f"{name}: {summary} ({cost['seconds']:.0f} s{memory})")


def check_stale(pipe: Pipeline, plan: dict[str, Stage], redo: bool) -> None:
    """Refuse to redo finished stages that were made with other settings, unless that is wanted."""
    built = {name: folder.built_with(pipe.path(name)) for name in plan}
    if pipe.config.baselines.prompts == "met" and folder.is_finished(pipe.path("data"), plan["data"].fingerprint):
        check_batch(pipe.config, pipe.prompts("train"))
    stale = [name for name in plan if built[name] and built[name].get("fingerprint") != plan[name].fingerprint]
    for name in stale:
        folder.refuse_foreign(pipe.path(name))
    stale = [name for name in stale if name not in DERIVED]
    if not stale:
        return
    changed = "; ".join(changes(pipe, plan, built)[:4]) or "the project itself has changed"
    if not redo:
        mend = f"add --redo to redo {', '.join(stale)}, or choose another --out"
        raise UserError(f"--out {pipe.folder} holds another config ({changed}): {mend}")
    pipe.log(f"changed: {changed}; will redo {', '.join(stale)}")


def changes(pipe: Pipeline, plan: dict[str, Stage], built: dict[str, dict]) -> list[str]:
    """What differs from the folder, for a message: ['ppo.lr was 0.001, is 0.002', 'judge.py has changed']."""
    try:
        old = read_json(pipe.folder / "config.json")
    except (OSError, ValueError):
        old = {}
    new = asdict(pipe.config)
    new["run"] = {"seed": pipe.config.run.seed, "precision": pipe.config.run.precision}
    found = [
        f"{group}.{knob} was {old[group][knob]}, is {value}".removeprefix("run.")
        for group, knobs in new.items()
        for knob, value in knobs.items()
        if old.get(group, {}).get(knob, value) != value
    ]
    for name, stage in plan.items():
        before = built[name].get("settings", {}).get("files", [])
        found += [f"{file[0]} has changed" for file in stage.settings.get("files", []) if before and file not in before]
    return found


def show_results(pipe: Pipeline) -> None:
    """The report, the table and the samples; written and shown also when the evaluation was done before."""
    methods = pipe.config.method_list()
    summary = read_json(pipe.path("evaluation") / "summary.json")
    results = {method: pipe.rows("evaluation", method) for method in ("sft", *methods)}
    metrics = {method: pipe.rows(method, "metrics") for method in methods if method != "dpo"}
    baselines = pipe.path("baselines") / "variance.json"
    law = pipe.injected() + (read_json(baselines).get("in_words", []) if baselines.exists() else [])
    samples = write_report(pipe.folder, pipe.config.run.seed, summary, results, metrics, law)
    pipe.log(f"\n{summary['table']}\n\n{samples}\n")
    pipe.log(f"see {pipe.folder / 'report.md'} and the figures beside it")
