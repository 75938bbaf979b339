"""One way through any model: its hidden states, its logits, and a cache of keys and values for sampling.

This module alone knows which models there are and in which precision they compute. A GPT-2 takes the lean path of
gpt2.py; every other model goes through the library.

Weights are kept in fp32. In bf16 only the matrix products of the blocks are computed: what they add up to, and all
heads (logits, values, rewards), stay in fp32, for a bf16 logit of 64 can be off by a quarter.

Columns that are padding have mask False. A token's position is its place among the real ones of its row.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig
from transformers import PreTrainedModel as Model
from transformers.modeling_layers import GradientCheckpointingLayer

from .gpt2 import is_lean, lean_states, product_dtype, seen_mask
from .text import pad, positions


def context_length(model_config: PretrainedConfig) -> float:
    """Positions the model can address; infinite if its config sets no limit."""
    for name in ("max_position_embeddings", "n_positions"):
        if getattr(model_config, name, None):
            return getattr(model_config, name)
    return math.inf


def compute_in(model: Model, dtype: torch.dtype) -> Model:
    """From now on the matrix products of this model, and of copies of it, come out in `dtype`: fp32 or bf16."""
    model.compute_dtype = dtype
    return model


def autocast(model: Model) -> AbstractContextManager:
    """Matrix products in the model's own precision. Without `compute_in` that is fp32."""
    dtype = getattr(model, "compute_dtype", torch.float32)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(model.device.type, dtype)


@contextmanager
def sampling(model: Model) -> Iterator[None]:
    """No gradients, and every weight is cast once for all tokens: autocast remembers its casts until its outermost
    context ends. It doesn't in inference mode, which is otherwise the quicker way to do without gradients."""
    precision = autocast(model)
    no_gradients = torch.inference_mode() if isinstance(precision, nullcontext) else torch.no_grad()
    with precision, no_gradients:
        yield


def in_fp32(head: nn.Module, states: Tensor) -> Tensor:
    """A linear head on hidden states, in fp32 whatever is around it."""
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.float(), head.weight, head.bias)


@contextmanager
def library_head(model: Model) -> Iterator[list[Tensor]]:
    """The library's LM head, in fp32; yields a list that receives the hidden states it is given. Asking the library
    for hidden states would keep those of every layer."""
    head = model.get_output_embeddings()
    seen = []

    def forward(states: Tensor) -> Tensor:
        seen.append(states)
        return in_fp32(head, states)

    head.forward = forward
    try:
        yield seen
    finally:
        del head.forward


def library_inputs(model: Model, ids: Tensor, mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """What the library wants to be told: (B, n) ids that are the last of the (B, L) columns so far.

    From a mask of (B, L) it would make one of (B, 1, n, L) at every call, and ask a GPU whether it needs one. GPT-2
    and models of Llama's kind take ours. Others may read more from the mask (BLOOM its positions), or hide more (a
    window).
    """
    n = ids.shape[1]
    L = mask.shape[1]
    if takes_our_mask(model, L):
        mask = seen_mask(mask, n, L)
    else:
        mask = mask.long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}


def takes_our_mask(model: Model, L: int) -> bool:
    """Does this model read nothing but what is seen from the mask, and hide none of L columns by itself?"""
    config = model.config
    rotates = hasattr(model.base_model, "rotary_emb") and not getattr(config, "alibi", False)
    window = getattr(config, "sliding_window", None) or L
    is_known = rotates or config.model_type == "gpt2"
    return is_known and config._attn_implementation == "sdpa" and L <= window


def hidden_states(model: Model, ids: Tensor, mask: Tensor, last: int) -> Tensor:
    """Final hidden states of the `last` columns: (B, L) ids and mask -> (B, last, D)."""
    with autocast(model):
        if is_lean(model):
            return lean_states(model.transformer, ids, mask, positions(mask), last)
        inputs = library_inputs(model, ids, mask, positions(mask))
        return model.base_model(**inputs, use_cache=False).last_hidden_state[:, -last:]


