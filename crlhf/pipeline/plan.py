"""The plan of a run: which stages there are, what each of them reads, and what redoes it.

    data -> sft -> preferences -> reward -> baselines -> ppo, contrastive, adaptive, dpo -> evaluation

TABLE has a row for every stage. A finished stage is reused as long as its fingerprint is the same: the hash of its
settings, of the files that they name, and of the fingerprints of the stages that it reads.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config import Config
from . import stages


@dataclass(frozen=True)
class Row:
    """A stage in the table. Lists of names are texts, with a space between two names."""

    build: Callable  # (pipeline, folder) -> summary in one line
    needs: str  # the stages that it reads, as far as they are part of the run
    settings: str  # those that redo it, besides seed and precision: groups of the config, sets (below), single knobs
    files: str = ""  # settings that may name a file or a folder, whose changes redo the stage, too


plain = partial(stages.build_ppo, name="ppo")
fixed = partial(stages.build_ppo, name="contrastive")
adaptive = partial(stages.build_ppo, name="adaptive")

# fmt: off
TABLE = {
    #                  builder                   reads                   is redone by              and by the files of
    "data":        Row(stages.build_data,        "",                     "openings data model",
                                                                   "data.dataset data.eval_dataset model.name"),
    "sft":         Row(stages.build_sft,         "data",                 "sft"),
    "preferences": Row(stages.build_preferences, "sft",                  "raters sampling"),
    "reward":      Row(stages.build_reward,      "sft preferences",      "sampling reward",        "reward.source"),
    "baselines":   Row(stages.build_baselines,   "sft reward",           "noise sampling baselines"),
    "ppo":         Row(plain,                    "sft reward",           "noise sampling ppo"),
    "contrastive": Row(fixed,                    "sft reward baselines", "noise sampling ppo contrastive"),
    "adaptive":    Row(adaptive,                 "sft reward baselines", "noise sampling ppo contrastive"),
    "dpo":         Row(stages.build_dpo,         "sft preferences",      "dpo"),
    "evaluation":  Row(stages.build_evaluation,  "sft reward",           "sampling eval ppo.temperature", "eval.judge"),
}  # the evaluation also reads all methods of the run, and a reward that isn't trained reads the data alone
SETS = {
    "sampling": "run.sampling_batch_size",
    "openings": "world.train_prompts world.eval_prompts world.demonstrations",
    "raters":   "world.pairs world.label_flips world.flips world.fooled",
    "noise":    "world.prompt_bias world.bias_from world.score_noise",
}
# fmt: on


@dataclass
class Stage:
    """A stage of one run."""

    build: Callable
    needs: tuple[str, ...]
    settings: dict[str, Any]  # 'ppo.lr' -> 0.001: what redoes it, and stage.json keeps; stamps of files as 'files'
    fingerprint: str


def make_plan(config: Config) -> dict[str, Stage]:
    """All stages of a run in order, by name."""
    plan = {}
    for name in stage_names(config):
        row = TABLE[name]
        needs = tuple(need for need in needs_of(name, config) if need in plan)
        settings = knob_values(config, f"run.seed run.precision {row.settings}")
        if name == "baselines":
            settings |= prompts_served(config)
        if row.files:
            named = knob_values(config, row.files).values()
            settings["files"] = [stamp for value in named for stamp in file_stamps(value)]
        stamp = fingerprint([name, settings, [plan[need].fingerprint for need in needs]])
        plan[name] = Stage(row.build, needs, settings, stamp)
    return plan


def stage_names(config: Config) -> list[str]:
    """The stages that are part of a run."""
    names = ["data", "sft"]
    if config.needs_preferences():
        names.append("preferences")
    names.append("reward")
    if config.contrastive.source != "group":
        names.append("baselines")
    return [*names, *config.method_list(), "evaluation"]


def needs_of(name: str, config: Config) -> list[str]:
    """The stages that a stage reads, as far as they are part of the run."""
    if name == "reward" and config.reward.source != "train":
        return ["data"]
    needs = TABLE[name].needs.split()
    return [*needs, *config.method_list()] if name == "evaluation" else needs


def requirements(plan: dict[str, Stage], name: str) -> set[str]:
    """The stage and everything it builds on, directly or not."""
    return {name}.union(*(requirements(plan, need) for need in plan[name].needs))


# -------------------------------------------------------------------------------------- settings and files


def knob_values(config: Config, names: str) -> dict[str, Any]:
    """'ppo.lr' -> 0.001, for groups, sets and single knobs. The world's count in the embedded world alone."""
    values = {}
    for name in " ".join(SETS.get(name, name) for name in names.split()).split():
        group, _, single = name.partition(".")
        if group == "world" and config.data.dataset != "reviews":
            continue
        for knob, value in asdict(getattr(config, group)).items():
            if single in ("", knob):
                values[f"{group}.{knob}"] = value
    return values


def prompts_served(config: Config) -> dict[str, int]:
    """Prompts that PPO never meets need no baselines, and which it meets follows from these two numbers."""
    if config.baselines.prompts == "all":
        return {}
    prompts = config.ppo.batch_size // config.ppo.group_size
    return {"baselines.prompts": prompts, "ppo.iterations": stages.offline_iterations(config)}


def file_stamps(name: str) -> list[list]:
    """Name, size and time of change of what a knob names on this disk: FILE, FILE.py:FUNCTION, or all of a folder."""
    if name in ("", "reviews", "tiny", "train", "gold", "reward", "auto"):
        return []
    path = Path(name.rpartition(":")[0] if ".py:" in name else name)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
