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
from ..engine.text import Reward, Tokenizer
from .output import show
from .rewards import ModelReward, load_function_reward


class Pipeline:
    """One run: `run.py` turns its config into its folder, stage by stage; `log` receives a line for each."""

    def __init__(self, config: Config, log: Callable[[str], None] = show) -> None:
        self.config, self.log, self.folder, self.tiny = config, log, Path(config.run.out), config.model.name == "tiny"
        self.device, self.world = pick_device(config.run.device, self.tiny), config.data.dataset == "reviews"
        self.precision = pick_precision(config.run.precision, self.device)
        if config.run.threads:
            torch.set_num_threads(config.run.threads)

    def path(self, stage: str) -> Path:
        return self.folder / stage

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(str(self.path("data") / "tokenizer"))

    def rows(self, stage: str, file: str) -> list[dict]:
        return read_jsonl(self.path(stage) / f"{file}.jsonl")

    def prompts(self, which: str) -> list[str]:
        return [row["prompt"] for row in self.rows("data", f"{which}_prompts")]

    def model(self, stage: str) -> Model:
        return self.place(load_model(str(self.path(stage))))

    def place(self, model: Model) -> Model:
        """The model on this run's device, computing in its precision."""
        return compute_in(model.to(self.device), self.precision)

    def job(self, name: str, folder: Path | None = None) -> Job:
        """What every training or sampling function is told."""
        run, lengths = self.config.run, self.config.data.max_response_tokens
        sizes = run.sampling_batch_size, run.micro_batch_size
        return Job(name, folder, run.seed, lengths, run.checkpoint_seconds, *sizes)

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
        run, lengths = self.config.run, self.config.data.max_response_tokens
        return ModelReward(model, tokenizer, lengths, label, run.sampling_batch_size)

    def noisy_reward(self) -> Reward:
        """The reward PPO and the baselines see: with the rater's faults in the embedded world."""
        reward, world = self.reward_callable(self.config.reward.source), self.config.world
        if not self.world:
            return reward
        faults = world.prompt_bias, world.score_noise, self.config.run.seed, world.bias_from
        return reviews.NoisyReward(reward, *faults)

    def injected(self) -> list[str]:
        """A line for the log and the report if a constant is added to the rewards that PPO sees."""
        learns_from_rewards = self.world and set(self.config.method_list()) != {"dpo"}
        return reviews.injected_in_words(self.config.world.prompt_bias) if learns_from_rewards else []
