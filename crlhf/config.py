"""Every default of every stage, on one page.

Each stage has one dataclass. The command line, the tutorials and the tests read names, defaults, help
texts and allowed ranges from here, so this is the only place where a default is written. The module
imports nothing heavy, which keeps `python -m crlhf --help` quick.
"""

import dataclasses
import math
from dataclasses import dataclass, field

METHODS = ("ppo", "contrastive", "adaptive", "dpo")


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong, where, and the mend."""


def knob(default, text, low=None, high=None, choices=None):
    """A dataclass field with its help text and its allowed values, both ends of a range included."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass
class RunConfig:
    out: str = knob("runs/reviews", "folder that receives every artefact of the run")
    seed: int = knob(0, "one seed fixes everything", low=0)
    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    methods: str = knob("ppo,contrastive,adaptive", "what to train, comma separated, from " + ", ".join(METHODS))
    checkpoint_seconds: float = knob(20.0, "least time between two checkpoints of a stage (0: every step)", low=0)
    cuda_graphs: bool = knob(False, "sample from GPT-2 style models on a GPU in recorded steps; not yet tried on one")
    threads: int = knob(0, "CPU threads (0: as many as torch chooses)", low=0)


@dataclass
class WorldConfig:
    """The embedded world of film reviews, and every way in which its raters are imperfect."""

    train_prompts: int = knob(512, "openings PPO trains on", low=1)
    eval_prompts: int = knob(256, "held-out openings for evaluation", low=2)
    demonstrations: int = knob(6000, "reviews written by the imperfect writers, for SFT", low=1)
    pairs: int = knob(4000, "preference pairs for the reward model", low=10)
    label_flips: float = knob(0.2, "share of preference labels that are wrong", low=0, high=0.5)
    flips: str = knob("uniform", "spread wrong labels evenly, or put more on difficult prompts",
                      choices=("uniform", "difficulty"))
    fooled: float = knob(0.0, "share of raters that prefer a response with 'i hated the' in it, whatever else it says",
                         low=0, high=1)
    prompt_bias: float = knob(1.0, "standard deviation of a constant the rater adds to every reward of a prompt", low=0)
    score_noise: float = knob(0.0, "standard deviation of an error on each single response's reward", low=0)


@dataclass
class DataConfig:
    dataset: str = knob("reviews", "'reviews' (embedded), a Hugging Face dataset NAME or NAME:SUBSET, or a local "
                                   "folder or JSON/JSONL(.gz)/CSV/Parquet file")
    split: str = knob("train", "split of a Hugging Face dataset")
    preferred: str = knob("", "column that holds the index of the better response, where a dataset has several "
                              "(PKU-SafeRLHF: better_response_id or safer_response_id)")
    max_rows: int = knob(0, "read at most this many rows (0: all)", low=0)
    eval_fraction: float = knob(0.1, "share of a dataset's prompts that is held out", low=0.001, high=0.9)
    prompt_words: int = knob(8, "plain text: this many first words become the prompt", low=1)
    max_prompt_tokens: int = knob(64, "rows with a longer prompt are dropped, and counted", low=1)
    max_response_tokens: int = knob(24, "longest response, its EOS included", low=1)


@dataclass
class ModelConfig:
    name: str = knob("tiny", "'tiny' (built from scratch with its own tokenizer), a Hugging Face name, or a local folder")
    layers: int = knob(2, "tiny: transformer blocks", low=1)
    width: int = knob(64, "tiny: hidden size", low=8)
    heads: int = knob(4, "tiny: attention heads", low=1)
    vocab_size: int = knob(2000, "tiny: size of the byte-level BPE vocabulary learned from your dataset", low=300)


@dataclass
class SFTConfig:
    epochs: float = knob(5.0, "passes over the demonstrations", low=0)
    batch_size: int = knob(64, "demonstrations a step", low=1)
    lr: float = knob(4e-3, "peak learning rate (a pretrained model wants about 1e-5)", low=0)
    warmup: float = knob(0.05, "share of the steps over which the learning rate rises", low=0, high=1)
    max_grad_norm: float = knob(1.0, "gradients longer than this are shortened to it", low=1e-9)


@dataclass
class RewardConfig:
    source: str = knob("train", "'train' a reward model on the preferences, 'gold' (embedded world), a classifier's "
                                "Hugging Face name or folder, or FILE.py:FUNCTION")
    label: str = knob("", "classifier with several classes: the class whose log-odds are the reward")
    epochs: float = knob(3.0, "passes over the preference pairs", low=0)
    batch_size: int = knob(32, "pairs a step", low=1)
    lr: float = knob(2e-3, "peak learning rate (a pretrained model wants about 1e-5)", low=0)
    warmup: float = knob(0.1, "share of the steps over which the learning rate rises", low=0, high=1)
    center_coef: float = knob(0.01, "weight of (r_chosen + r_rejected)^2, which keeps rewards near zero", low=0)
    max_grad_norm: float = knob(1.0, "gradients longer than this are shortened to it", low=1e-9)


