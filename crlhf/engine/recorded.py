"""Recorded decoding: one step of sampling is recorded as a CUDA graph, and every token replays it.

A step of sampling is hundreds of small kernels. Launched one by one from Python they take milliseconds, in which
the GPU mostly waits; replayed from a graph they follow each other at once. A graph repeats the same kernels on the
same addresses, so nothing in the step may change its shape or be read by the host:

    keys and values   (rows, heads, length, size), allocated once; a new token is written into column c
    mask              (rows, length), which columns a row sees: the real ones of its prompt, and those from there to c
    position          (rows, 1), what a token's position is among the real ones of its row; c and it grow by one a step

Columns that a row doesn't see are zero, so that a weight of zero times what stands there is zero.

The prompt is read as ever (`Cache` of forward.py), and what it left is copied in. Noise and draws are no part of the
recording. In bf16 a copy of the weights is sampled from: casting weights at every step would be most of its kernels.

Whoever can't be recorded (sliding windows, linear attention, steps that ask the GPU), or comes to other logits when
it is tried out, is sampled with `Cache` as before, and one line says so.
"""

import copy
import gc
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .files import first_line
from .forward import Cache, Model, in_fp32, library_head
from .gpt2 import hiding_mask, is_lean, lean_states

Step = Callable[[], Tensor]  # runs one step on buffers that it knows, and returns logits
Record = Callable[[Step, object], Step]  # a step, and the pool of memory to record in -> the same step, recorded

MULTIPLE = 64  # lengths are rounded up to it: else every prompt that is longer by a token would be recorded anew
MOST = 8  # decoders of one model: each keeps its logits
TRIED_TOKENS = 3
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # how far two orders of summing may be apart, and no more

# ------------------------------------------------------------------------------------------- what `sample` uses


def record_sampling(model: Model, warn: Callable[[str], None] | None = None, record: Record | None = None) -> Model:
    """From now on sampling from this model, and from copies of it, is recorded; `warn` is told if it can't be."""
    model.recorder = Recorder(warn or print_error, record or cuda_graph)
    return model


def sampling_cache(model: Model, prompt_mask: Tensor, n_new: int, k: int = 1) -> "Cache | RecordedCache":
    """An empty cache for (B, P) prompts, k responses each of at most `n_new` tokens: recorded, if it can be."""
    recorder = getattr(model, "recorder", None)
    if recorder is not None:
        prepared = recorder.prepare(model, len(prompt_mask) * k, prompt_mask.shape[1] + n_new)
        if prepared is not None:
            return RecordedCache(*prepared, prompt_mask, k)
    return Cache(model, prompt_mask, n_new)


