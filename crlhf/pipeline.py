"""The stages, chained: which there are, what each depends on, what has to be done again.

    data -> sft -> preferences -> reward -> baselines -> ppo, contrastive, adaptive, dpo -> evaluation -> report

What a stage does stands in `stages.py`. `Run.stage` reuses a finished folder whose settings, and those of all it
builds on, are unchanged.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import distributed, fast, reviews, stages
from .config import UserError
from .models import load_model, load_tokenizer
from .report import samples_text
from .reward import checked, load_function_reward, load_model_reward
from .runs import Run, pick_device, read_jsonl, stage_print, write_json

DERIVED = ("evaluation",)  # redone without asking when something before them changed


@dataclass
class Stage:
    build: callable   # (pipeline, folder) -> summary
    settings: dict    # everything of the config that the result depends on
    needs: tuple      # stages it reads


class Pipeline:
    """One run: a config, a folder, a device, and the stages that turn the one into the other."""

    def __init__(self, config, say=print):
        self.device = distributed.start(pick_device(config.run.device))
        self.config, self.say = config, say if distributed.is_writer() else lambda text: None
        self.world = config.data.dataset == "reviews"
        self.run = Run(config.run.out, self.say)
        fast.use_graphs = config.run.cuda_graphs
        if config.run.threads:
            torch.set_num_threads(config.run.threads)

    # -------------------------------------------------------------------------------------- the plan

    def plan(self):
        """All stages in order, by name."""
        c, seed = self.config, {"seed": self.config.run.seed}
        world = asdict(c.world) if self.world else {}
        noise = {key: world[key] for key in ("prompt_bias", "score_noise") if world}
        early = {key: world[key] for key in ("train_prompts", "eval_prompts", "demonstrations") if world}
        rater = {key: world[key] for key in ("pairs", "label_flips", "flips", "fooled") if world}
        source = {"data": asdict(c.data), "model": asdict(c.model), "files": self.file_stamps()}
        trains_reward = c.reward.source == "train"
        reward_needs = ("sft", "preferences") if trains_reward else ("data",)
        plan = {"data": Stage(stages.build_data, {**seed, **early, **source}, ()),
                  "sft": Stage(stages.build_sft, {**seed, **asdict(c.sft)}, ("data",))}
        if trains_reward or "dpo" in c.method_list():
            plan["preferences"] = Stage(stages.build_preferences, {**seed, **rater}, ("sft",))
        plan["reward"] = Stage(stages.build_reward, {**seed, **asdict(c.reward)}, reward_needs)
        if c.contrastive.source == "offline":
            # prompts that PPO never meets need no baselines
            visits = stages.offline_iterations(c) * c.ppo.batch_size // c.ppo.group_size
            plan["baselines"] = Stage(stages.build_baselines, {**seed, **noise, **asdict(c.baselines), "visits": visits},
                                      ("sft", "reward"))
        for method in c.method_list():
            if method == "dpo":
                plan[method] = Stage(stages.build_dpo, {**seed, **asdict(c.dpo)}, ("sft", "preferences"))
            elif method == "ppo":
                plan[method] = Stage(stages.build_ppo, {**seed, **noise, **asdict(c.ppo)}, ("sft", "reward"))
            else:
                settings = {**seed, **noise, **asdict(c.ppo), "contrastive": asdict(c.contrastive)}
                needs = ("sft", "reward", "baselines") if "baselines" in plan else ("sft", "reward")
                plan[method] = Stage(stages.build_ppo, settings, needs)
        plan["evaluation"] = Stage(stages.build_evaluation, {**seed, **asdict(c.eval)},
                                     ("sft", "reward", *c.method_list()))
        return plan

    def file_stamps(self):
        """Size and time of change of the local files named in the config: a changed file is a changed config."""
        names = [self.config.data.dataset, self.config.model.name, self.config.reward.source.rpartition(":")[0]]
        stats = [(name, Path(name).stat()) for name in names if name and Path(name).exists()]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def check_folder(self, redo):
        """Refuse a folder that isn't ours, or whose finished stages were made with other settings."""
        out = self.run.folder
        for path in (out, *out.parents):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {out}: {path} is a file: choose a folder")
        if out.is_dir() and not is_run(out) and {path.name for path in out.iterdir()} - {"config.json.tmp"}:
            raise UserError(f"--out {out} holds other things than a crlhf run: choose an empty or new folder")
        wanted = self.fingerprints()
        if stage_print(self.run.path("data")) == wanted["data"]:
            stages.check_batch(self.config, self.prompts("train"))
        stale = [name for name, value in wanted.items() if name not in DERIVED
                 and stage_print(self.run.path(name)) not in (None, value)]
        if stale and not redo:
            raise UserError(f"--out {out} holds another config ({self.changes()}): add --redo to redo "
                            f"{', '.join(stale)}, or choose another --out")
        if stale:
            self.say(f"changed: {self.changes()}; will redo {', '.join(stale)}")

    def fingerprints(self):
        planned = Run(self.run.folder)
        return {name: planned.plan(name, stage.settings, stage.needs) for name, stage in self.plan().items()}

    def changes(self):
        """What differs from the config in the folder, for a message: 'ppo.lr was 0.001, is 0.002'."""
        try:
            old = json.loads((self.run.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            old = {}
        new, changes = asdict(self.config), []
        for group, knobs in new.items():
            if group != "run":
                changes += [f"{group}.{knob} was {old[group][knob]}, is {value}" for knob, value in knobs.items()
                            if old.get(group, {}).get(knob, value) != value]
        if old.get("run", {}).get("seed") != self.config.run.seed:
            changes.append(f"seed was {old.get('run', {}).get('seed')}, is {self.config.run.seed}")
        return "; ".join(changes[:4]) or "the data or model files have changed"

    # -------------------------------------------------------------------------------------- running

    def run_to(self, last="all", redo=False):
        """Run every stage that `last` builds on, then `last` itself; 'all' runs everything."""
        plan = self.plan()
        if last != "all" and last not in plan:
            raise UserError(f"stage '{last}' is not part of this run: its stages are {', '.join(plan)}")
        self.check_folder(redo)
        distributed.barrier()  # all have looked at the folder before one writes to it
        write_json(self.run.folder / "config.json", asdict(self.config))
        wanted = set(plan) if last == "all" else requirements(plan, last)
        for name, stage in plan.items():
            if name in wanted:
                self.run.stage(name, stage.settings, stage.needs, lambda folder: stage.build(self, folder))
        if "evaluation" in wanted:
            self.show_results()

    def show_results(self):
        """The table and the samples, also when the evaluation was done before."""
        summary = json.loads((self.run.path("evaluation") / "summary.json").read_text(encoding="utf-8"))
        results = {method: self.rows("evaluation", method) for method in summary["methods"]}
        self.say(f"\n{summary['table']}")
        self.say(samples_text(results, summary["judge"], self.config.eval.samples) + "\n")
        self.say(f"see {self.run.folder / 'report.md'} and the figures beside it")

    # -------------------------------------------------------------------------------------- what stages share

    def tokenizer(self):
        return load_tokenizer(str(self.run.path("data") / "tokenizer"))

    def rows(self, stage, file):
        return read_jsonl(self.run.path(stage) / f"{file}.jsonl")

    def prompts(self, which):
        return [row["prompt"] for row in self.rows("data", f"{which}_prompts")]

    def model(self, stage):
        return load_model(str(self.run.path(stage))).to(self.device)

    def settings(self):
        """Keyword arguments every training function takes."""
        run = self.config.run
        return {"max_response_tokens": self.config.data.max_response_tokens, "seed": run.seed,
                "checkpoint_seconds": run.checkpoint_seconds}

    def reward_callable(self, spec):
        """'train', 'gold', FILE.py:FUNCTION or a classifier, as a reward callable."""
        if spec == "gold":
            return reviews.gold_reward
        if ".py:" in spec:
            return load_function_reward(spec)
        name = str(self.run.path("reward")) if spec == "train" else spec
        return checked(load_model_reward(name, self.device, self.config.data.max_response_tokens,
                                         self.config.reward.label), spec)

    def noisy_reward(self):
        """The reward PPO and the baselines see: with the rater's faults in the embedded world."""
        reward = self.reward_callable(self.config.reward.source)
        if not self.world:
            return reward
        world = self.config.world
        return reviews.NoisyReward(reward, world.prompt_bias, world.score_noise, self.config.run.seed)


def is_run(folder):
    """Does the folder hold a run of ours? Model folders have a config.json too, and must not be overwritten."""
    try:
        return {"run", "data", "ppo"} <= set(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def requirements(plan, name):
    """The stage and everything it builds on, directly or not."""
    return {name}.union(*(requirements(plan, need) for need in plan[name].needs))
