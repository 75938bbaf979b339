"""Recorded decoding without a GPU: its static step, run and not replayed, draws what the growing cache draws."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from crlhf import policy as P
from crlhf.engine import forward, recorded
from crlhf.engine.files import stream
from crlhf.engine.forward import compute_in, recompute_activations
from crlhf.engine.recorded import record_sampling, sampling_cache
from crlhf.engine.text import pad_prompts

PROMPTS = ["the plot was dull .", "i loved the music . i hated the cast .", "the end .", "i"]
FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "smollm3", "gpt_neox", "olmo2", "opt"]
TRIED = recorded.TRIED_TOKENS
REFUSED = ["gemma2", "gemma3_text", "qwen3_next", "bloom", "mamba"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 96, "head_dim": 8, "initializer_range": 0.3}
SPECIAL = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2,
                   "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
}  # fmt: skip


def model_of(family, tokenizer):
    """A tiny random model of a family; gpt2 is the one that takes the lean path."""
    if family == "gpt2":
        return random_model(tokenizer)
    sizes = SIZES | SPECIAL.get(family, {}) | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(family, **sizes, eos_token_id=1, pad_token_id=0, bos_token_id=1)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class NoReads(TorchDispatchMode):
    """Refuses whatever would make the host wait for a GPU, and tensors made of the host's numbers."""

    READS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.startswith(self.READS):
            raise RuntimeError(f"{name} is not permitted while a stream is capturing")
        return function(*args, **(kwargs or {}))


def pretended(step, pool):
    """In place of a recording: the step as it is, kept from reading."""

    def replay():
        with NoReads():
            return step()

    return replay


def recorded_model(model, lines=None):
    return record_sampling(model, [].append if lines is None else lines.append, pretended)


def drawn(model, tokenizer, k=1, prompts=PROMPTS, seed=0, n_new=16, **options):
    prompts = pad_prompts(tokenizer, prompts)
    return P.sample(model, tokenizer, prompts, n_new, generator=stream(seed, "draws"), k=k, **options)


def decoder_of(model):
    (decoder,) = model.recorder.decoders.values()
    return decoder


def assert_same(ours, theirs):
    assert torch.equal(ours.response_ids, theirs.response_ids)
    assert torch.equal(ours.response_mask, theirs.response_mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_as_with_a_growing_cache(family, tokenizer):
    """Padded rows, rows that end, several responses a prompt, and a decoder that is used again, for less and more."""
    model = model_of(family, tokenizer)
    calls = [
        {"k": 2},
        {"k": 6, "n_new": 60},
        {"k": 1, "seed": 1},
        {"prompts": PROMPTS[:1]},
        {"n_new": 70, "top_p": 0.9},
    ]
    expected = [drawn(model, tokenizer, temperature=9.0, **call) for call in calls]
    lines = []
    recorded_model(model, lines)
    for call, batch in zip(calls, expected):
        assert_same(drawn(model, tokenizer, temperature=9.0, **call), batch)
    assert lines == []
    assert set(model.recorder.decoders) == {(24, 128), (4, 64), (1, 64), (4, 128)}  # (8, 64) had too little memory
    lengths = expected[1].response_mask.sum(1)
    assert (lengths < 60).sum() > 12  # more than half of the rows end, and at different times
    assert len(set(lengths.tolist())) > 8


def test_rows_that_end_leave_and_smaller_recordings_go_on(tokenizer):
    model = recorded_model(model_of("llama", tokenizer))
    used = []

    def watched(step, pool):
        def replay():
            used.append(step.args[1])
            return step()

        return replay

    model.recorder.record = watched
    drawn(model, tokenizer, k=6, n_new=60, temperature=9.0)
    used = used[TRIED:]
    assert set(used) == {24, 12}
    assert used == sorted(used, reverse=True)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "olmo2", "opt"])
