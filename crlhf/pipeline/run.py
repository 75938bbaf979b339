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
from .checks import check_answers, check_batch, naming_the_knob
from .memory import check_size
from .pipeline import Pipeline
from .plan import Stage, make_plan, requirements
from .report import write_report


def run_to(pipe: Pipeline, last: str = "all", redo: bool = False) -> None:
    """Run every stage that `last` builds on, then `last` itself; 'all' runs everything."""
    check_size(pipe.config)
    check_answers(pipe, functions=True)
    plan = make_plan(pipe.config)
    if last != "all" and last not in plan:
        raise UserError(f"stage '{last}' is not part of this run", f"its stages are {', '.join(plan)}")
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
    checkpoint = part / "checkpoint.pt"
    if checkpoint.exists():
        pipe.log(f"{name}: going on from a checkpoint")
    started = time.monotonic()
    start_peak(pipe.device)
    with naming_the_knob(name):
        summary = stage.build(pipe, part)
    seconds, peak = time.monotonic() - started, peak_bytes(pipe.device)
    write_json(part / "cost.json", {"seconds": seconds, "peak_bytes": peak})
    checkpoint.unlink(missing_ok=True)  # not before: what comes after training may fail
    folder.finish(part, final)
    memory = "" if pipe.tiny else f", {peak / 1e9:.1f} GB"
    pipe.log(f"{name}: {summary} ({seconds:.0f} s{memory})")


# ----------------------------------------------------------------------------------- what has to be redone


def check_stale(pipe: Pipeline, plan: dict[str, Stage], redo: bool) -> None:
    """Refuse to redo finished stages that were made with other settings, unless that is wanted."""
    if pipe.config.baselines.prompts == "met" and folder.is_finished(pipe.path("data"), plan["data"].fingerprint):
        check_batch(pipe.config, pipe.prompts("train"))
    stale = {}  # stages that are there, but not by this plan: what their stage.json holds
    for name, stage in plan.items():
        built = folder.built_with(pipe.path(name))
        if built and built["fingerprint"] != stage.fingerprint:
            folder.refuse_foreign(pipe.path(name))
            stale[name] = built.get("settings", {})
    stale.pop("evaluation", None)  # redone without asking
    if not stale:
        return
    names = ", ".join(stale)
    changed = "; ".join(reasons(plan, stale)[:4]) or "the project itself has changed"
    if not redo:
        problem = f"--out {pipe.folder} holds another config ({changed})"
        raise UserError(problem, f"add --redo to redo {names}, or choose another --out")
    pipe.log(f"changed: {changed}; will redo {names}")


def reasons(plan: dict[str, Stage], stale: dict[str, dict]) -> list[str]:
    """Why stages have to be made again: ['ppo.lr was 0.001, is 0.002', 'judge.py has changed'].

    stale: the settings that they were made with. config.json doesn't say: it holds those of the last command.
    """
    told = []
    for name, old_settings in stale.items():
        stage = plan[name]
        told += differences(stage, old_settings)
        if old_settings == stage.settings and not stale.keys() & stage.needs:
            told.append(f"{name} was made from an earlier {' or '.join(stage.needs)}")
    return list(dict.fromkeys(told))


def differences(stage: Stage, old_settings: dict) -> list[str]:
    """Settings and files of a stage that aren't what they were."""
    told = []
    for name, value in stage.settings.items():
        old_value = old_settings.get(name, value)
        if name == "files":
            told += [f"{file[0]} has changed" for file in value if old_value and file not in old_value]
        elif old_value != value:
            told.append(f"{name.removeprefix('run.')} was {old_value}, is {value}")
    return told


# ----------------------------------------------------------------------------------------------- the report


def show_results(pipe: Pipeline) -> None:
    """The report, the table and the samples; written and shown also when the evaluation was done before."""
    methods = pipe.config.method_list()
    summary = read_json(pipe.path("evaluation") / "summary.json")
    results = {method: pipe.rows("evaluation", method) for method in ("sft", *methods)}
    metrics = {method: pipe.rows(method, "metrics") for method in methods if method != "dpo"}
    law = pipe.injected()
    variance = pipe.path("baselines") / "variance.json"
    if variance.exists():
        law += read_json(variance).get("in_words", [])
    samples = write_report(pipe.folder, pipe.config.run.seed, summary, results, metrics, law)
    pipe.log(f"\n{summary['table']}\n\n{samples}\n")
    pipe.log(f"see {pipe.folder / 'report.md'} and the figures beside it")