class RecordedCache:
    """`Cache`, recorded. The logits that it returns are overwritten by the next step."""

    def __init__(self, sampler: Model, decoder: "Decoder", prompt_mask: Tensor, k: int) -> None:
        self.decoder = decoder
        self.k = k
        with without_autocast(prompt_mask.device):
            self.prompts: Cache | None = Cache(sampler, prompt_mask, 0)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Read (B, P) prompts, and later (B, 1) new ids; return the logits of the token after them: (B, V)."""
        if self.prompts is None:
            return self.decoder.next_logits(ids)
        with without_autocast(ids.device):
            logits = self.prompts.next_logits(ids)
            self.decoder.load(self.prompts, self.k)
        self.prompts = None
        return logits

    def repeat(self, k: int) -> None:
        """Nothing is left to do: the prompts were copied in k times."""
        assert k == self.k

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        self.decoder.keep(rows)


# ---------------------------------------------------------------------------------------------- the recorded step


class Decoder:
    """Static buffers, and the step recorded on all rows, on the first half and on the first quarter of them.

    Rows that have ended leave (`keep`): the others move up, and as soon as they fit into a half, that is replayed.
    """

    def __init__(self, memory: Tensor, shapes: list[list[int]], is_lean: bool) -> None:
        self.rows, _, self.length, _ = shapes[0]
        sizes = [math.prod(shape) for shape in shapes]
        memory = memory[: sum(sizes)]
        self.buffers = [part.view(shape) for part, shape in zip(memory.split(sizes), shapes)]
        if is_lean:
            self.store = memory.view(-1, 2, *shapes[0])  # the buffers side by side
        device = memory.device
        self.token = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.mask = torch.zeros(self.rows, self.length, dtype=torch.bool, device=device)
        self.replays: dict[int, Step] = {}

    def record(self, model: Model, record: Record, pool: object) -> None:
        """The largest first: what the others need then fits into its memory."""
        for rows in (self.rows, self.rows // 2, self.rows // 4):
            if rows > 0:
                self.column.zero_()
                self.position.zero_()
                self.replays[rows] = record(partial(self.step, model, rows), pool)

    def step(self, model: Model, rows: int) -> Tensor:
        """The token of the first `rows` rows goes into its column: logits of the token after it, (rows, V)."""
        token = self.token[:rows]
        mask = self.mask[:rows]
        position = self.position[:rows]
        mask.index_fill_(1, self.column, True)
        if is_lean(model):
            store = self.store[:, :, :rows]
            states = lean_states(model.transformer, token, mask, position, 1, store, self.column)
            logits = in_fp32(model.lm_head, states[:, -1])
        else:
            inputs = {"input_ids": token, "position_ids": position, "past_key_values": self.library_cache(rows)}
            inputs["attention_mask"] = hiding_mask(mask[:, None, None], self.buffers[0].dtype)
            with library_head(model):
                logits = model(**inputs, use_cache=True).logits[:, -1]
        position.add_(1)
        self.column.add_(1)
        return logits

    def library_cache(self, rows: int) -> transformers.Cache:
        """The buffers' first rows as the library's models want them."""
        buffers = [buffer[:rows] for buffer in self.buffers]
        pairs = zip(buffers[0::2], buffers[1::2])
        return transformers.Cache(layers=[StaticColumns(keys, values, self.column) for keys, values in pairs])

    def load(self, prompts: Cache, k: int) -> None:
        """Begin anew, with every prompt k times, one after another."""
        n = len(prompts.mask) * k
        P = prompts.n_columns
        torch._foreach_zero_([*self.buffers, self.mask, self.position])
        for buffer, tensor in zip(self.buffers, keys_and_values(prompts)):
            buffer[:n, :, :P] = tensor[:, :, :P].repeat_interleave(k, 0)
        self.mask[:n, :P] = prompts.mask[:, :P].repeat_interleave(k, 0)
        self.position[:n] = prompts.position.repeat_interleave(k, 0)
        self.column.fill_(P)

    def next_logits(self, ids: Tensor) -> Tensor:
        """Rows behind those of the (n, 1) ids go through the step too; nobody reads what they come to."""
        n = len(ids)
        self.token[:n] = ids
        smallest = min(rows for rows in self.replays if rows >= n)
        with without_autocast(ids.device):
            return self.replays[smallest]()[:n]

    def keep(self, rows: Tensor) -> None:
        for tensor in (*self.buffers, self.mask, self.position):
            tensor[: len(rows)] = tensor[rows]


class StaticColumns(DynamicLayer):
    """Keys and values of one of the library's layers: a token's go into the column that a tensor names."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.values = values
        self.column = column
        self.is_initialized = True

    def update(self, keys: Tensor, values: Tensor, *arguments: object, **others: object) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values


