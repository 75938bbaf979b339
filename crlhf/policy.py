"""A language model as a policy: sample responses, read off log-probabilities and values.

A policy assigns to a response y = (y_1 ... y_T) to a prompt x the log-probability

    log pi(y | x) = sum_t log pi(y_t | x, y_<t).

A Batch (engine/text.py) holds prompts, (B, P), and responses, (B, T). Its `response_mask` is True up to and including
the EOS that the policy emitted; whatever is said per token counts only there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.forward import Cache, Model, hidden_states, logits_and_states
from .engine.text import Batch, Tokenizer, decode, ended, pad_prompts

# ------------------------------------------------------------------------------- log-probabilities, values


def response_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits that predict each response token, and the hidden states they come from: (B, T, V), (B, T, D).

    The last prompt token predicts the first response token. Nothing reads the last token, so it stays out.
    """
    ids, mask = batch.ids_and_mask()
    return logits_and_states(model, ids[:, :-1], mask[:, :-1], last=batch.response_ids.shape[1])


def log_probs_of(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) -> (B, T)."""
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (B, T, V) -> (B, T)."""
    log_probs = torch.log_softmax(logits.float() / temperature, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


def response_log_probs(model: Model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | x, y_<t) of each response token: (B, T). What stands at padding is meaningless."""
    logits, _ = response_logits(model, batch)
    return log_probs_of(logits, batch.response_ids, temperature)


def response_values(critic: Model, batch: Batch) -> Tensor:
    """V(x, y_<t), the critic's prediction before each response token is chosen: (B, T)."""
    ids, mask = batch.ids_and_mask()
    states = hidden_states(critic, ids[:, :-1], mask[:, :-1], last=batch.response_ids.shape[1])
    return critic.score(states.float()).squeeze(-1)


# ------------------------------------------------------------------------------------------------ sampling


def next_token(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draw one token a row by inverting the distribution function: (B, V) logits, (B,) uniforms -> (B,) ids.

    Nucleus sampling (Holtzman et al. 2020) keeps the smallest set of likeliest tokens whose probability
    reaches top_p. The likeliest token always stays.
    """
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1.0:
        sorted_probs, order = probs.sort(-1, descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # probability of all likelier tokens
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0.0))
    cumulative = probs.cumsum(-1)
    token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(
    model: Model,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniforms: Tensor,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Sample k responses per prompt with a key-value cache; a row stops at its EOS.

    prompt_ids, prompt_mask: (B, P), left-padded. uniforms: (B * k, T), one number in [0, 1) for each token that
    may be drawn, so that what a row draws depends on no other row. Returns (response_ids, response_mask), each
    with B * k rows, those of one prompt together, and as many columns, at most T, as the longest response has.
    """
    B, (N, T), device = len(prompt_ids), uniforms.shape, prompt_ids.device
    response_ids = torch.full((N, T), pad_id, device=device)
    response_mask = torch.zeros(N, T, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # which responses are still being written
    alive = torch.ones(N, dtype=torch.bool, device=device)  # and of these, which have not ended
    with torch.inference_mode():  # tensors that autograd will never ask for take less time to make
        cache = Cache(model, prompt_mask, T)
        logits = cache.next_logits(prompt_ids).repeat_interleave(N // B, 0)  # k responses share their prompt's pass
        if N > B:
            cache.repeat(N // B)
        for t in range(T):
            token = next_token(logits, uniforms[:, t], temperature, top_p)
            response_ids[rows, t] = torch.where(alive, token, pad_id)
            response_mask[rows, t] = alive
            alive = alive & (token != eos_id)
            # asking a GPU makes it wait, and leaving copies the cache: not every step, not for a few rows
            if t % 4 == 3 and 3 * (n_alive := int(alive.sum())) <= 2 * len(rows):
                if n_alive == 0:
                    break
                keep = alive.nonzero().squeeze(1)
                cache.keep(keep)
                rows, alive, token, uniforms = rows[keep], alive[keep], token[keep], uniforms[keep]
            if t + 1 < T:
                logits = cache.next_logits(token[:, None])
    longest = int(response_mask.any(0).sum())
    return response_ids[:, :longest], response_mask[:, :longest]


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    k: int = 1,
) -> tuple[list[str], Tensor, Batch]:
    """B prompt texts -> (B * k response texts, (B * k,) bool: did it end by EOS, the Batch of ids)."""
    prompt_ids, prompt_mask = (tensor.to(model.device) for tensor in pad_prompts(tokenizer, prompts))
    uniforms = torch.rand(len(prompts) * k, max_new_tokens, generator=generator, device=model.device)
    ids = tokenizer.eos_token_id, tokenizer.pad_token_id
    responses = sample(model, prompt_ids, prompt_mask, uniforms, *ids, temperature, top_p)
    batch = Batch(prompt_ids.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0), *responses)
    return decode(tokenizer, *responses), ended(batch, tokenizer.eos_token_id), batch