@dataclass
class BaselineConfig:
    """Step 1 of contrastive rewards: offline responses of the SFT policy."""

    k: int = knob(4, "offline responses per prompt", low=1)
    temperature: float = knob(1.0, "sampling temperature", low=1e-3)
    top_p: float = knob(1.0, "nucleus sampling: keep the likeliest tokens of this total probability", low=1e-3, high=1)
    batch_size: int = knob(256, "responses sampled at once", low=1)


@dataclass
class ContrastiveConfig:
    """Step 2 of contrastive rewards: what is subtracted from the reward, and how the rest is scaled."""

    source: str = knob("offline", "baselines are offline responses of the SFT policy, or the other responses to the prompt "
                                  "in the rollout batch (RLOO; wants --ppo-group-size above 1)",
                       choices=("offline", "group"))
    refresh: int = knob(0, "draw the offline responses again, from the current policy, every so many iterations (0: never)",
                        low=0)
    aggregate: str = knob("mean", "how k baseline rewards become one number", choices=("mean", "median", "max", "min"))
    coefficient: float = knob(1.0, "share of the baseline that is subtracted (method 'adaptive' estimates it instead)",
                              low=0)
    scale: str = knob("none", "dynamic scaling: to the raw reward's running magnitude, or by the running standard "
                              "deviation", choices=("none", "magnitude", "std"))
    decay: float = knob(0.9, "decay per iteration of the running moments", low=0, high=0.9999)


