"""Every default of every stage, and every method, on one page.

Each stage has one dataclass. The command line, the tutorials and the tests read names, defaults, help texts and
allowed ranges from here, so this is the only place where a default is written.
"""

from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what is wrong and where, a colon, and the mend."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(f"{what}: {mend}" if mend else what)


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
    seed: int = knob(0, "one seed fixes everything", 0, 2**63 - 1)
    device: str = knob("auto", "where to compute ('tiny' is quickest on a CPU)", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = knob(
        "auto", "of matrix products: bf16 where a GPU has it, else fp32", choices=("auto", "fp32", "bf16")
    )
    recorded: str = knob(
        "auto", "sampling replays CUDA graphs (auto: on a CUDA GPU, for models that allow it)", choices=("auto", "no")
    )
    methods: str = knob("ppo,contrastive,adaptive", f"what to train, comma separated, from {', '.join(METHODS)}")
    checkpoint_seconds: float = knob(20.0, "least time between two checkpoints of a stage (0: every step)", 0, 1e6)
    threads: int = knob(0, "CPU threads (0: as many as torch chooses)", 0, 256)
    sampling_batch_size: int = knob(256, "responses sampled, or scored, at once", 1, 100_000)
    micro_batch_size: int = knob(
        0, "rows of one forward and backward pass, to save memory (0: of a whole step)", 0, 100_000
    )


@dataclass
class WorldConfig:
    """The embedded world of film reviews, and every way in which its raters are imperfect."""

    train_prompts: int = knob(512, "openings PPO trains on", 2, 100_000)
    eval_prompts: int = knob(256, "held-out openings for evaluation", 2, 100_000)
    demonstrations: int = knob(6000, "reviews written by the imperfect writers, for SFT", 1, 1_000_000)
    pairs: int = knob(4000, "preference pairs for the reward model, sampled at temperature 1", 10, 100_000)
    label_flips: float = knob(0.2, "share of preference labels that are wrong", 0, 0.5)
    flips: str = knob("uniform", "wrong labels: evenly, more if difficult, or on openings about the plot alone",
                      choices=("uniform", "difficulty", "topic"))  # fmt: skip
    fooled: float = knob(0.0, "share of raters that prefer a response with 'i hated the' in it", 0, 1)
    prompt_bias: float = knob(1.0, "standard deviation of a constant added to all rewards of a prompt", 0, 1e3)
    bias_from: str = knob("nothing", "what that constant follows: nothing in the text, its length, or its words",
                          choices=("nothing", "sentences", "words"))  # fmt: skip
    score_noise: float = knob(0.0, "standard deviation of an error on each single response's reward", 0, 1e3)


@dataclass
class DataConfig:
    dataset: str = knob("reviews", "'reviews' (embedded), a Hugging Face NAME or NAME:SUBSET, a local folder or file")
    split: str = knob("train", "split of a Hugging Face dataset")
    preferred: str = knob("", "column with the index of the better response, where there are several (PKU-SafeRLHF)")
    max_rows: int = knob(0, "read at most this many rows (0: all)", 0, 10**9)
    eval_dataset: str = knob("", "held-out rows, as for --dataset, instead of a share of it")
    eval_fraction: float = knob(0.1, "share of a dataset's prompts that is held out", 0.001, 0.9)
    max_prompt_tokens: int = knob(64, "rows with a longer prompt are dropped, and counted", 1, 100_000)
    max_response_tokens: int = knob(24, "longest response, its EOS included", 1, 100_000)


@dataclass
class ModelConfig:
    name: str = knob("tiny", "'tiny' (built from scratch, with a tokenizer), a Hugging Face name, or a local folder")
    layers: int = knob(2, "tiny: transformer blocks", 1, 1_000)
    width: int = knob(64, "tiny: hidden size", 8, 100_000)
    heads: int = knob(4, "tiny: attention heads", 1, 10_000)
    vocab_size: int = knob(
        2000, "tiny: size of the byte-level BPE vocabulary learned from your dataset", 300, 1_000_000
    )


@dataclass
class SFTConfig:
    epochs: float = knob(5.0, "passes over the demonstrations", 0, 1_000)
    batch_size: int = knob(64, "demonstrations a step", 1, 100_000)
    lr: float = knob(4e-3, "peak learning rate", 0, 1)


@dataclass
class RewardConfig:
    source: str = knob("train", "'train' one, 'gold' (embedded world), a classifier, or FILE.py:FUNCTION")
    label: str = knob("", "classifier with several classes: the class whose log-odds are the reward")
    epochs: float = knob(3.0, "passes over the preference pairs", 0, 1_000)
    batch_size: int = knob(32, "pairs a step", 1, 100_000)
    lr: float = knob(2e-3, "peak learning rate", 0, 1)
    head_lr: float = knob(2e-3, "peak learning rate of the new head", 0, 1)
    normalize: str = knob("auto", "divide by the scores' standard deviation on SFT responses (auto: with a --dataset)",
                          choices=("auto", "yes", "no"))  # fmt: skip
    center_coef: float = knob(0.01, "weight of (r_chosen + r_rejected)^2, which keeps rewards near zero", 0, 100)


@dataclass
class BaselineConfig:
    """Step 1 of contrastive rewards: offline responses of the SFT policy."""

    k: int = knob(4, "offline responses per prompt", 1, 10_000)
    temperature: float = knob(1.0, "sampling temperature", 1e-3, 100)
    top_p: float = knob(1.0, "nucleus sampling: the likeliest tokens of this total probability", 1e-3, 1)
    prompts: str = knob("met", "those that PPO meets, or all, held-out ones too (with 'baselines': no SFT, no PPO)",
                        choices=("met", "all"))  # fmt: skip


@dataclass
class ContrastiveConfig:
    """Step 2 of contrastive rewards: what is subtracted from the reward, and how the rest is scaled."""

    source: str = knob("offline", "baselines: k offline rewards, the k latest of a prompt, or the others of a group",
                       choices=("offline", "running", "group"))  # fmt: skip
    refresh: int = knob(0, "sample the baselines again, from the policy, every so many iterations (0: never)", 0, 10**6)
    aggregate: str = knob("mean", "how k rewards become one number", choices=("mean", "median", "max", "min"))
    coefficient: float = knob(1.0, "share of the baseline that is subtracted ('adaptive' estimates it)", 0, 100)
    scale: str = knob("none", "dynamic scaling: to the raw magnitude, by the standard deviation, or into (0, 1)",
                      choices=("none", "magnitude", "std", "sigmoid"))  # fmt: skip


@dataclass
class PPOConfig:
    iterations: int = knob(60, "rollout batches", 1, 10**6)
    batch_size: int = knob(64, "responses in a rollout batch", 2, 100_000)
    group_size: int = knob(1, "responses per prompt in a rollout batch; must divide the batch size", 1, 10_000)
    epochs: int = knob(2, "passes over each rollout batch", 1, 1_000)
    minibatches: int = knob(4, "gradient steps a pass; must divide the batch size", 1, 10_000)
    recompute_activations: bool = knob(False, "keep only what enters each block for the backward pass: less memory")
    lr: float = knob(1e-3, "learning rate of the policy, falls linearly to 0", 0, 1)
    critic_lr: float = knob(1e-3, "learning rate of the critic", 0, 1)
    critic_warmup: int = knob(0, "first iterations in which the critic alone learns", 0, 10**6)
    kl_coef: float = knob(0.05, "price of one nat of divergence from the SFT policy, per token", 0, 1e3)
    lam: float = knob(0.95, "lambda of generalised advantage estimation", 0, 1)
    clip_range: float = knob(0.2, "how far ratios and values may move before their gradient stops", 1e-6, 100)
    value_coef: float = knob(0.5, "weight of the value loss", 0, 100)
    critic: str = knob("reward_model", "starts as the reward model, as SFT with a zero head, as a head on the policy",
                       choices=("reward_model", "zero_head", "shared", "none"))  # fmt: skip
    temperature: float = knob(1.0, "of the policy: in rollouts, log-probs, and evaluation of all methods", 1e-3, 100)
    missing_eos_penalty: float = knob(0.0, "subtracted from the reward of a response that never ended", 0, 1e3)


@dataclass
class DPOConfig:
    epochs: float = knob(2.0, "passes over the preference pairs", 0, 1_000)
    batch_size: int = knob(64, "pairs a step", 1, 100_000)
    lr: float = knob(3e-3, "peak learning rate", 0, 1)
    beta: float = knob(0.03, "price of one nat of divergence from the SFT policy", 1e-9, 1e3)


@dataclass
class EvalConfig:
    judge: str = knob("auto", "who decides: 'auto' (gold where known, else reward), or as for --reward")


@dataclass
class ExportConfig:
    """`python -m crlhf export RUN`: what it writes, and for which machine its command is."""

    to: str = knob("", "required: the engine to write for, openrlhf, verl or trl", choices=("openrlhf", "verl", "trl"))
    out: str = knob("", "required: the new folder that receives the export")
    gpus: int = knob(8, "GPUs of the machine that the launch command is for", 1, 10_000)


@dataclass
class BenchmarkConfig:
    """`python -m crlhf benchmark`: what is timed, and where."""

    size: str = knob("tiny", "of the models: tiny, small or gpt2", choices=("tiny", "small", "gpt2"))
    rounds: int = knob(5, "timed rounds", 1, 10_000)
    device: str = knob("auto", "where to compute: cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = knob("auto", "of matrix products: fp32 or bf16", choices=("auto", "fp32", "bf16"))
    recorded: str = knob("auto", "our sampling replays CUDA graphs (auto: on a CUDA GPU)", choices=("auto", "no"))
    threads: int = knob(0, "CPU threads (0: as many as torch chooses)", 0, 256)
    against: str = knob("none", "trl: only compare with TRL's PPOTrainer (needs TRL 1.12.0)", choices=("none", "trl"))


# What a pretrained --model gets where the command line says nothing: the defaults above are the tiny model's.
PRETRAINED = {
    "run": {"sampling_batch_size": 64, "micro_batch_size": 8},
    "data": {"max_prompt_tokens": 256, "max_response_tokens": 128},
    "sft": {"epochs": 1.0, "batch_size": 16, "lr": 2e-5},
    "reward": {"epochs": 1.0, "batch_size": 16, "lr": 2e-5},
    "ppo": {"iterations": 200, "lr": 3e-6, "critic_lr": 1e-5},
    "dpo": {"epochs": 1.0, "batch_size": 16, "lr": 1e-6, "beta": 0.1},
}


@dataclass
class JudgeConfig:
    """The command `judge`: which responses, and who says which of them are better."""

    of: str = knob("contrastive", "the policy that is judged: a method of the run, or a file of {prompt, response}")
    against: str = knob("ppo", "the one that it is compared with: a method of the run, 'sft', or a file")
    prompts: int = knob(100, "how many pairs, drawn from the held-out prompts", 2, 100_000)
    seed: int = knob(0, "of the draw of prompts", 0, 2**63 - 1)
    out: str = knob("", "folder for pairs, answers and report (default: RUN/judge/OF-against-AGAINST)")
    by: str = knob("model", "who judges: a language model, or people with a page of their own",
                   choices=("model", "people"))  # fmt: skip
    dry_run: bool = knob(False, "write the pairs and say how many calls there will be, but ask nobody")
    judge_url: str = knob("", "address of a chat-completions endpoint, like http://localhost:8000/v1 ('': pairs only)")
    judge_model: str = knob("", "name of the model to ask there")
    judge_key: str = knob("JUDGE_API_KEY", "environment variable that holds the key, if the endpoint wants one")
    judge_rubric: str = knob("", "text file that tells the judge what to look for ('': the built-in rubric)")
    judge_timeout: float = knob(60.0, "seconds to wait for an answer", 0.1, 3600)
    judge_retries: int = knob(5, "how often a call that may pass later is tried again", 0, 100)


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

    @classmethod
    def for_model(cls, name: str) -> "Config":
        """The defaults for a model: 'tiny', or a pretrained one."""
        config = cls(model=ModelConfig(name=name))
        for group, knobs in PRETRAINED.items() if name != "tiny" else ():
            for knob_name, value in knobs.items():
                setattr(getattr(config, group), knob_name, value)
        return config

    def method_list(self) -> list[str]:
        return [name.strip() for name in self.run.methods.split(",") if name.strip()]

    def needs_preferences(self) -> bool:
        return self.reward.source == "train" or "dpo" in self.method_list()
