"""Sampling on a GPU without waiting for the CPU: every step has the same shapes and is replayed as a CUDA graph.

A decoding step of a small model is some hundred tiny kernels, and Python takes longer to ask for one than a GPU
to run it. A CUDA graph is such a step recorded: one call runs all its kernels. What is recorded are addresses, so
the step may only work in place, on tensors that stay where they are: no row leaves the batch, and the column to
write is itself a tensor. Otherwise this is `policy.sample`, and `tests/test_policy.py` holds the two to the same
tokens, on the CPU. On a GPU it has been neither run nor measured yet.
"""

import copy

import torch
from transformers.pytorch_utils import Conv1D

from . import fast
from .policy import next_logits, next_token, positions
from .runs import autocast


@torch.no_grad()
def sample(model, prompt_ids, prompt_mask, uniforms, eos_id, pad_id, temperature=1.0, top_p=1.0):
    """`policy.sample` for the models that `fast` supports, in steps of a fixed shape."""
    (B, P), (N, T), device = prompt_ids.shape, uniforms.shape, prompt_ids.device
    response_ids = torch.full((N, T), pad_id, device=device)
    response_mask = torch.zeros(N, T, dtype=torch.bool, device=device)
    alive = torch.ones(N, dtype=torch.bool, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)  # how many tokens have been drawn
    if device.type == "cuda":
        model = with_bf16_weights(model)
    with autocast(device):
        cache = fast.Cache(model, B, P + T, device)
    position = positions(prompt_mask)
    logits = next_logits(model, prompt_ids, prompt_mask, position, cache)
    cache.batch_repeat_interleave(N // B)
    mask = torch.cat([prompt_mask, torch.zeros(B, T, dtype=torch.bool, device=device)], 1)
    logits, mask, position = (x.repeat_interleave(N // B, 0) for x in (logits, mask, position[:, -1:]))
    token = torch.empty(N, 1, dtype=torch.long, device=device)

    def draw():
        token[:, 0] = next_token(logits, uniforms.index_select(1, t).squeeze(1), temperature, top_p)
        response_ids.index_copy_(1, t, torch.where(alive[:, None], token, pad_id))
        response_mask.index_copy_(1, t, alive[:, None])
        alive.logical_and_(token[:, 0] != eos_id)
        t.add_(1)

    def step():
        mask.index_fill_(1, P + t - 1, True)  # the token drawn last stands in this column
        position.add_(1)
        logits.copy_(next_logits(model, token, mask, position, cache))
        draw()

    draw()
    repeat(step, T - 1, device, finished=lambda: not alive.any())
    longest = int(response_mask.any(0).sum())
    return response_ids[:, :longest], response_mask[:, :longest]


def repeat(step, times, device, finished):
    """Do a step so many times, or until it has finished: that is asked rarely, as the answer makes the CPU wait.

    On a GPU three plain steps warm up, as recording demands. Recording a step doesn't run it.
    """
    for i in range(times):
        if device.type == "cuda" and i == 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        step()
        if i % 16 == 15 and finished():
            break


def with_bf16_weights(model):
    """A copy whose products have bf16 weights. Autocast would round the fp32 ones to the same numbers at every step,
    and reading weights is what decoding mostly does."""
    model = copy.deepcopy(model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.bfloat16())  # no longer that of the embedding
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.bfloat16()
    return model
