"""What the stages of one run share: its config, folder and device, and what earlier stages left."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

from .. import reviews
from ..config import Config
from ..engine.checkpoint import Job
from ..engine.files import read_jsonl
from ..engine.forward import Model, compute_in
from ..engine.models import load_model, load_tokenizer, pick_device, pick_precision
from ..engine.recorded import record_sampling
from ..engine.text import Reward, Tokenizer
from .output import show
from .rewards import ModelReward, load_function_reward


class Pipeline:
    """One run: `run.py` turns its config into its folder, stage by stage; `log` receives a line for each."""

    def __init__(self, config: Config, log: Callable[[str], None] = show) -> None:
        self.config = config
        self.log = log
        self.folder = Path(config.run.out)
        self.tiny = config.model.name == "tiny"
        self.world = config.data.dataset == "reviews"
        self.device = pick_device(config.run.device, self.tiny)
        self.precision = pick_precision(config.run.precision, self.device)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)

    # What earlier stages left.

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def rows(self, stage: str, file: str) -> list[dict]:
        return read_jsonl(self.path(stage) / f"{file}.jsonl")

    def prompts(self, which: str) -> list[str]:
        return [row["prompt"] for row in self.rows("data", f"{which}_prompts")]

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.path("data") / "tokenizer"))

    def model(self, stage: str) -> Model:
        return self.place(load_model(str(self.path(stage))))

    def place(self, model: Model) -> Model:
        """The model on this run's device, computing in its precision."""
        model = compute_in(model.to(self.device), self.precision)
        if self.config.run.recorded == "auto" and self.device.type == "cuda":
            record_sampling(model, self.log)
        return model

    # What a stage is given.

    def job(self, name: str, folder: Path | None = None) -> Job:
        """What every training or sampling function is told."""
        run = self.config.run
        return Job(
            name,
            folder,
            run.seed,
            self.config.data.max_response_tokens,
            run.checkpoint_seconds,
            run.sampling_batch_size,
            run.micro_batch_size,
        )

    def reward_callable(self, spec: str) -> Reward:
        """'train', 'gold', FILE.py:FUNCTION or a classifier, as a reward callable."""
        if spec == "gold":
            return partial(reviews.gold_reward, max_response_tokens=self.config.data.max_response_tokens)
        if ".py:" in spec:
            return load_function_reward(spec)
        name = str(self.path("reward")) if spec == "train" else spec
        model = self.place(load_model(name, AutoModelForSequenceClassification))
        return self.model_reward(model, load_tokenizer(name), self.config.reward.label)

    def model_reward(self, model: Model, tokenizer: Tokenizer, label: str = "") -> ModelReward:
        data, run = self.config.data, self.config.run
        return ModelReward(model, tokenizer, data.max_response_tokens, label, run.sampling_batch_size)

    def noisy_reward(self) -> Reward:
        """The reward PPO and the baselines see: with the rater's faults in the embedded world."""
        reward = self.reward_callable(self.config.reward.source)
        if not self.world:
            return reward
        world = self.config.world
        return reviews.NoisyReward(reward, world.prompt_bias, world.score_noise, self.config.run.seed, world.bias_from)

    def injected(self) -> list[str]:
        """A line for the log and the report if a constant is added to the rewards that PPO sees."""
        if not self.world or set(self.config.method_list()) == {"dpo"}:
            return []
        return reviews.injected_in_words(self.config.world.prompt_bias)
