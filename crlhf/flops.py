"""How much arithmetic and memory traffic a workload of the benchmark takes, counted by hand.

`tests/test_benchmark.py` holds the FLOPs to those that torch counts while the code runs.
"""

from dataclasses import dataclass

PHASES = ("rollout", "scoring", "update", "iteration")


@dataclass
class Workload:
    layers: int
    width: int
    heads: int
    vocab: int
    prompt: int = 16       # tokens of every prompt
    response: int = 32     # tokens of every response
    batch: int = 64
    epochs: int = 4
    minibatches: int = 4
    k: int = 4             # baselines: responses per prompt
    prompts: int = 64      # baselines: number of prompts


def trunk_flops(work, tokens, columns, last=None):
    """Forward FLOPs of one row through all blocks. An (a, b) x (b, c) product costs 2abc.

    tokens: how many are computed. columns: how many each of them looks at, hidden ones included. last: of how many the
    output is read; the final block computes no more than keys, values and queries of the others.
    """
    D = work.width
    query_key_value = 2 * tokens * D * 3 * D

    def rest(n):
        attention = 2 * (2 * n * columns * D)      # query times key, then weights times value
        output = 2 * n * D * D
        mlp = 2 * (2 * n * D * 4 * D)              # D -> 4D -> D
        return attention + output + mlp

    return work.layers * query_key_value + (work.layers - 1) * rest(tokens) + rest(last or tokens)


def sampling_flops(work, k=1):
    """FLOPs of k responses to one prompt: one pass over the prompt, then token by token over the whole cache. The last
    token is drawn and never read."""
    head = 2 * work.width * work.vocab
    step = trunk_flops(work, 1, work.prompt + work.response) + head
    return trunk_flops(work, work.prompt, work.prompt, last=1) + head + k * (work.response - 1) * step


def iteration_flops(work, critic):
    """FLOPs of an iteration by phase. A backward pass costs two forward passes: one product for the gradient
    of the inputs, one for that of the weights."""
    L, T, D = work.prompt + work.response, work.response, work.width
    trunk = trunk_flops(work, L - 1, L - 1, last=T)  # no output of the last token or inside the prompt is read
    policy = trunk + 2 * T * D * work.vocab
    value = 2 * T * D + (trunk if critic == "separate" else 0)
    phases = [sampling_flops(work) + policy + policy + value,  # rollout: sample; policy, reference, critic
              trunk_flops(work, L, L, last=1) + 2 * D,         # scoring: one number a row
              work.epochs * 3 * (policy + value)]              # update
    return {name: work.batch * flops for name, flops in zip(PHASES, [*phases, sum(phases)])}


def bytes_to_decode(work, n_parameters):
    """Bytes that sampling a batch moves, in bf16: all weights once a step, the keys and values of all tokens so far."""
    cached = sum(2 * work.layers * work.batch * (work.prompt + t) * work.width for t in range(work.response))
    return 2 * (work.response * n_parameters + cached)
