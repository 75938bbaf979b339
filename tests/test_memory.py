"""Memory: parameter counts against the published ones, and what is computed against what torch's profiler sees."""

import re

import pytest
import torch
from conftest import kept_for_backward
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from crlhf.__main__ import main
from crlhf.bench import memory
from crlhf.config import Config, UserError
from crlhf.engine.forward import recompute_activations
from crlhf.engine.text import Batch
from crlhf.pipeline.memory import check_size, passes_of, tiny_bytes
from crlhf.pipeline.options import parse_command_line


@pytest.mark.parametrize(
    "name, published",
    [("gpt2", 124_439_808), ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("Qwen/Qwen2.5-0.5B", 494_032_768)],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert memory.count_parameters(memory.published_shapes()[name]) == published


SIZES = {"vocab_size": 3000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "gpt2": GPT2Config(n_positions=128, activation_function="gelu_pytorch_tanh", **SIZES),
    "llama": LlamaConfig(intermediate_size=352, num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(intermediate_size=512, num_key_value_heads=1, tie_word_embeddings=True, **SIZES),
}


def measured_bytes(stage, shape):
    """The same step on real tensors: the highest sum of what torch's CPU allocator was asked for and given back.

    Without oneDNN, which multiplies in bf16 by way of large fp32 buffers where a processor has no bf16.
    """
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with torch.backends.mkldnn.flags(enabled=False), profiler as prof:
        stage(shape)
    changes = [(e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([size for _, size in sorted(changes, key=lambda change: change[0])]).cumsum(0)
    return held.max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_computed_memory_is_within_15_percent_of_what_the_allocator_gave(kind, dtype):
    """SFT, reward model, PPO, DPO and sampling, each with a step in several pieces."""
    config = Config.for_model("a folder")
    config.run.methods, config.run.micro_batch_size = "ppo,dpo", 4
    config.data.max_prompt_tokens, config.data.max_response_tokens = 48, 24
    for name, (stage, shape) in memory.stages_of(config, SHAPES[kind], dtype).items():
        computed, measured = memory.stage_bytes(stage, shape), measured_bytes(stage, shape)
        assert computed == pytest.approx(measured, rel=0.15), (name, computed / measured)


def test_memory_grows_with_rows_and_falls_with_what_saves_it():
    def needed(**changes):
        config = Config()
        config.data.max_prompt_tokens, config.data.max_response_tokens = 48, 24
        config.run.micro_batch_size = changes.pop("rows", 4)
        config.run.sampling_batch_size = 16
        for name, value in changes.items():
            setattr(config.ppo, name, value)
        return memory.stage_bytes(*memory.stages_of(config, SHAPES["llama"], torch.bfloat16)["ppo"])

    base = needed()
    weights = 4 * memory.count_parameters(SHAPES["llama"])
    assert base > 4 * weights * 2 + 2 * weights  # two models with gradients and moments, two that are kept
    assert needed(rows=8) > base
    assert needed(recompute_activations=True) < base
    assert needed(critic="shared") < base - 3 * weights


def test_the_command_names_the_peak_and_the_knob_that_lowers_it(capsys):
    sizes = ["--model-width", "64", "--model-vocab-size", "5000", "--sampling-batch-size", "8"]
    assert main(["memory", "--dataset", "pairs.jsonl", *sizes, "--methods", "ppo,dpo"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out[1:-1]] == ["sft", "reward", "baselines", "ppo", "dpo"]
    assert out[-1].endswith("in dpo: --micro-batch-size (now a whole step) lowers it")
    assert main(["memory", "--nonsense", "1"]) == 2


@pytest.mark.parametrize(
    "options",
    [
        "",  # the defaults
        "--model-width 512 --sampling-batch-size 4 --ppo-batch-size 16",  # weights
        "--model-width 256 --ppo-batch-size 32",  # the rollout needs more than the update
        "--model-layers 6 --max-prompt-tokens 400 --max-response-tokens 200 --ppo-critic shared",  # texts
        "--dataset x --model-vocab-size 20000 --ppo-batch-size 256 --sampling-batch-size 16",  # words
        "--ppo-batch-size 512 --micro-batch-size 32 --sampling-batch-size 16",  # steps in several passes
        "--ppo-batch-size 256 --model-layers 6 --sampling-batch-size 16 --ppo-recompute-activations true",
        "--model-layers 4 --ppo-critic none --reward gold --k 300",
    ],
)
def test_the_formulas_for_the_tiny_model_are_what_is_counted(options):
    _, _, config = parse_command_line([*options.split(), "--methods", "ppo,dpo"])
    stages = memory.stages_of(config, memory.model_shape(config), torch.float32)
    assert list(stages) == list(passes_of(config))
    for name, stage in stages.items():
        counted = memory.stage_bytes(*stage)
        assert tiny_bytes(config, name) == pytest.approx(counted, rel=0.15), (name, counted)


@pytest.mark.parametrize(
    "arguments, option, limit",
    [
        ("--model-width 100000", ("model", "width"), 8e9),
        ("--max-response-tokens 50000", ("data", "max_response_tokens"), 8e9),
        ("--sampling-batch-size 90000", ("run", "sampling_batch_size"), 8e9),
        ("--k 5000", ("baselines", "k"), 1e9),
        ("--reward-batch-size 100000", ("reward", "batch_size"), 1e9),
        ("--ppo-batch-size 90000 --train-prompts 90000", ("run", "micro_batch_size"), 1e9),
    ],
)
def test_a_size_that_is_refused_comes_with_the_largest_that_fits(monkeypatch, arguments, option, limit):
    monkeypatch.setattr("crlhf.pipeline.memory.total_memory", lambda: limit)
    _, _, config = parse_command_line(arguments.split())
    with pytest.raises(UserError, match="needs at least [0-9]+ GB, and this machine has [18] GB: use ") as error:
        check_size(config)
    assert option[1].replace("_", "-") in str(error.value)
    fits = int(re.search(r"use (\d+) or less", str(error.value))[1])
    group = getattr(config, option[0])
    setattr(group, option[1], fits)
    check_size(config)
    setattr(group, option[1], fits + 1)
    with pytest.raises(UserError):
        check_size(config)


SMALL = {"hidden_size": 64, "vocab_size": 40, "num_attention_heads": 4, "initializer_range": 0.1}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_recomputing_keeps_little_more_than_one_vector_a_layer(kind):
    """A layer's part is the difference of two depths."""
    ids, kept = torch.randint(40, (4, 32)), []
    batch = Batch(ids, ids >= 0, ids, ids >= 0)
    for layers in (2, 6):
        config = GPT2Config(n_positions=64, num_hidden_layers=layers, **SMALL)
        if kind == "qwen2":
            config = Qwen2Config(num_hidden_layers=layers, intermediate_size=192, num_key_value_heads=4, **SMALL)
        model = AutoModelForCausalLM.from_config(config).eval()
        recompute_activations(model)
        kept.append(kept_for_backward(model, batch)[1])
    assert (kept[1] - kept[0]) / 4 == pytest.approx(4 * 63 * 64 * 4, rel=0.05)
