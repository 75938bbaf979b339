"""One run: every stage of the plan that isn't done yet, and the report.

Which stages there are and what redoes them stands in `plan.py`, what they do in `stages.py`, how they lie on the disk
in `folder.py`.
"""

import time
from dataclasses import asdict

from ..config import UserError
from ..engine.files import read_json, write_json
from ..engine.peak import peak_bytes, start_peak
from . import folder
from .checks import check_answers, check_batch, check_size, naming_the_knob
from .pipeline import Pipeline
from .plan import Stage, make_plan, requirements
from .report import write_report

DERIVED = ("evaluation",)  # redone without asking when something before them changed


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
    changed = "; ".join(reasons(plan, built, stale)[:4]) or "the project itself has changed"
    if not redo:
        mend = f"add --redo to redo {', '.join(stale)}, or choose another --out"
        raise UserError(f"--out {pipe.folder} holds another config ({changed}): {mend}")
    pipe.log(f"changed: {changed}; will redo {', '.join(stale)}")


def reasons(plan: dict[str, Stage], built: dict[str, dict], stale: list[str]) -> list[str]:
    """Why stages have to be made again: ['ppo.lr was 0.001, is 0.002', 'judge.py has changed'].

    built: what their stage.json holds. The config.json of the folder has the settings of the last command alone.
    """
    told = []
    for name in stale:
        stage, old_settings = plan[name], built[name].get("settings", {})
        differences = settings_that_differ(stage, old_settings)
        if not differences and old_settings == stage.settings and not set(stage.needs) & set(stale):
            differences = [f"{name} was made from an earlier {' or '.join(stage.needs)}"]
        told += differences
    return list(dict.fromkeys(told))


def settings_that_differ(stage: Stage, old_settings: dict) -> list[str]:
    old_values = {**old_settings, **old_settings.get("contrastive", {})}
    differences = []
    for full_name, value in stage.knobs.items():
        old_value = old_values.get(full_name.partition(".")[2], value)
        if old_value != value:
            differences.append(f"{full_name} was {old_value}, is {value}".removeprefix("run."))
    old_files = old_settings.get("files", [])
    for file in stage.settings.get("files", []):
        if old_files and file not in old_files:
            differences.append(f"{file[0]} has changed")
    return differences


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