@dataclass
class PPOConfig:
    iterations: int = knob(60, "rollout batches", low=1)
    batch_size: int = knob(64, "responses in a rollout batch", low=2)
    group_size: int = knob(1, "responses per prompt in a rollout batch; must divide the batch size", low=1)
    epochs: int = knob(2, "passes over each rollout batch", low=1)
    minibatches: int = knob(4, "gradient steps a pass; must divide the batch size", low=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to save memory (0: the whole minibatch)", low=0)
    recompute_activations: bool = knob(False, "keep only what enters each block for the backward pass and compute the "
                                              "rest again: less memory, about a third more time")
    lr: float = knob(1e-3, "learning rate of the policy, decays linearly to 0 (GPT-2 sized models want about 1e-5)",
                     low=0)
    critic_lr: float = knob(1e-3, "learning rate of a separate critic", low=0)
    kl_coef: float = knob(0.05, "price of one nat of divergence from the SFT policy, per token", low=0)
    kl_estimator: str = knob("k1", "estimate of the KL in the per-token reward", choices=("k1", "k2", "k3"))
    gamma: float = knob(1.0, "discount", low=0, high=1)
    lam: float = knob(0.95, "lambda of generalised advantage estimation", low=0, high=1)
    clip_range: float = knob(0.2, "how far the probability ratio may move before its gradient stops", low=1e-6)
    value_clip_range: float = knob(0.2, "how far a value may move from its old value before its gradient stops", low=1e-6)
    value_coef: float = knob(0.5, "weight of the value loss", low=0)
    entropy_coef: float = knob(0.0, "weight of an entropy bonus", low=0)
    whiten_advantages: bool = knob(True, "give advantages mean 0 and standard deviation 1 over the batch's tokens")
    critic: str = knob("reward_model", "critic starts as a copy of the reward model, as the SFT model with a zero head, "
                                       "as a zero head on the policy's own trunk, or there is none",
                       choices=("reward_model", "zero_head", "shared", "none"))
    temperature: float = knob(1.0, "sampling temperature of rollouts; log-probabilities are of the same distribution",
                              low=1e-3)
    missing_eos_penalty: float = knob(0.0, "subtracted from the reward of a response that never ended", low=0)
    reward_clip: float = knob(0.0, "rewards are clipped to +- this before they are contrasted (0: not)", low=0)
    target_kl: float = knob(0.0, "stop an iteration's passes once approx_kl exceeds this (0: never)", low=0)
    max_grad_norm: float = knob(1.0, "gradients longer than this are shortened to it", low=1e-9)


@dataclass
class DPOConfig:
    epochs: float = knob(2.0, "passes over the preference pairs", low=0)
    batch_size: int = knob(64, "pairs a step", low=1)
    lr: float = knob(3e-3, "peak learning rate (a pretrained model wants about 1e-6)", low=0)
    warmup: float = knob(0.1, "share of the steps over which the learning rate rises", low=0, high=1)
    beta: float = knob(0.03, "price of one nat of divergence from the SFT policy", low=1e-9)
    max_grad_norm: float = knob(1.0, "gradients longer than this are shortened to it", low=1e-9)


@dataclass
class EvalConfig:
    judge: str = knob("auto", "who decides: 'auto' (gold where it is known, else the reward), 'gold', 'reward', a "
                              "classifier's Hugging Face name or folder, or FILE.py:FUNCTION")
    batch_size: int = knob(256, "responses sampled at once", low=1)
    samples: int = knob(3, "prompts whose responses are printed", low=0)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def method_list(self):
        return [name.strip() for name in self.run.methods.split(",") if name.strip()]


# Options of these groups carry no prefix on the command line: --dataset, --seed, --label-flips.
UNPREFIXED = ("run", "data", "world")
# One option where the plain word says more than group-name.
SHORT_NAMES = {("model", "name"): "model", ("reward", "source"): "reward", ("eval", "judge"): "judge",
               ("baselines", "k"): "k"}


def options(config):
    """Yield (option name, group name, dataclass field) for every knob, in the order of the file."""
    for group in dataclasses.fields(config):
        for knob_field in dataclasses.fields(getattr(config, group.name)):
            key = (group.name, knob_field.name)
            prefix = "" if group.name in UNPREFIXED else group.name + "-"
            yield SHORT_NAMES.get(key, prefix + knob_field.name.replace("_", "-")), group.name, knob_field


def validate(config):
    """Raise UserError for a value outside its range, or for values that contradict each other."""
    for name, group, knob_field in options(config):
        value, meta = getattr(getattr(config, group), knob_field.name), knob_field.metadata
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} is {value}: give a finite number")
        if meta["choices"] and value not in meta["choices"]:
            raise UserError(f"--{name} is '{value}': choose one of {', '.join(meta['choices'])}")
        low, high = meta["low"], meta["high"]
        if (low is not None and value < low) or (high is not None and value > high):
            allowed = f"from {low} to {high}" if low is not None and high is not None else f"of at least {low}"
            raise UserError(f"--{name} is {value}: use a value {allowed}")
    ppo = config.ppo
    if ppo.batch_size % ppo.minibatches:
        raise UserError(f"--ppo-batch-size {ppo.batch_size} is not divisible by --ppo-minibatches {ppo.minibatches}: "
                        f"use a multiple, such as {max(1, ppo.batch_size // ppo.minibatches) * ppo.minibatches}")
    if ppo.batch_size % ppo.group_size:
        raise UserError(f"--ppo-group-size {ppo.group_size} doesn't divide --ppo-batch-size {ppo.batch_size}: use a divisor "
                        "of it")
    if config.contrastive.source == "group" and ppo.group_size == 1:
        raise UserError("--contrastive-source group compares responses to one prompt with each other: add --ppo-group-size 4")
    if config.contrastive.source == "group" and config.contrastive.refresh:
        raise UserError("--contrastive-refresh draws offline baselines again, and --contrastive-source group has none: leave "
                        "one of them out")
    if config.data.dataset == "reviews" and config.world.train_prompts < ppo.batch_size // ppo.group_size:
        raise UserError(f"--train-prompts {config.world.train_prompts} is less than --ppo-batch-size {ppo.batch_size}: "
                        "lower the batch size or raise the number of prompts")
    if config.model.width % config.model.heads:
        raise UserError(f"--model-width {config.model.width} is not divisible by --model-heads {config.model.heads}: "
                        "change one of them")
    unknown = [name for name in config.method_list() if name not in METHODS]
    if unknown or not config.method_list():
        raise UserError(f"--methods '{config.run.methods}' names no known method: choose from {', '.join(METHODS)}")
    if config.data.dataset != "reviews":
        for option, value in (("--reward", config.reward.source), ("--judge", config.eval.judge)):
            if value == "gold":
                raise UserError(f"{option} gold needs the embedded world: --dataset reviews has a known gold score, "
                                f"{config.data.dataset} has none")
    if ppo.critic == "reward_model" and config.reward.source != "train":
        raise UserError(f"--ppo-critic reward_model needs a trained reward model, but --reward is "
                        f"{config.reward.source}: add --ppo-critic zero_head")


def from_dict(values):
    """Rebuild a Config from `dataclasses.asdict`, as read from a config.json."""
    groups = {group.name: type(getattr(Config(), group.name)) for group in dataclasses.fields(Config)}
    return Config(**{name: groups[name](**values.get(name, {})) for name in groups})
