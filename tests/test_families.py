"""Eight families of models, tiny and with random weights, through the pipeline's own sampler and log-probs."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from crlhf import policy as P
from crlhf.engine import forward
from crlhf.engine.files import stream
from crlhf.engine.text import make_batch, pad_prompts

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ONE_OF_EACH = {"layer_types": ["linear_attention", "full_attention"]}
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Qwen3Next": {**LINEAR, **EXPERTS, **ONE_OF_EACH, "shared_expert_intermediate_size": 16},
    "Qwen3_5Text": {**LINEAR, **ONE_OF_EACH},
    "Jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Mamba2": {"num_heads": 8, "state_size": 4, "n_groups": 1},
}
PROMPTS = ["the plot was dull .", "i loved the music . i hated the cast .", "i liked the camera .", "i loved it ."]


def tiny(name, tokenizer):
    sizes = {**SIZES, **FAMILIES[name], "num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.3}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1}
    config = getattr(transformers, f"{name}Config")(**sizes, **special)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_samples_from_what_it_is_trained_on(name, tokenizer, monkeypatch):
    """Two responses a prompt, left padding, a row that leaves early, 6 tokens: every cached step's logits are those of
    one uncached pass over prompt and response."""
    model, steps, rows = tiny(name, tokenizer), [], torch.arange(8)
    real_next, real_keep = forward.Cache.next_logits, forward.Cache.keep

    def next_logits(cache, ids):
        logits = real_next(cache, ids)
        steps.append((rows, logits))
        return logits

    def keep(cache, kept):
        nonlocal rows
        rows = rows[kept] if len(kept) < len(rows) else rows  # `repeat` keeps all of them
        real_keep(cache, kept)

    monkeypatch.setattr(forward.Cache, "next_logits", next_logits)
    monkeypatch.setattr(forward.Cache, "keep", keep)
    monkeypatch.setattr(P, "rows_that_go_on", lambda alive: torch.tensor([0, 2, 3, 4, 5, 6, 7][: len(alive)]))
    batch = P.sample(model, tokenizer, pad_prompts(tokenizer, PROMPTS), 6, generator=stream(0, "x"), k=2)
    assert [len(logits) for _, logits in steps] == [4, 8, 8, 8, 7, 7][: len(steps)] and len(steps) == 6
    with torch.no_grad():
        expected = P.response_logits(model, batch)[0]
    for t, (alive, logits) in enumerate(steps):
        logits = logits.repeat_interleave(2, 0) if t == 0 else logits
        real = batch.response_mask[alive, t]
        assert torch.allclose(logits[real], expected[alive, t][real], atol=2e-4), f"token {t}"


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_changes_nothing_for_a_family(name, tokenizer):
    model = tiny(name, tokenizer)
    responses = ["the cast was weak .", "i liked it .", ".", "the music was good ."]
    together = P.response_log_probs(model, make_batch(tokenizer, PROMPTS, responses, 8))
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        alone = P.response_log_probs(model, make_batch(tokenizer, [prompt], [response], 8))[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=2e-4)
