"""Models: load them from a folder or the hub, build tiny ones, save them.

What is written are ordinary Hugging Face folders. What is read are safetensors weights only; code from a hub
is never run. Dropout is off from the start and stays off: with it the probability ratio of PPO would not be 1
on the first pass.
"""

import copy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from ..config import UserError
from .files import first_line, read_json
from .forward import Model
from .hub import HUB_MEND, hub_answers
from .text import Tokenizer

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def pick_device(name: str, is_tiny: bool) -> torch.device:
    """'auto' takes CUDA, then Apple's MPS, then the CPU; for tiny models the CPU, which is quicker for them.
    A device that isn't there is the user's mistake."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = "cpu" if is_tiny else next(device for device in there if there[device])
    if not there[name]:
        raise UserError(f"--device {name}: this machine (or this build of torch) has no {name}; use --device cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bf16 on GPUs that have it in hardware (older ones emulate it, slowly), else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and has_bf16) else torch.float32


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a folder or the hub, ready for our batches: it has an EOS and a pad token."""
    folder = local_folder(name, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if len(tokenizer) == 0 or not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError("it has no vocabulary, or a model_max_length that is no number")
        tokenizer("a b")  # some fail only when they are used
    except Exception as error:  # the libraries raise many kinds, down to a bare Exception for a bad tokenizer.json
        mend = "check its tokenizer.json, tokenizer_config.json and config.json"
        raise UserError(f"no tokenizer can be loaded from '{name}': {first_line(error)}; {mend}") from None
    if tokenizer.eos_token_id is None:
        mend = "set eos_token in its tokenizer_config.json"
        raise UserError(f"the tokenizer of '{name}' has no EOS token, so no response could ever end: {mend}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe, because masks come from positions
    return tokenizer


def load_model(name: str, auto_class: type = AutoModelForCausalLM, new_head: bool = False, **kwargs: object) -> Model:
    """A model from a folder or the hub. Only safetensors weights, no remote code, dropout off, fp32.

    Weights that the folder lacks would be random. That is an error, unless a `new_head` is wanted.
    """
    folder = local_folder(name)
    kwargs |= {"use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        check_weight_files(Path(folder))
        model, report = auto_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError for shapes that differ, ...
        what = first_line(error)
        if "ignore_mismatched_sizes" in str(error):
            what = "the shapes of its weights are not those of its config.json"
        mend = "it needs config.json and safetensors weights"
        raise UserError(f"no model can be loaded from '{name}': {what}; {mend}") from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"the weights of '{name}' are not all finite numbers: choose or train another model")
    if report["missing_keys"] and not new_head:
        lacks = f"it holds no weights '{min(report['missing_keys'])}'"
        raise UserError(f"'{name}' is no {type(model).__name__}: {lacks}; choose a model of the right kind")
    model.config.name_or_path = model.name_or_path = name
    return model.eval()


def check_weight_files(folder: Path) -> None:
    """An index of weights may name plain *.safetensors files inside the folder, and nothing else."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.exists():
        return
    for file in sorted(set(read_json(index)["weight_map"].values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"its {index.name} names '{file}', which is no safetensors file of this folder")


def local_folder(name: str, required: str = "config.json") -> str:
    """The folder of a model on this disk. A name that looks like a path must be one; others come from the hub."""
    path = Path(name)
    if path.is_file():
        mend = "give a model folder or a Hugging Face name, or FILE.py:FUNCTION for a reward"
        raise UserError(f"'{name}' is a file: {mend}")
    if path.is_dir() and not (path / required).is_file():
        raise UserError(f"'{name}' is no model folder: it has no {required}; choose one that `save_pretrained` wrote")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not path.is_dir() and looks_local:
        raise UserError(f"model folder '{name}' does not exist: check the path, or give a Hugging Face name")
    return name if path.is_dir() else fetched(name)


def fetched(name: str) -> str:
    """The folder into which the hub's files of a model were fetched: settings and safetensors weights, no code."""
    asked = hub_answers("models", name)
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return snapshot_download(name, allow_patterns=patterns, local_files_only=not asked)
    except Exception as error:  # the hub library's many kinds, and the system's
        what = first_line(error) if asked else "it was not fetched before, and HF_HUB_OFFLINE is set"
        raise UserError(f"model '{name}' can't be loaded from the hub: {what}; {HUB_MEND}") from None


def tiny_model(
    vocab_size: int, eos_id: int, pad_id: int, context: int, layers: int, width: int, heads: int, seed: int
) -> Model:
    """A GPT-2-style model from random weights. `gelu_pytorch_tanh` is GPT-2's own activation, fused."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=context, n_embd=width, n_layer=layers, n_head=heads)
    config.update(
        {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    )
    config.update({"bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": pad_id})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def save(folder: str | Path, model: Model, tokenizer: Tokenizer) -> None:
    """Write an ordinary Hugging Face folder that `from_pretrained` loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def scalar_model(folder: str, pad_id: int, zero_head: bool = True) -> Model:
    """The trunk of the model in `folder` under a scalar head `score` on every token, (B, L) -> (B, L, 1).

    With `zero_head` the head starts at zero, so every first prediction is 0 and nothing random enters. Reward
    model and critic are both such a model: one is read at the last token, the other at every token.
    """
    model = load_model(folder, AutoModelForSequenceClassification, new_head=zero_head, num_labels=1)
    if not hasattr(model, "score"):
        what = f"'{folder}' is a {type(model).__name__}, which has no scalar head on its tokens"
        raise UserError(f"{what}: use a causal language model such as GPT-2, SmolLM2 or Qwen2.5")
    if zero_head:
        nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = pad_id
    return model


def random_scalar_model(config: PretrainedConfig) -> Model:
    """A model of this shape from random weights, under a scalar head."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def read_model_config(name: str) -> PretrainedConfig:
    folder = local_folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and the hub library's own kind for a value of a wrong type
        raise UserError(f"no model can be loaded from '{name}': {first_line(error)}; check its config.json") from None
