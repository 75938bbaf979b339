"""Models and tokenizers: load them from a folder or the hub, build tiny ones, save them.

What is written are ordinary Hugging Face folders. What is read are safetensors weights only; code from a hub
is never run. Dropout is off from the start and stays off: with it the probability ratio of PPO would not be 1
on the first pass.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GPT2Config)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from .config import UserError
from .distributed import is_writer

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load_tokenizer(name):
    """A tokenizer from a folder or the hub, ready for our batches: it has an EOS and a pad token."""
    check_folder(name, "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, down to a bare Exception for a bad tokenizer.json
        raise UserError(f"no tokenizer can be loaded from '{name}': {first_line(error)}; check its "
                        "tokenizer.json, tokenizer_config.json and config.json") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of '{name}' has no EOS token, so no response could ever end: set eos_token in "
                        "its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe, because masks come from positions
    return tokenizer


def load_model(name, auto_class=AutoModelForCausalLM, new_head=False, **kwargs):
    """A model from a folder or the hub. Only safetensors weights, no remote code, dropout off, fp32.

    Weights that the folder lacks would be random. That is an error, unless a `new_head` is wanted.
    """
    check_folder(name)
    try:
        model, report = auto_class.from_pretrained(name, use_safetensors=True, trust_remote_code=False,
                                                   dtype=torch.float32, output_loading_info=True, **kwargs)
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError for shapes that differ, ...
        raise UserError(f"no model can be loaded from '{name}': {first_line(error)}; it needs config.json and "
                        "safetensors weights") from None
    if report["missing_keys"] and not new_head:
        raise UserError(f"'{name}' is no {type(model).__name__}: it holds no weights '{min(report['missing_keys'])}'; "
                        "choose a model of the right kind")
    return model.eval()


def check_folder(name, required="config.json"):
    """A name that looks like a path must be a model folder; anything else is left to the hub."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"'{name}' is a file: give a model folder or a Hugging Face name, or FILE.py:FUNCTION for a "
                        "reward")
    if path.is_dir() and not (path / required).is_file():
        raise UserError(f"'{name}' is no model folder: it has no {required}; choose one that `save_pretrained` wrote")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not path.is_dir() and looks_local:
        raise UserError(f"model folder '{name}' does not exist: check the path, or give a Hugging Face name")


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def tiny_model(vocab_size, eos_id, pad_id, context, layers, width, heads, seed):
    """A GPT-2-style model from random weights. `gelu_pytorch_tanh` is GPT-2's own activation, fused."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
                        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=eos_id, eos_token_id=eos_id, pad_token_id=pad_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def save(folder, model, tokenizer):
    """Write an ordinary Hugging Face folder that `from_pretrained` loads."""
    if not is_writer():
        return
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def scalar_model(folder, pad_id, zero_head=True):
    """The trunk of the model in `folder` under a scalar head `score` on every token, (B, L) -> (B, L, 1).

    With `zero_head` the head starts at zero, so every first prediction is 0 and nothing random enters. Reward
    model and critic are both such a model: one is read at the last token, the other at every token.
    """
    model = load_model(folder, AutoModelForSequenceClassification, new_head=zero_head, num_labels=1)
    if not hasattr(model, "score"):
        raise UserError(f"'{folder}' is a {type(model).__name__}, which has no scalar head on its tokens: use a causal "
                        "language model such as GPT-2, SmolLM2 or Qwen2.5")
    if zero_head:
        torch.nn.init.zeros_(model.score.weight)
    model.config.pad_token_id = pad_id
    return model


def frozen_copy(model):
    return copy.deepcopy(model).eval().requires_grad_(False)


def recompute_activations(model):
    """From now on the backward pass keeps what enters each block, and computes what happens inside it again.

    The library can do this too, but in train() mode only, which switches dropout on. Where no gradients are wanted,
    as in sampling, nothing changes. A linear head has no blocks and stays as it is.
    """
    getattr(model, "base_model", model).recompute = True  # for `fast.py`, which goes around the blocks' own forward
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def context_length(model_config):
    """Positions the model can address, or None if its config sets no limit."""
    return getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None)


def read_model_config(name):
    check_folder(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and the hub library's own kind for a value of a wrong type
        raise UserError(f"no model can be loaded from '{name}': {first_line(error)}; check its config.json") from None
