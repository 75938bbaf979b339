"""Memory estimates: parameter counts against the published ones, and growth where it must be linear."""

import pytest
import torch
from conftest import kept_for_backward
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from crlhf.bench.memory import configs, count_parameters, training_bytes
from crlhf.engine.forward import recompute_activations
from crlhf.engine.text import Batch


@pytest.mark.parametrize(
    "name, published",
    [("gpt2", 124_439_808), ("HuggingFaceTB/SmolLM2-135M", 134_515_008), ("Qwen/Qwen2.5-0.5B", 494_032_768)],
)
def test_parameter_counts_are_the_published_ones(name, published):
    assert count_parameters(configs()[name]) == published


def test_bytes_by_hand_and_linear_in_rows():
    config = configs()["gpt2"]
    fixed, moving = training_bytes(config, 1, 10, 5)
    assert fixed == 124_439_808 * 44
    assert moving == 2 * 15 * 12 * (10 * 768 + 2 * 3072) * 2 + 5 * 50257 * 12
    assert training_bytes(config, 8, 10, 5) == (fixed, 8 * moving)
    assert training_bytes(config, 1, 10, 5, separate_critic=False)[0] == 124_439_808 * 26


def test_recomputing_keeps_one_vector_a_layer():
    config = configs()["gpt2"]
    logits = 5 * 50257 * 12
    fixed, moving = training_bytes(config, 1, 10, 5, recompute=True)
    assert moving == 15 * (2 * 12 * 768 * 4 + (10 * 768 + 2 * 3072) * 2) + logits
    assert fixed == training_bytes(config, 1, 10, 5)[0]


SMALL = {"hidden_size": 64, "vocab_size": 40, "num_attention_heads": 4, "initializer_range": 0.1}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        lambda layers: GPT2Config(
            n_positions=64, num_hidden_layers=layers, activation_function="gelu_pytorch_tanh", **SMALL
        ),
        lambda layers: Qwen2Config(num_hidden_layers=layers, intermediate_size=192, num_key_value_heads=4, **SMALL),
    ],
)
def test_a_layer_of_a_real_forward_pass_keeps_what_is_counted(kind, recompute, monkeypatch):
    """In bf16, as on a GPU. A layer's part is the difference of two depths; copies of weights are counted apart."""
    monkeypatch.setattr("crlhf.engine.forward.autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    ids = torch.randint(40, (4, 32))
    batch, kept, counted = Batch(ids, ids >= 0, ids, ids >= 0), [], []
    for layers in (2, 6):
        model = AutoModelForCausalLM.from_config(kind(layers)).eval()
        if recompute:
            recompute_activations(model)
        copies = 0 if recompute else 2 * sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2)
        kept.append(kept_for_backward(model, batch)[1] - copies)
        counted.append(training_bytes(model.config, 4, 32, 32, separate_critic=False, recompute=recompute)[1])
    assert kept[1] - kept[0] == pytest.approx(counted[1] - counted[0], rel=0.02)
