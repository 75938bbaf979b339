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
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from crlhf.engine.files import read_json, read_jsonl, write_json, write_jsonl
from crlhf.evaluate import column
from crlhf.pipeline.plan import make_plan
from crlhf.pipeline.plots import save_figure
from crlhf.pipeline.run import run_to
from crlhf.pipeline.tables import write_csv
from crlhf.reviews import EXPLOIT

from .bases import NOISE, Seeds, base_name, prepare_bases, take_over
from .runs import changed, configured, held_out_rows, run_jobs, silent_pipeline
from .tables import Rows

Label = tuple[str, str]  # (setting, method), as tables and figures show them
Folders = dict[tuple[Label, int], Path]  # (label, seed) -> folder of a run, or of a base


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


@dataclass(frozen=True)
class Study:
    """A question at work: its seeds, where its runs lie, and where its CSVs, figure and table go."""

    name: str
    seeds: Seeds
    root: Path
    figures: Path

    def run(self, variants: dict[Label, Variant]) -> Folders:
        """Train every variant with every seed, and return all run folders."""
        prepare_bases(self.root, self.seeds, [each.upstream() for each in variants.values() if not each.base])
        folders = {}
        jobs = {}  # by folder: two labels may stand for one run
        for seed in self.seeds:
            for label, variant in variants.items():
                folder = self.root / f"seed{seed}"
                out = folder / variant.name()
                folders[label, seed] = out
                if not is_done(out, seed, variant):
                    base = folder / (variant.base or base_name(variant.upstream()))
                    jobs[out] = (run_one, out, base, seed, variant.method, variant.settings)
        run_jobs(list(jobs.values()), self.name)
        return folders

    def measure(self, measure: Callable, folders: Folders, name: str) -> Rows:
        """Rows that measure(seed, {label: folder}) finds on finished runs or bases: one process and one JSON a seed.

        A seed that was measured before on the same runs isn't measured again.
        """
        files = {seed: self.root / f"seed{seed}" / f"{name}.json" for seed in self.seeds}
        jobs = []
        for seed, file in files.items():
            own = {label: out for (label, other), out in folders.items() if other == seed}
            stamps = [[*label, fingerprint_of(out)] for label, out in own.items()]
            if not was_measured(file, stamps):
                jobs.append((measure_to, file, stamps, measure, seed, own))
        run_jobs(jobs, name)
        return [row for file in files.values() for row in read_json(file)["rows"]]

    def write(self, rows: Rows, part: str = "") -> None:
        """NAME.csv, or NAME_PART.csv."""
        write_csv(self.figures / f"{self.name}{part}.csv", rows)

    def answer(self, report: Callable[[Path], str], plot: Callable[[Path], Figure]) -> str:
        """Draw NAME.png and return the text of NAME.md, both from the CSVs."""
        save_figure(plot(self.figures), self.figures / f"{self.name}.png")
        return report(self.figures)


# ------------------------------------------------------------------------------------------- running runs


def is_done(out: Path, seed: int, variant: Variant) -> bool:
    """Was this run measured with these settings? An experiment that is repeated asks only this."""
    try:
        measured = read_json(out / "result.json")["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    plan = make_plan(configured(out, seed, variant.method, variant.settings))
    return measured == plan[variant.method].fingerprint


def run_one(out: Path, base: Path, seed: int, method: str, settings: dict) -> None:
    """In a process of its own: train one variant on its base, then measure it."""
    take_over(base, out)
    pipeline = silent_pipeline(configured(out, seed, method, settings))
    run_to(pipeline, method, redo=True)
    rows = held_out_rows(pipeline, method)
    write_jsonl(out / "held_out.jsonl", rows)
    result = {"fingerprint": make_plan(pipeline.config)[method].fingerprint}
    result |= summary(rows)
    result |= course(out / method, pipeline.config.ppo.critic_warmup)
    write_json(out / "result.json", result)


def summary(rows: Rows) -> dict[str, float]:
    """Means of a run over the held-out prompts."""
    result = {name: column(rows, name).mean().item() for name in ("gold", "reward", "kl")}
    return result | {"exploit": sum(EXPLOIT in row["response"] for row in rows) / len(rows)}


def course(stage: Path, skip: int = 0) -> dict[str, float]:
    """What a PPO run was like on its way: true reward over all iterations but the first `skip`, in which the policy
    stood still; how much the critic foresaw; the share of the baseline that was subtracted."""
    steps = [row for row in read_jsonl(stage / "metrics.jsonl") if "explained_variance" in row][skip:]
    return {
        "mean_gold": mean_of(steps, "gold"),
        "explained": mean_of(steps[20:], "explained_variance"),
        "coefficient": mean_of(steps, "coefficient"),
    }


def mean_of(steps: Rows, key: str) -> float:
    values = [row[key] for row in steps if key in row]
    return statistics.fmean(values) if values else math.nan


# ------------------------------------------------------------------------------------------------ results


def results(folders: Folders) -> Rows:
    """One row per run: {setting, method, seed, gold, reward, ...}.

    rho and its standard error, from the baselines, stand in rows of adaptive runs only: a run of another method may
    stand for several constants, since it cancels them, or have no baselines.
    """
    rows = []
    for ((setting, method), seed), out in folders.items():
        result = read_json(out / "result.json")
        del result["fingerprint"]
        law = read_json(out / "baselines" / "variance.json") if method == "adaptive" else {}
        for key in ("rho", "rho_se"):
            result[key] = law.get(key, math.nan)
        rows.append({"setting": setting, "method": method, "seed": seed, **result})
    return rows


def curves(folders: Folders, keys: Sequence[str]) -> Rows:
    """One row per run and iteration with some columns of metrics.jsonl."""
    rows = []
    for ((setting, method), seed), out in folders.items():
        trained = out.name.split(",")[0]  # ppo, contrastive, adaptive
        for step in read_jsonl(out / trained / "metrics.jsonl"):
            row = {"setting": setting, "method": method, "seed": seed, "iteration": step["iteration"]}
            rows.append(row | {key: step.get(key, "") for key in keys})
    return rows


def fingerprint_of(folder: Path) -> str:
    """Of what a run trained; of the baselines of a base."""
    result = folder / "result.json"
    return read_json(result if result.exists() else folder / "baselines" / "stage.json")["fingerprint"]


def was_measured(file: Path, stamps: list) -> bool:
    try:
        return read_json(file)["runs"] == stamps
    except (OSError, ValueError, KeyError, TypeError):
        return False


def measure_to(file: Path, stamps: list, measure: Callable, seed: int, runs: dict[Label, Path]) -> None:
    write_json(file, {"runs": stamps, "rows": measure(seed, runs)})