def test_in_bf16_a_copy_is_sampled_from_which_follows_the_weights(family, tokenizer):
    model = recorded_model(compute_in(model_of(family, tokenizer), torch.bfloat16))
    lines = []
    model.recorder.warn = lines.append
    prompt_ids, mask = pad_prompts(tokenizer, PROMPTS)
    with torch.no_grad():
        before = sampling_cache(model, mask, 8).next_logits(prompt_ids)
        addresses = recorded.addresses_of(model.recorder.copy)
        for parameter in model.parameters():
            parameter.mul_(0.8)
        cache = sampling_cache(model, mask, 8)
        after = cache.next_logits(prompt_ids)
        step = cache.next_logits(prompt_ids[:, -1:])
        plain = forward.Cache(model, mask, 8)
        expected = [plain.next_logits(prompt_ids), plain.next_logits(prompt_ids[:, -1:])]
    assert lines == []
    assert recorded.addresses_of(model.recorder.copy) == addresses
    assert not torch.allclose(before, after, rtol=0.05)
    for ours, theirs in zip((after, step), expected):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    kinds = {name: weight.dtype for name, weight in model.recorder.copy.named_parameters()}
    head = model.get_output_embeddings()
    assert model.recorder.copy.get_output_embeddings() is head
    assert {kind for name, kind in kinds.items() if "norm" in name or "ln_" in name} == {torch.bfloat16}
    assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_recorded_is_sampled_as_before_and_one_line_says_so(family, tokenizer):
    model = model_of(family, tokenizer)
    expected = drawn(model, tokenizer, k=2)
    lines = []
    recorded_model(model, lines)
    for _ in range(2):
        assert_same(drawn(model, tokenizer, k=2), expected)
    assert len(lines) == 1
    assert family in lines[0] and "not recorded" in lines[0]


# ------------------------------------------------------------------------------------------- what could go wrong


def test_a_step_that_asks_the_gpu_is_not_recorded(tokenizer):
    model = model_of("llama", tokenizer)
    expected = drawn(model, tokenizer)
    norm = model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: output if output.isfinite().all() else None)
    lines = []
    recorded_model(model, lines)
    assert_same(drawn(model, tokenizer), expected)
    assert len(lines) == 1 and "capturing" in lines[0]


def test_a_step_that_comes_to_other_logits_is_not_recorded(tokenizer, monkeypatch):
    model = model_of("gpt2", tokenizer)
    expected = drawn(model, tokenizer)
    lines = []
    recorded_model(model, lines)
    real = recorded.lean_states
    monkeypatch.setattr(
        recorded, "lean_states", lambda trunk, ids, mask, at, *rest: real(trunk, ids, mask, at + 1, *rest)
    )
    assert_same(drawn(model, tokenizer), expected)
    assert len(lines) == 1 and "logits differ" in lines[0]


