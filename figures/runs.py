"""One run, and many jobs at once: settings by name, a run's pipeline, its held-out responses, processes.

Runs lie in `runs/experiments/seedSEED/NAME`. Every run is an ordinary run folder, on one thread of a CPU.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from crlhf.config import Config
from crlhf.engine.files import Progress, read_json
from crlhf.engine.forward import Model
from crlhf.engine.text import Batch
from crlhf.evaluate import evaluate_policy
from crlhf.pipeline.options import from_dict, validate
from crlhf.pipeline.pipeline import Pipeline
from crlhf.policy import generate
from crlhf.reviews import gold_reward

START = {"world.prompt_bias": 0.0}  # where experiments differ from the defaults: nothing is added to rewards unasked
RESPONSES = 4  # per held-out prompt

# ---------------------------------------------------------------------------------------------- settings


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
    config.run.out = str(folder)
    config.run.seed = seed
    config.run.methods = method
    config.run.threads = 1
    config.run.device = "cpu"
    validate(config)
    return config


# --------------------------------------------------------------------------------------------- pipelines


def silent_pipeline(config: Config) -> Pipeline:
    return Pipeline(config, log=lambda text: None)


def open_run(folder: Path) -> Pipeline:
    """The pipeline of a finished run."""
    config = from_dict(read_json(folder / "config.json"))
    config.run.out = str(folder)
    return silent_pipeline(config)


def sample_texts(
    pipeline: Pipeline, policy: Model, prompts: list[str], generator: torch.Generator, k: int = 1
) -> tuple[list[str], list[str], Batch]:
    """k responses to each prompt. -> (the prompts, each k times in a row; the responses; both as a Batch)"""
    length = pipeline.config.data.max_response_tokens
    responses, _, batch = generate(policy, pipeline.tokenizer(), prompts, length, generator=generator, k=k)
    repeated = [prompt for prompt in prompts for _ in range(k)]
    return repeated, responses, batch


def held_out_rows(pipeline: Pipeline, stage: str) -> list[dict]:
    """A policy's responses to the held-out prompts, with gold score, reward and log-ratio to the SFT policy."""
    judges = {"reward": pipeline.reward_callable("train"), "gold": gold_reward}
    prompts = pipeline.prompts("eval") * RESPONSES
    policy = pipeline.model(stage)
    return evaluate_policy(
        policy, pipeline.model("sft"), pipeline.tokenizer(), prompts, judges, pipeline.job("evaluation")
    )


# --------------------------------------------------------------------------------------------- processes


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
