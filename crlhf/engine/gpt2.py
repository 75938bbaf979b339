"""A GPT-2 in 60 lines: the library's weights on a lean path.

On small models most of a step's time goes into the library's generality (masks rebuilt, caches grown by copying,
wrappers called). This does the same arithmetic on the library's own weights, and gradients flow into the same
parameters. `tests/test_policy.py` holds the two to the same numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel as Model


def is_lean(model: Model) -> bool:
    """Is this a plain GPT-2 (language model, reward model or critic) without options that are left out below?"""
    config = model.config
    return (
        config.model_type == "gpt2"
        and config.activation_function in ("gelu_new", "gelu_pytorch_tanh")  # the same function
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.add_cross_attention
        and "forward" not in vars(model.transformer.h[0])  # recompute_activations replaces it
    )


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which precision matrix products with such a weight come out here."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def lean_states(
    trunk: nn.Module,
    ids: Tensor,
    mask: Tensor,
    position_ids: Tensor,
    last: int,
    store: Tensor | None = None,
    column: Tensor | None = None,
) -> Tensor:
    """Hidden states after the final norm of the `last` columns: (B, n) new ids -> (B, last, D).

    mask: (B, L) bool over all L columns so far, of which the ids are the last n.
    store: keys and values of a cache, (layers, 2, B, heads, length, size); without one n = L.
    column: (1,), where the keys and values of a single new id go in a recorded step. The mask then has all `length`
        columns, and says itself that this one is seen and later ones are not. Without it they go behind the others'.
    The final block computes keys and values of all columns, and the rest only of those that are asked for.
    """
    n = ids.shape[1]
    length = n if store is None else store.shape[4]
    x = F.embedding(ids, trunk.wte.weight) + F.embedding(position_ids, trunk.wpe.weight)
    if column is None:
        start = mask.shape[1] - n
        seen = seen_mask(mask, n, length)
    else:
        start = column
        seen = mask[:, None, None]
    hidden = hiding_mask(seen, product_dtype(trunk.wte.weight))
    for number, block in enumerate(trunk.h):
        is_final = number == len(trunk.h) - 1
        block_store = None if store is None else store[number]
        x = through_block(block, x, hidden, last if is_final else n, block_store, start)
    return norm(x, trunk.ln_f)


def hiding_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores: 0 where it is True, else -inf; made once for all layers."""
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, float("-inf"))


def seen_mask(mask: Tensor, n: int, length: int) -> Tensor:
    """Which columns the last n see: (B, columns so far) bool of real tokens -> (B, 1, n, length) bool.

    A new token sees itself and the real tokens before it. Padding sees itself, so that no row of the softmax
    is empty. Columns from there to `length` are yet to come, and hidden.
    """
    L = mask.shape[1]
    if n == 1:
        seen = F.pad(mask[:, :-1], (0, 1), value=True)
        return F.pad(seen, (0, length - L))[:, None, None]
    column = torch.arange(L, device=mask.device)
    row = column[L - n :, None]
    is_before = column <= row
    is_itself = column == row
    return ((is_before & mask[:, None, :]) | is_itself)[:, None]


def through_block(
    block: nn.Module, x: Tensor, hidden: Tensor, last: int, store: Tensor | None, start: int | Tensor
) -> Tensor:
    """One transformer block, of which only the `last` columns are read: (B, n, D) -> (B, last, D).

    store: keys and values of this block's cache, (2, B, heads, L, size), or None; new ones go from column `start` on.
    """
    attended = attention(block, norm(x, block.ln_1), hidden, last, store, start)
    x = x[:, -last:] + linear(attended, block.attn.c_proj)
    widened = linear(norm(x, block.ln_2), block.mlp.c_fc)
    activated = F.gelu(widened, approximate="tanh")
    return x + linear(activated, block.mlp.c_proj)


def attention(
    block: nn.Module, x: Tensor, hidden: Tensor, last: int, store: Tensor | None, start: int | Tensor
) -> Tensor:
    """What the `last` columns attend to, all heads side by side: (B, n, D) -> (B, last, D). See `through_block`."""
    B, n, D = x.shape
    heads = block.attn.num_heads
    qkv = linear(x, block.attn.c_attn).view(B, n, 3, heads, D // heads)
    qkv = qkv.permute(2, 0, 3, 1, 4)
    query, key, value = qkv  # (B, heads, n, size) each
    if store is not None:
        write(store, qkv[1:], start)
    query = query[:, :, -last:]
    hidden = hidden[:, :, -last:]
    if store is not None and n == 1:  # all columns of the cache, those to come too, which are hidden
        key, value = store
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=hidden)
    return attended.transpose(1, 2).reshape(B, last, D)


def write(store: Tensor, new: Tensor, start: int | Tensor) -> None:
    """New keys and values, (2, B, heads, n, size), into the store's columns from `start` on. A recorded step has it as
    a tensor, for the same kernels must write into another column each time; on CPUs that is slower."""
    if isinstance(start, Tensor):
        store.index_copy_(3, start, new)
    else:
        store[:, :, :, start : start + new.shape[3]] = new


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """Hugging Face's GPT-2 keeps its weights as (in, out): x @ W + b."""
    rows = x.view(-1, x.shape[-1])
    return torch.addmm(layer.bias, rows, layer.weight).view(*x.shape[:-1], -1)


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)