def keys_and_values(prompts: Cache) -> list[Tensor]:
    """Keys, values, keys, values ... by layer, (B, heads, columns, size) each."""
    if is_lean(prompts.model):
        return list(prompts.store.flatten(0, 1))
    layers = prompts.library.layers
    for layer in layers:
        if type(layer) is not DynamicLayer:  # those of sliding windows and linear attention are made from it
            raise NotImplementedError(f"its cache has a {type(layer).__name__}")
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def cuda_graph(step: Step, pool: object) -> Step:
    """The step as a CUDA graph. It runs first: kernels are loaded, and workspaces allocated, at their first use."""
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(graph, pool=pool)
    side = recording.capture_stream  # the same for all recordings: each stream has a workspace of its own
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        step()
        run_without_reads(step)
    stream.wait_stream(side)
    try:
        with recording:
            logits = step()
    finally:
        torch.cuda.set_stream(stream)  # a recording that fails doesn't leave its own

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def run_without_reads(step: Step) -> None:
    """Here a read by the host is an error, which is milder than one in the middle of a recording."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


# ------------------------------------------------------------------------------------ one model's recordings


class Recorder:
    """The recordings of one model, which live from one call of `sample` to the next.

    There is a decoder for each number of rows and each length. They share their memory, for only one is in use at a
    time. None serves for fewer rows or shorter texts: other sizes are summed in another order, and what a batch comes
    to would depend on those before it, so that a run that is resumed would not go on as if it had not been stopped.
    """

    def __init__(self, warn: Callable[[str], None], record: Record) -> None:
        self.warn = warn
        self.record = record
        self.works = True
        self.copy: Model | None = None  # in bf16, where the model computes in bf16
        self.addresses: list[int] = []
        self.forget()

    def __deepcopy__(self, memo: dict) -> "Recorder":
        """A copy of the model makes recordings of its own: graphs hold the addresses of weights."""
        return Recorder(self.warn, self.record)

    def forget(self) -> None:
        self.decoders: dict[tuple[int, int], Decoder] = {}
        self.memory: Tensor | None = None  # keys and values, of all decoders
        self.pool = None  # what else a step needs

    def prepare(self, model: Model, rows: int, length: int) -> tuple[Model, Decoder] | None:
        """What is sampled from, the model or its copy, and a decoder for so many rows and at least so many columns.
        None if it can't be recorded."""
        if not self.works:
            return None
        with torch.inference_mode(False), torch.no_grad(), without_autocast(model.device):
            try:
                sampler = self.present_weights(model)
                return sampler, self.decoder_for(sampler, rows, -(-length // MULTIPLE) * MULTIPLE)
            except Exception as error:  # whatever the model, the library or CUDA has against it
                self.works = False
                self.copy = None
                self.forget()
                self.warn(f"sampling is not recorded for this {model.config.model_type}: {first_line(error)}")
                return None

    def present_weights(self, model: Model) -> Model:
        """The model itself, or its copy in bf16 with the weights that the model has now."""
        if getattr(model, "compute_dtype", torch.float32) == torch.float32:
            return model
        if self.copy is None:
            self.copy = bf16_copy(model)
        refresh(self.copy, model)
        return self.copy

    def decoder_for(self, sampler: Model, rows: int, length: int) -> Decoder:
        """Recorded at the first use, and again if weights are no longer where they were."""
        addresses = addresses_of(sampler)
        if addresses != self.addresses:
            self.forget()
            self.addresses = addresses
        if (rows, length) not in self.decoders:
            if len(self.decoders) == MOST:
                self.decoders.pop(next(iter(self.decoders)))
            self.decoders[rows, length] = self.new_decoder(sampler, rows, length)
        return self.decoders[rows, length]

    def new_decoder(self, model: Model, rows: int, length: int) -> Decoder:
        """One that gives the same logits as `Cache` for a few tokens, after prompts of which one is padded."""
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.arange(rows * 4, device=model.device).view(rows, 4) % vocabulary
        mask = torch.ones(rows, 4, dtype=torch.bool, device=model.device)
        mask[0, :2] = False
        cache = Cache(model, mask, TRIED_TOKENS)
        cache.next_logits(ids)
        decoder = self.empty_decoder(cache, length)
        if self.pool is not None:
            gc.collect()  # a graph of the past that is deleted during a recording would end it
        decoder.record(model, self.record, self.pool)
        decoder.load(cache, 1)
        for column in range(TRIED_TOKENS):
            token = ids[:, column : column + 1]
            check_alike(decoder.next_logits(token), cache.next_logits(token), self.memory.dtype)
        return decoder

    def empty_decoder(self, prompts: Cache, length: int) -> Decoder:
        """Its keys and values are shaped like those of the prompts. If memory is too small, all begin anew in more."""
        tensors = keys_and_values(prompts)
        shapes = [[tensor.shape[0], tensor.shape[1], length, tensor.shape[3]] for tensor in tensors]
        size = sum(math.prod(shape) for shape in shapes)
        if self.memory is None or self.memory.numel() < size:
            self.forget()
            self.memory = torch.zeros(size, dtype=tensors[0].dtype, device=tensors[0].device)
            if self.memory.is_cuda:
                self.pool = torch.cuda.graph_pool_handle()
        return Decoder(self.memory, shapes, is_lean(prompts.model))


def check_alike(recorded: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Constants don't count: they change no probability."""
    size = (expected - expected.mean(-1, keepdim=True)).norm()
    difference = (recorded - expected).norm()
    if not difference <= TOLERANCE[dtype] * size:
        raise ArithmeticError(f"recorded logits differ by {difference / size:.0e} of their size")


def bf16_copy(model: Model) -> Model:
    """The model with its weights in bf16, but for the head, which is the model's own and stays in fp32."""
    head = model.get_output_embeddings()
    copies: dict[int, nn.Module] = {id(head): head}  # what deepcopy takes in place of copying
    for weight in model.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    copied = copy.deepcopy(model, copies)
    copied.compute_dtype = torch.float32  # nothing is cast
    return copied


def refresh(copied: Model, model: Model) -> None:
    """Today's weights, rounded, into the copy's own memory, which graphs know."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    pairs = [(ours, weights[name]) for name, ours in copied.named_parameters() if ours is not weights[name]]
    torch._foreach_copy_([ours for ours, _ in pairs], [weight for _, weight in pairs])


def addresses_of(model: Model) -> list[int]:
    """Where the weights are that a graph reads. If one is replaced, the graph would go on reading the old one."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


def without_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def print_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
