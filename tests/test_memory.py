"""Memory estimates: parameter counts against the published ones, and growth where it must be linear."""

import pytest

from crlhf.memory import configs, count_parameters, training_bytes


@pytest.mark.parametrize("name, published", [("gpt2", 124_439_808), ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
                                             ("Qwen/Qwen2.5-0.5B", 494_032_768)])
def test_parameter_counts_are_the_published_ones(name, published):
    assert count_parameters(configs()[name]) == published


def test_bytes_by_hand_and_linear_in_rows():
    config = configs()["gpt2"]
    fixed, moving = training_bytes(config, 1, 10, 5)
    assert fixed == 124_439_808 * 40
    assert moving == 2 * 15 * 12 * (17 * 768 + 2 * 3072) * 2 + 5 * 50257 * 12
    assert training_bytes(config, 8, 10, 5) == (fixed, 8 * moving)
    assert training_bytes(config, 1, 10, 5, separate_critic=False)[0] == 124_439_808 * 24
