"""Every default of every stage, and every method, on one page.

Each stage has one dataclass. The command line, the tutorials and the tests read names, defaults, help texts and
allowed ranges from here, so this is the only place where a default is written.
"""

from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong, where, and the mend."""


@dataclass(frozen=True)
class Method:
    """One way to train a policy, and how reports and figures show it. `contrast` is fixed, adaptive, or none."""

    title: str
    color: str
    line: str
    contrast: str = ""


METHODS = {
    "ppo": Method("plain PPO", "#D55E00", "-"),
    "contrastive": Method("contrastive PPO", "#0072B2", "--", "fixed"),
    "adaptive": Method("contrastive PPO, adaptive", "#009E73", "-.", "adaptive"),
    "dpo": Method("DPO", "#CC79A7", ":"),
}


def knob(default: Any, text: str, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its help text and its allowed values, both ends of a range included."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


@dataclass
class RunConfig:
    out: str = knob("runs/reviews", "folder that receives every artefact of the run")
    seed: int = knob(0, "one seed fixes everything", low=0)
    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    methods: str = knob("ppo,contrastive,adaptive", f"what to train, comma separated, from {', '.join(METHODS)}")
    checkpoint_seconds: float = knob(20.0, "least time between two checkpoints of a stage (0: every step)", low=0)
    threads: int = knob(0, "CPU threads (0: as many as torch chooses)", low=0)
    sampling_batch_size: int = knob(256, "responses sampled at once, outside of PPO", low=1)


@dataclass
class WorldConfig:
    """The embedded world of film reviews, and every way in which its raters are imperfect."""

    train_prompts: int = knob(512, "openings PPO trains on", low=1)
    eval_prompts: int = knob(256, "held-out openings for evaluation", low=2)
    demonstrations: int = knob(6000, "reviews written by the imperfect writers, for SFT", low=1)
    pairs: int = knob(4000, "preference pairs for the reward model, sampled at temperature 1", low=10)
    label_flips: float = knob(0.2, "share of preference labels that are wrong", low=0, high=0.5)
    flips: str = knob("uniform", "wrong labels: evenly, or more if difficult", choices=("uniform", "difficulty"))
    fooled: float = knob(0.0, "share of raters that prefer a response with 'i hated the' in it", low=0, high=1)
    prompt_bias: float = knob(1.0, "standard deviation of a constant added to all rewards of a prompt", low=0)
    score_noise: float = knob(0.0, "standard deviation of an error on each single response's reward", low=0)


@dataclass
class DataConfig:
    dataset: str = knob("reviews", "'reviews' (embedded), a Hugging Face NAME or NAME:SUBSET, a local folder or file")
    split: str = knob("train", "split of a Hugging Face dataset")
    preferred: str = knob("", "column with the index of the better response, where there are several (PKU-SafeRLHF)")
    max_rows: int = knob(0, "read at most this many rows (0: all)", low=0)
    eval_fraction: float = knob(0.1, "share of a dataset's prompts that is held out", low=0.001, high=0.9)
    prompt_words: int = knob(8, "plain text: this many first words become the prompt", low=1)
    max_prompt_tokens: int = knob(64, "rows with a longer prompt are dropped, and counted", low=1)
    max_response_tokens: int = knob(24, "longest response, its EOS included", low=1)


@dataclass
class ModelConfig:
    name: str = knob("tiny", "'tiny' (built from scratch, with a tokenizer), a Hugging Face name, or a local folder")
    layers: int = knob(2, "tiny: transformer blocks", low=1)
    width: int = knob(64, "tiny: hidden size", low=8)
    heads: int = knob(4, "tiny: attention heads", low=1)
    vocab_size: int = knob(2000, "tiny: size of the byte-level BPE vocabulary learned from your dataset", low=300)


@dataclass
class SFTConfig:
    epochs: float = knob(5.0, "passes over the demonstrations", low=0)
    batch_size: int = knob(64, "demonstrations a step", low=1)
    lr: float = knob(4e-3, "peak learning rate (a pretrained model wants about 1e-5)", low=0)


@dataclass
class RewardConfig:
    source: str = knob("train", "'train' one, 'gold' (embedded world), a classifier, or FILE.py:FUNCTION")
    label: str = knob("", "classifier with several classes: the class whose log-odds are the reward")
    epochs: float = knob(3.0, "passes over the preference pairs", low=0)
    batch_size: int = knob(32, "pairs a step", low=1)
    lr: float = knob(2e-3, "peak learning rate (a pretrained model wants about 1e-5)", low=0)
    center_coef: float = knob(0.01, "weight of (r_chosen + r_rejected)^2, which keeps rewards near zero", low=0)


@dataclass
class BaselineConfig:
    """Step 1 of contrastive rewards: offline responses of the SFT policy."""

    k: int = knob(4, "offline responses per prompt", low=1)
    temperature: float = knob(1.0, "sampling temperature", low=1e-3)
    top_p: float = knob(1.0, "nucleus sampling: the likeliest tokens of this total probability", low=1e-3, high=1)


@dataclass
class ContrastiveConfig:
    """Step 2 of contrastive rewards: what is subtracted from the reward, and how the rest is scaled."""

    source: str = knob("offline", "baselines: offline, or the other responses of a group", choices=("offline", "group"))
    refresh: int = knob(0, "sample the baselines again, from the policy, every so many iterations (0: never)", low=0)
    aggregate: str = knob("mean", "how k rewards become one number", choices=("mean", "median", "max", "min"))
    coefficient: float = knob(1.0, "share of the baseline that is subtracted ('adaptive' estimates it)", low=0)
    scale: str = knob("none", "dynamic scaling: to the raw reward's magnitude, or by the standard deviation",
                      choices=("none", "magnitude", "std"))  # fmt: skip


@dataclass
class PPOConfig:
    iterations: int = knob(60, "rollout batches", low=1)
    batch_size: int = knob(64, "responses in a rollout batch", low=2)
    group_size: int = knob(1, "responses per prompt in a rollout batch; must divide the batch size", low=1)
    epochs: int = knob(2, "passes over each rollout batch", low=1)
    minibatches: int = knob(4, "gradient steps a pass; must divide the batch size", low=1)
    micro_batch_size: int = knob(0, "rows per forward pass, to save memory (0: the whole minibatch)", low=0)
    recompute_activations: bool = knob(False, "keep only what enters each block for the backward pass: less memory")
    lr: float = knob(1e-3, "learning rate of the policy, falls linearly to 0 (GPT-2 wants about 1e-5)", low=0)
    critic_lr: float = knob(1e-3, "learning rate of the critic", low=0)
    kl_coef: float = knob(0.05, "price of one nat of divergence from the SFT policy, per token", low=0)
    lam: float = knob(0.95, "lambda of generalised advantage estimation", low=0, high=1)
    clip_range: float = knob(0.2, "how far ratios and values may move before their gradient stops", low=1e-6)
    value_coef: float = knob(0.5, "weight of the value loss", low=0)
    critic: str = knob("reward_model", "starts as the reward model, as SFT with a zero head, as a head on the policy",
                       choices=("reward_model", "zero_head", "shared", "none"))  # fmt: skip
    temperature: float = knob(1.0, "of the policy: in rollouts, log-probs, and evaluation of all methods", low=1e-3)
    missing_eos_penalty: float = knob(0.0, "subtracted from the reward of a response that never ended", low=0)
    target_kl: float = knob(0.0, "stop an iteration's passes once approx_kl exceeds this (0: never)", low=0)


@dataclass
class DPOConfig:
    epochs: float = knob(2.0, "passes over the preference pairs", low=0)
    batch_size: int = knob(64, "pairs a step", low=1)
    lr: float = knob(3e-3, "peak learning rate (a pretrained model wants about 1e-6)", low=0)
    beta: float = knob(0.03, "price of one nat of divergence from the SFT policy", low=1e-9)


@dataclass
class EvalConfig:
    judge: str = knob("auto", "who decides: 'auto' (gold where known, else reward), or as for --reward")


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

    def method_list(self) -> list[str]:
        return [name.strip() for name in self.run.methods.split(",") if name.strip()]
