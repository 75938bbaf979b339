"""The same GPT-2 arithmetic with less around it: a lean forward pass over a Hugging Face GPT-2's own weights.

On small models most of a step's time goes into the library's generality: masks rebuilt, caches grown by
copying, wrappers called. This file holds one function that reads the weights of a `GPT2Model` and computes
its hidden states, with or without a preallocated key-value cache. Gradients flow into the same parameters.
`policy.py` calls it for GPT-2-style models and the library for all others; `tests/test_policy.py` holds the
two to the same numbers.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

use_graphs = False  # set by --cuda-graphs: sample on a GPU in recorded steps, see `graph.py`
GELUS = ("gelu_new", "gelu_pytorch_tanh")  # the same function, unfused and fused


def supports(model):
    """Is this a plain GPT-2 (language model, reward model or critic) without options we leave out?"""
    config = model.config
    return (config.model_type == "gpt2" and config.activation_function in GELUS and config.scale_attn_weights
            and not config.scale_attn_by_inverse_layer_idx and not config.add_cross_attention)


class Cache:
    """Keys and values of every layer, (layers, 2, B, heads, L, head size), allocated once.

    What is not written yet is zero, so that it can be multiplied by a weight of zero.
    """

    def __init__(self, model, batch_size, length, device):
        config = model.config
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        self.store = torch.zeros(config.n_layer, 2, batch_size, config.n_head, length,
                                 config.n_embd // config.n_head, device=device, dtype=dtype)
        self.length = length
        self.used = torch.zeros(1, dtype=torch.long, device=device)  # columns so far; on the device for `graph.py`

    def batch_repeat_interleave(self, k):
        """Every row k times, one after another. The name is the library's for its own caches."""
        self.store = self.store.repeat_interleave(k, 2)

    def batch_select_indices(self, rows):
        """Keep only some rows."""
        self.store = self.store[:, :, rows]


def linear(x, layer):
    """Hugging Face's GPT-2 keeps its weights as (in, out): x @ W + b."""
    return torch.addmm(layer.bias, x.view(-1, x.shape[-1]), layer.weight).view(*x.shape[:-1], -1)


def norm(x, layer):
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def quick_gelu(x):
    """GPT-2's tanh approximation through 1/2 (1 + tanh u) = sigmoid(2u): twice as quick as the fused one on CPUs."""
    u = (0.044715 * x).mul_(x).mul_(x).add_(x).mul_(2 * (2 / torch.pi) ** 0.5)  # in place: in the processor's cache
    return u.sigmoid_().mul_(x)


def attention_mask(mask, n_new, length, dtype):
    """(B, columns so far) bool of real tokens -> (B, 1, n_new, length) to add to the scores: 0 where one may look,
    else -inf.

    A new token sees itself and the real tokens before it. Padding sees itself, so that no row of the softmax
    is empty. It is made once for all layers. Columns from there to `length` are yet to come, and hidden.
    """
    L = mask.shape[1]
    if n_new == 1:
        allowed = F.pad(mask, (0, length - L))[:, None, None]
    else:
        column = torch.arange(L, device=mask.device)
        row = column[L - n_new:, None]
        allowed = (((column <= row) & mask[:, None, :]) | (column == row))[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=mask.device).masked_fill_(~allowed, float("-inf"))


def attend_once(query, keys, values, hidden):
    """Attention of one query a row, (B, heads, 1, size), as two batched products: on CPUs up to twice as quick as
    the fused kernel, which is made for many queries. hidden: (B, 1, 1, L), added to the scores."""
    B, heads, _, size = query.shape
    hidden = hidden.expand(-1, heads, -1, -1).reshape(B * heads, 1, -1)
    query, keys, values = (x.reshape(B * heads, -1, size) for x in (query, keys, values))
    weights = torch.baddbmm(hidden, query, keys.transpose(1, 2), alpha=size**-0.5).softmax(-1)
    return torch.bmm(weights, values).view(B, heads, 1, size)


def hidden_states(trunk, ids, mask, position_ids, cache=None, last=None):
    """Hidden states after the final norm of the `last` columns (None: of all): (B, n) new ids -> (B, last, D).

    mask: (B, L) bool over all L columns so far, of which the ids are the last n. Without a cache n = L.
    The final block computes keys and values of all columns, and the rest only of those that are asked for.
    """
    n, device = ids.shape[1], ids.device.type
    lasts = [n] * (len(trunk.h) - 1) + [last or n]
    x = F.embedding(ids, trunk.wte.weight) + F.embedding(position_ids, trunk.wpe.weight)
    allowed = attention_mask(mask, n, cache.length if cache is not None else n,
                             torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
    if cache is not None:
        columns = cache.used + torch.arange(n, device=ids.device)
        for block, last, store in zip(trunk.h, lasts, cache.store):
            x = through_block(block, x, allowed, last, store, columns)
        cache.used.add_(n)
    elif getattr(trunk, "recompute", False):  # see models.recompute_activations
        for block, last in zip(trunk.h, lasts):
            x = checkpoint(through_block, block, x, allowed, last, use_reentrant=False, preserve_rng_state=False)
    else:
        for block, last in zip(trunk.h, lasts):
            x = through_block(block, x, allowed, last)
    return norm(x, trunk.ln_f)


def through_block(block, x, allowed, last, store=None, columns=None):
    """One transformer block, of which only the `last` columns are read: (B, n, D) -> (B, last, D).

    store: keys and values of this block's cache, (2, B, heads, L, size); the new ones go into its `columns`, (n,).
    """
    B, n, D = x.shape
    heads = block.attn.num_heads
    qkv = linear(norm(x, block.ln_1), block.attn.c_attn)
    query, key, value = qkv = qkv.view(B, n, 3, heads, D // heads).permute(2, 0, 3, 1, 4)  # (B, heads, n, size) each
    if store is not None:
        store.index_copy_(3, columns, qkv[1:])
    if last < n:
        x, query, allowed = x[:, -last:], query[:, :, -last:], allowed[:, :, -last:]
    if store is None or n > 1:  # a whole text, or a prompt: the new tokens are all there are
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    else:  # all columns of the cache, those to come too: cutting them off saves little, and costs with small heads
        attended = attend_once(query, *store, allowed)
    x = x + linear(attended.transpose(1, 2).reshape(B, last, D), block.attn.c_proj)
    # autograd would have to keep every step of quick_gelu, so it is for sampling only
    gelu = quick_gelu if store is not None and x.device.type == "cpu" else partial(F.gelu, approximate="tanh")
    return x + linear(gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
