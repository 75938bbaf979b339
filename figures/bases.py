"""Bases: what the runs of one seed share, made once. Data, SFT policy, preferences, reward model, baselines.

Runs link the stages of their base, and redo those that their settings change. A question that needs something other
than settings can make, such as a reward model with a hole, says how to change a copy of a base (`Change`).
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crlhf.engine.files import write_jsonl
from crlhf.pipeline.folder import seal
from crlhf.pipeline.pipeline import Pipeline
from crlhf.pipeline.run import run_to

from .runs import changed, configured, held_out_rows, run_jobs, silent_pipeline

Seeds = Sequence[int]
UPSTREAM = ("data", "sft", "preferences", "reward", "baselines")  # what a run takes over from its base
NOISE = ("world.prompt_bias", "world.score_noise")  # faults of the reward that come after the reward model
RATERS = ("world.label_flips", "world.flips", "world.fooled", "world.pairs")  # faults that it learns


@dataclass(frozen=True)
class Change:
    """A base that is a changed copy of another."""

    name: str  # of its folder
    change: Callable[[Pipeline], None]  # writes into the folders of copied stages
    settings: dict = field(default_factory=dict)  # of the base that is copied
    stages: tuple[str, ...] = UPSTREAM  # that are copied; those after them are made anew


def base_name(settings: dict) -> str:
    return ",".join(["base", *changed(settings)])


def base_folder(root: Path, seed: int, settings: dict) -> Path:
    return root / f"seed{seed}" / base_name(settings)


def is_finished(base: Path) -> bool:
    """What the SFT policy says is written last."""
    return (base / "held_out.jsonl").exists()


def finish_base(pipeline: Pipeline) -> None:
    """Make what is missing up to the baselines, and what the SFT policy says on held-out prompts."""
    run_to(pipeline, "baselines", redo=True)
    if not is_finished(pipeline.folder):
        write_jsonl(pipeline.folder / "held_out.jsonl", held_out_rows(pipeline, "sft"))


def prepare_bases(root: Path, seeds: Seeds, upstreams: list[dict]) -> None:
    """The bases of some upstream settings. Those that differ in their raters only start from one SFT policy."""
    first = {}
    second = {}
    for seed in seeds:
        for settings in upstreams:
            shared = {key: value for key, value in settings.items() if key not in (*RATERS, *NOISE)}
            base = base_folder(root, seed, settings)
            above = base_folder(root, seed, shared)
            first[above] = (make_base, above, seed, shared)
            if base != above:
                second[base] = (make_base, base, seed, settings, above)
    run_jobs([job for base, job in first.items() if not is_finished(base)], "SFT and reward models")
    run_jobs([job for base, job in second.items() if not is_finished(base)], "reward models of other raters")


def make_base(base: Path, seed: int, settings: dict, above: Path | None = None) -> None:
    """In a process of its own: a base, from nothing or from one that shares its SFT policy."""
    if above is not None:
        take_over(above, base)
    finish_base(silent_pipeline(configured(base, seed, "contrastive", settings)))


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


def link(source: str, target: str) -> None:
    """A hard link where the disk has them: files of finished stages are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


# ------------------------------------------------------------------------------------------ changed bases


def change_bases(root: Path, seeds: Seeds, changes: Sequence[Change]) -> None:
    """Prepare changed bases, and those that they are copies of."""
    prepare_bases(root, seeds, [each.settings for each in changes])
    jobs = []
    for seed in seeds:
        folder = root / f"seed{seed}"
        jobs += [(change_base, folder, seed, each) for each in changes if not is_finished(folder / each.name)]
    run_jobs(jobs, "changed bases")


def change_base(folder: Path, seed: int, change: Change) -> None:
    """In a process of its own: copy stages of a base (no links: they are to be changed), change them, make the rest."""
    source = folder / base_name(change.settings)
    target = folder / change.name
    for stage in change.stages:
        shutil.copytree(source / stage, target / stage, dirs_exist_ok=True)
    shutil.copy(source / "config.json", target / "config.json")
    pipeline = silent_pipeline(configured(target, seed, "contrastive", change.settings))
    change.change(pipeline)
    for stage in change.stages:
        seal(target / stage)
    finish_base(pipeline)
