"""What a model needs on a GPU, computed: `python -m crlhf memory`.

Parameters are kept in fp32, products run in bf16. While PPO trains, the card holds

    policy      4 bytes a parameter for the weights, 2 for their bf16 copies, 4 for gradients, 8 for AdamW's moments
    critic      the same, if it is a model of its own
    reference   4 bytes a parameter
    reward      4 bytes a parameter

and, for the rows of one forward pass, what the backward pass needs: for each token and layer, in bf16, 10 vectors of
the model's width and 2 of the feed-forward width in GPT-2, 17 and 4 in models of Llama's kind (the fused kernel never
stores an attention matrix), and for each response token three fp32 vectors as long as the vocabulary (logits, their
softmax, its gradient). With --ppo-recompute-activations a layer keeps only the one fp32 vector that enters it, and all
the rest while its own backward pass runs.
"""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

GB = 1e9


def configs() -> dict[str, PretrainedConfig]:
    """The three models of the README, by their published shapes. No weights are needed to count."""
    return {
        "gpt2": GPT2Config(),
        "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen2.5-0.5B": Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    }


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a causal LM of this shape, built without memory on torch's meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def training_bytes(
    config: PretrainedConfig,
    rows: int,
    prompt_tokens: int,
    response_tokens: int,
    separate_critic: bool = True,
    recompute: bool = False,
) -> tuple[int, int]:
    """(bytes of weights and optimiser, bytes of one forward pass of `rows` rows), as the module says."""
    models = 2 if separate_critic else 1
    fixed = count_parameters(config) * (18 * models + 4 + 4)
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    wide, fed = (10, 2) if config.model_type == "gpt2" else (17, 4)
    inside = (wide * config.hidden_size + fed * feed_forward) * 2  # a token in a layer
    layers = models * config.num_hidden_layers
    per_token = layers * config.hidden_size * 4 + inside if recompute else layers * inside
    logits = rows * response_tokens * config.vocab_size * 3 * 4
    return fixed, rows * (prompt_tokens + response_tokens) * per_token + logits


def main(rows: int = 8, prompt_tokens: int = 256, response_tokens: int = 128) -> None:
    """Print the table of the README."""
    print("| model | parameters | weights and optimisers | forward and backward | together | recomputing activations |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, config in configs().items():
        (fixed, moving), (_, less) = (
            training_bytes(config, rows, prompt_tokens, response_tokens, recompute=recompute)
            for recompute in (False, True)
        )
        print(
            f"| {name} | {count_parameters(config) / 1e6:.0f}M | {fixed / GB:.1f} GB | {moving / GB:.1f} GB "
            f"| {(fixed + moving) / GB:.1f} GB | {(fixed + less) / GB:.1f} GB |"
        )
    print(
        f"\nPPO with a separate critic, {rows} rows a forward pass (--ppo-micro-batch-size {rows}), {prompt_tokens} "
        f"prompt and {response_tokens} response tokens; computed, not measured."
    )