@pytest.mark.parametrize("how", ["data", "parameter"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_that_were_replaced_are_recorded_anew(family, how, tokenizer):
    """A graph would go on reading the memory of the old ones."""
    model = recorded_model(model_of(family, tokenizer))
    drawn(model, tokenizer)
    old = decoder_of(model)
    drawn(model, tokenizer)
    assert decoder_of(model) is old
    layer = model.get_decoder().layers[0].mlp.up_proj if family == "llama" else model.transformer.h[0].mlp.c_fc
    other = layer.weight.detach() * -1.5
    if how == "data":
        layer.weight.data = other
    else:
        layer.weight = torch.nn.Parameter(other)
    ours = drawn(model, tokenizer)
    assert decoder_of(model) is not old
    model.recorder = None
    assert_same(ours, drawn(model, tokenizer))


def test_weights_that_changed_in_place_are_sampled_from_by_the_same_recording(tokenizer):
    model = recorded_model(model_of("gpt2", tokenizer))
    before = drawn(model, tokenizer)
    decoder = decoder_of(model)
    state = {name: weight * 0.7 for name, weight in model.state_dict().items()}
    model.load_state_dict(state)
    after = drawn(model, tokenizer)
    assert decoder_of(model) is decoder
    assert not torch.equal(before.response_ids[:, :5], after.response_ids[:, :5])
    model.recorder = None
    assert_same(after, drawn(model, tokenizer))


def test_what_a_batch_draws_depends_on_no_batch_before_it(tokenizer):
    """Bit-equal resume: a run that goes on from its middle has seen fewer sizes. And memory has an end."""
    model = recorded_model(model_of("llama", tokenizer))
    fresh = copy.deepcopy(model)
    for rows in range(1, recorded.MOST + 2):
        drawn(model, tokenizer, prompts=PROMPTS[:1] * rows, n_new=4)
    assert len(model.recorder.decoders) <= recorded.MOST
    mask = torch.ones(3, 5, dtype=torch.bool)
    logits = []
    for network in (model, fresh):
        with torch.inference_mode():
            cache = sampling_cache(network, mask, 8)
            cache.next_logits(torch.arange(15).view(3, 5))
            logits.append(cache.next_logits(torch.tensor([[3], [4], [5]])).clone())
    assert torch.equal(*logits)
    for decoder in model.recorder.decoders.values():
        assert decoder.buffers[0].untyped_storage().data_ptr() == model.recorder.memory.data_ptr()


def test_a_copy_of_a_model_records_for_itself(tokenizer):
    model = recorded_model(model_of("gpt2", tokenizer))
    drawn(model, tokenizer)
    copied = copy.deepcopy(model)
    assert copied.recorder is not model.recorder
    assert copied.recorder.decoders == {} and copied.recorder.record is pretended
    assert_same(drawn(copied, tokenizer), drawn(model, tokenizer))


def test_what_one_batch_left_is_not_seen_by_the_next(tokenizer):
    """Not even numbers that no weight of zero makes zero."""
    model = recorded_model(model_of("llama", tokenizer))
    expected = drawn(model, tokenizer)
    for buffer in decoder_of(model).buffers:
        buffer.fill_(float("nan"))
    assert_same(drawn(model, tokenizer), expected)


def test_activations_that_are_computed_again_in_training_change_nothing(tokenizer):
    model = model_of("llama", tokenizer)
    expected = drawn(model, tokenizer)
    recompute_activations(model)
    lines = []
    recorded_model(model, lines)
    assert_same(drawn(model, tokenizer), expected)
    assert lines == []


def test_without_a_recorder_the_cache_is_the_growing_one(tokenizer):
    model = model_of("gpt2", tokenizer)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert isinstance(sampling_cache(model, mask, 4, 2), forward.Cache)
    recorded_model(model)
    assert isinstance(sampling_cache(model, mask, 4, 2), recorded.RecordedCache)


def test_a_recorded_model_trains_and_is_saved_as_any_other(tokenizer, tmp_path):
    model = recorded_model(model_of("llama", tokenizer))
    batch = drawn(model, tokenizer)
    P.response_log_probs(model, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(drawn(again, tokenizer), batch)


class FakeCuda:
    """The parts of torch.cuda that a recording uses, and what was asked of them."""

    def __init__(self, monkeypatch):
        self.log, self.mode, self.current = [], 0, "own stream"
        names = "current_stream set_stream stream graph CUDAGraph get_sync_debug_mode set_sync_debug_mode"
        for name in names.split():
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"), name=self.current)

    def set_stream(self, stream):
        self.current = stream.name

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.current = stream.name
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph, pool):
        side = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"), name="side")

        class Recording:
            capture_stream = side

            def __enter__(_):
                self.log.append(f"record in {pool}")
                self.current = "side"

            def __exit__(_, kind, *others):
                if kind is None:  # a recording that fails leaves its stream behind
                    self.current = "own stream"

        return Recording()

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def test_a_recording_warms_up_beside_the_stream_and_refuses_reads_before_it_begins(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def step():
        cuda.log.append(f"step on {cuda.current}, {cuda.mode}")
        return len(cuda.log)

    replay = recorded.cuda_graph(step, "a pool")
    assert cuda.log[:4] == ["wait", "step on side, 0", "step on side, error", "wait"]
    assert cuda.log[4:] == ["record in a pool", "step on side, 0"]
    assert replay() == replay() == 6  # what the recorded call returned
    assert cuda.log[6:] == ["replay", "replay"]
    assert (cuda.mode, cuda.current) == (0, "own stream")


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_recording_that_fails_leaves_stream_and_mode_as_they_were(failing, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    calls = []

    def step():
        calls.append(cuda.mode)
        if len(calls) == failing:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorded.cuda_graph(step, None)
    assert cuda.mode == 0
    assert cuda.current == "own stream"
