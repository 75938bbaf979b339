"""What a run holds in memory: which rows go through each stage at once, and what they take in the tiny model.

For L layers, width D, V words, and a text of C columns of which T are the response, in fp32 (4 bytes a number):

    parameters           P = 12 L D^2 + (V + C) D
    a network            4 P bytes to keep; 12 P to train (weights, AdamW's two moments), and 4 P for gradients
    a text, trained on   4 (16 (L - 1) C D + 10 C D + C^2 + 3 T V)
    a text, sampled      4 (2 L C D + max(14 C D + C^2, 4 V))

16 C D is what one block keeps for the backward pass: its input, two norms, query, key and value, what was attended, the
residual, and twice 4 C D inside the MLP. 10 C D stands for the last block, which is computed only where it is read, and
for the gradients inside one block; with recomputed activations (L - 1) C D + 20 C D: a block keeps its input alone,
until its turn. C^2 is the mask, 3 T V are logits, log-probs and their gradients, 2 L C D the cache, 14 C D one block
over a prompt, 4 V the draw of a token. A model of a single layer needs less, up to a half.

Every row is taken to have full length. `python -m crlhf memory` counts the same for any model, by running the code that
trains; `tests/test_memory.py` holds these formulas to it.
"""

import bisect
import copy
import os
from dataclasses import dataclass

from ..config import Config, UserError
from .options import options

GB = 1e9
# What to lower besides the rows of a pass, in this order.
OTHER_OPTIONS = ("--sampling-batch-size", "--max-response-tokens", "--max-prompt-tokens", "--model-width")


@dataclass(frozen=True)
class Pass:
    """What goes through a stage's networks at once."""

    rows: int  # responses, demonstrations or pairs
    passes: int  # in one step
    option: str  # that sets the rows


def passes_of(config: Config) -> dict[str, Pass]:
    """The stages of a run that need memory. What is sampled for the baselines stands for all sampling."""
    passes = {"sft": training_pass(config, config.sft.batch_size, "--sft-batch-size")}
    if config.reward.source == "train":
        passes["reward"] = training_pass(config, config.reward.batch_size, "--reward-batch-size")
    passes["baselines"] = Pass(config.run.sampling_batch_size, 1, "--sampling-batch-size")
    if config.baselines.k > config.run.sampling_batch_size:  # the responses of a prompt stay together
        passes["baselines"] = Pass(config.baselines.k, 1, "--k")
    minibatch = config.ppo.batch_size // config.ppo.minibatches
    passes["ppo"] = training_pass(config, minibatch, "--micro-batch-size")
    if "dpo" in config.method_list():
        passes["dpo"] = training_pass(config, config.dpo.batch_size, "--dpo-batch-size")
    return passes


def training_pass(config: Config, step: int, option: str) -> Pass:
    """The pass of a step of so many rows, which --micro-batch-size may cut."""
    micro = config.run.micro_batch_size
    if 0 < micro < step:
        return Pass(micro, -(-step // micro), "--micro-batch-size")
    return Pass(step, 1, option)


# ------------------------------------------------------------------------------------------ bytes of the tiny model


def tiny_vocabulary(config: Config) -> int:
    """Words that the tiny model knows: those of the film reviews, or what its tokenizer may learn."""
    return 50 if config.data.dataset == "reviews" else config.model.vocab_size


def tiny_bytes(config: Config, stage: str) -> int:
    """The most bytes that a stage of the tiny model holds at once."""
    L = config.model.layers
    D = config.model.width
    V = tiny_vocabulary(config)
    T = config.data.max_response_tokens
    C = config.data.max_prompt_tokens + T
    P = 12 * L * D**2 + (V + C) * D
    kept = 16 * (L - 1) + 10
    if stage == "ppo" and config.ppo.recompute_activations:
        kept = (L - 1) + 20
    scored = 4 * (kept * C * D + C**2)  # a text that gives numbers, as to a reward model
    written = scored + 4 * 3 * T * V  # one that gives log-probs
    sampled = 4 * (2 * L * C * D + max(14 * C * D + C**2, 4 * V))

    one_pass = passes_of(config)[stage]
    critics = 0 if config.ppo.critic in ("shared", "none") else 1
    trained, frozen, row = {  # networks, and what a row of the pass takes
        "sft": (1, 0, written),
        "reward": (1, 0, 2 * scored),
        "baselines": (0, 2, sampled),
        "ppo": (1 + critics, 2, written + critics * scored),
        "dpo": (1, 1, 2 * written),
    }[stage]
    gradients = 4 * trained * P
    activations = one_pass.rows * row
    if one_pass.passes > 1:
        step = gradients + activations  # the gradients of other passes are there before
    else:
        step = max(gradients, activations)  # these go while those come
    if stage == "ppo":
        rollout = min(config.ppo.batch_size, config.run.sampling_batch_size) * sampled
        step = max(step, rollout)
    return 4 * frozen * P + 12 * trained * P + step


# ------------------------------------------------------------------------------------------------ does it fit?


def check_size(config: Config) -> None:
    """Refuse a tiny model that can't fit into this machine's memory, with a number that would.

    The stage that needs most says so. The option is the first that makes it fit by itself.
    """
    if config.model.name != "tiny":
        return
    needs = {stage: tiny_bytes(config, stage) for stage in passes_of(config)}
    stage = max(needs, key=needs.get)
    available = total_memory()
    if needs[stage] <= available:
        return
    memory = f"needs at least {needs[stage] / GB:.0f} GB, and this machine has {available / GB:.0f} GB"
    one_pass = passes_of(config)[stage]
    knobs = {f"--{name}": (group, knob.name) for name, group, knob in options(config)}
    for option in (one_pass.option, *OTHER_OPTIONS):
        group, name = knobs[option]
        value = one_pass.rows if option == one_pass.option else getattr(getattr(config, group), name)
        fits = largest_that_fits(config, stage, knobs[option], value, available)
        if fits > 0:
            raise UserError(f"{option} {value} {memory}", f"use {fits} or less")
    raise UserError(f"{stage} {memory}", "lower --micro-batch-size, the lengths and --model-width together")


def largest_that_fits(config: Config, stage: str, knob: tuple[str, str], too_large: int, available: float) -> int:
    """The largest value of a knob (group, name) with which the stage fits, by bisection; 0 if none does."""
    group, name = knob
    trial = copy.deepcopy(config)

    def needed(value: int) -> int:
        setattr(getattr(trial, group), name, value)
        return tiny_bytes(trial, stage)

    return bisect.bisect_right(range(1, too_large), available, key=needed)


def total_memory() -> float:
    """Bytes of this machine's memory; infinite where the system doesn't say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
