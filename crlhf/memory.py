"""What a model needs on a GPU, computed: `python -m crlhf memory`.

Parameters are kept in fp32, products run in bf16. While PPO trains, the card holds

    policy      4 bytes a parameter for the weights, 4 for gradients, 8 for AdamW's two moments
    critic      the same, if it is a model of its own
    reference   4 bytes a parameter
    reward      4 bytes a parameter

and, for the rows of one forward pass, what the backward pass needs. Counted here per token and layer: about
17 vectors of the model's width and 2 of the feed-forward width, 2 bytes each (Korthikanti et al. 2022, section
4.1, without the attention matrix, which the fused kernel never stores), and for each response token three
fp32 vectors as long as the vocabulary (logits, their softmax, its gradient).
"""

import torch

GB = 1e9


def configs():
    """The three models of the README, by their published shapes. No weights are needed to count."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    return {
        "gpt2": GPT2Config(),
        "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True),
        "Qwen/Qwen2.5-0.5B": Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True)}


def count_parameters(config):
    """Parameters of a causal LM of this shape, built without memory on torch's meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def training_bytes(config, rows, prompt_tokens, response_tokens, separate_critic=True):
    """(bytes of weights and optimiser, bytes of one forward pass of `rows` rows), as the module says."""
    trained = 2 if separate_critic else 1
    fixed = count_parameters(config) * (16 * trained + 4 + 4)
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = config.num_hidden_layers * (17 * config.hidden_size + 2 * feed_forward) * 2
    tokens = rows * (prompt_tokens + response_tokens)
    return fixed, trained * tokens * per_token + rows * response_tokens * config.vocab_size * 3 * 4


def main(rows=8, prompt_tokens=256, response_tokens=128):
    """Print the table of the README."""
    print("| model | parameters | weights and optimisers | forward and backward | together |")
    print("| --- | --- | --- | --- | --- |")
    for name, config in configs().items():
        fixed, moving = training_bytes(config, rows, prompt_tokens, response_tokens)
        print(f"| {name} | {count_parameters(config) / 1e6:.0f}M | {fixed / GB:.1f} GB | {moving / GB:.1f} GB "
              f"| {(fixed + moving) / GB:.1f} GB |")
    print(f"\nPPO with a separate critic, {rows} rows a forward pass (--ppo-micro-batch-size {rows}), {prompt_tokens} prompt "
          f"and {response_tokens} response tokens; computed, not measured.")