def logits_and_states(model: Model, ids: Tensor, mask: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Next-token logits after the `last` columns, and the hidden states they come from: (B, last, V), (B, last, D)."""
    if is_lean(model):
        states = hidden_states(model, ids, mask, last)
        return in_fp32(model.lm_head, states), states
    with autocast(model), library_head(model) as seen:
        inputs = library_inputs(model, ids, mask, positions(mask))
        return model(**inputs, use_cache=False, logits_to_keep=last).logits, seen[0]


def sequence_logits(model: Model, sequences: list[list[int]], pad_id: int) -> Tensor:
    """What a sequence classifier says about each of B sequences of ids, read at its last token: (B, labels)."""
    is_causal = hasattr(model, "score")
    # A causal model is padded on the left: the last tokens of all rows then stand in one column.
    ids, mask = pad(sequences, pad_id, "left" if is_causal else "right")
    ids = ids.to(model.device)
    mask = mask.to(model.device)
    if is_causal:
        states = hidden_states(model, ids, mask, 1)
        return in_fp32(model.score, states[:, -1])
    return model(input_ids=ids, attention_mask=mask.long()).logits.float()


class OneTypeCache(DynamicCache):
    """The library's cache. Under autocast its keys, fresh from fp32 rotations, would be kept in fp32."""

    def update(self, keys: Tensor, values: Tensor, *arguments: object, **others: object) -> tuple[Tensor, Tensor]:
        return super().update(keys.to(values.dtype), values, *arguments, **others)


class Cache:
    """Keys and values of all columns so far of a batch that is being sampled, with its mask and positions.

    On the lean path they are allocated once, (layers, 2, B, heads, L, head size). What is not written yet is zero,
    so that it can be multiplied by a weight of zero.
    """

    def __init__(self, model: Model, prompt_mask: Tensor, n_new: int) -> None:
        B, P = prompt_mask.shape
        config = model.config
        self.model = model
        self.length = P + n_new
        self.n_columns = 0  # read so far
        self.mask = F.pad(prompt_mask, (0, n_new), value=True)  # (B, L)
        self.position = positions(prompt_mask)  # (B, n) of the tokens that come next
        if is_lean(model):
            head_size = config.n_embd // config.n_head
            size = (config.n_layer, 2, B, config.n_head, self.length, head_size)
            with autocast(model):
                dtype = product_dtype(model.transformer.wte.weight)
            self.store = torch.zeros(size, device=prompt_mask.device, dtype=dtype)
        else:
            self.library = OneTypeCache(config=config)
            takes = inspect.signature(model.forward).parameters
            self.argument = "cache_params" if "cache_params" in takes else "past_key_values"  # Mamba ignores the latter

    def next_logits(self, ids: Tensor) -> Tensor:
        """Read (B, n) new ids and return the logits of the token after them: (B, V)."""
        n = ids.shape[1]
        mask = self.mask[:, : self.n_columns + n]
        with autocast(self.model):
            if is_lean(self.model):
                states = lean_states(self.model.transformer, ids, mask, self.position, 1, self.store)
                logits = in_fp32(self.model.lm_head, states[:, -1])
            else:
                inputs = library_inputs(self.model, ids, mask, self.position)
                inputs[self.argument] = self.library
                with library_head(self.model):
                    output = self.model(**inputs, use_cache=True, logits_to_keep=1)
                logits = output.logits[:, -1]
        self.n_columns += n
        self.position = self.position[:, -1:] + 1
        return logits

    def repeat(self, k: int) -> None:
        """Every row k times, one after another."""
        rows = torch.arange(len(self.mask), device=self.mask.device)
        self.keep(rows.repeat_interleave(k))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may be named more than once."""
        self.mask = self.mask[rows]
        self.position = self.position[rows]
        if is_lean(self.model):
            self.store = self.store[:, :, rows]
        else:
            self.library.reorder_cache(rows)  # the only way that layers of linear attention have, too


def recompute_activations(model: nn.Module) -> None:
    """From now on the backward pass keeps what enters each block, and computes what happens inside it again.

    The library can do this too, but in train() mode only, which switches dropout on. Where no gradients are wanted,
    as in sampling, nothing changes. A linear head has no blocks and stays as it is.
    """
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
