"""A language model as a policy: sample responses, read off log-probabilities and values.

A policy assigns to a response y = (y_1 ... y_T) to a prompt x the log-probability

    log pi(y | x) = sum_t log pi(y_t | x, y_<t).

A Batch (engine/text.py) holds prompts, (B, P), and responses, (B, T). Its `response_mask` is True up to and including
the EOS that the policy emitted; whatever is said per token counts only there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.forward import Model, hidden_states, in_fp32, logits_and_states, sampling
from .engine.recorded import sampling_cache
from .engine.text import Batch, Tokenizer, decode, pad_prompts

# ------------------------------------------------------------------------------- log-probabilities, values


def response_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits that predict each response token, and the hidden states they come from: (B, T, V), (B, T, D).

    The last prompt token predicts the first response token. The last response token predicts nothing that we ask for:
    its column is dropped.
    """
    ids, mask = batch.ids_and_mask()
    n_response_tokens = batch.response_ids.shape[1]
    return logits_and_states(model, ids[:, :-1], mask[:, :-1], last=n_response_tokens)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, without a copy of them where that changes nothing."""
    return logits if temperature == 1.0 else logits / temperature


def log_probs_of(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) -> (B, T)."""
    logits = tempered(logits, temperature)
    negative_log_probs = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return -negative_log_probs.view(ids.shape)


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): (B, T, V) -> (B, T)."""
    log_probs = torch.log_softmax(tempered(logits, temperature), -1)
    return -(log_probs.exp() * log_probs).sum(-1)


def response_log_probs(model: Model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log pi(y_t | x, y_<t) of each response token: (B, T). What stands at padding is meaningless."""
    logits, _ = response_logits(model, batch)
    return log_probs_of(logits, batch.response_ids, temperature)


def response_values(critic: Model, batch: Batch) -> Tensor:
    """V(x, y_<t), the critic's prediction before each response token is chosen: (B, T)."""
    ids, mask = batch.ids_and_mask()
    n_response_tokens = batch.response_ids.shape[1]
    states = hidden_states(critic, ids[:, :-1], mask[:, :-1], last=n_response_tokens)
    return in_fp32(critic.score, states).squeeze(-1)


# ------------------------------------------------------------------------------------------------ sampling


def next_token(
    logits: Tensor,
    noise: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Draw one token a row by a race: (B, V) logits, (B, V) exponential noise, -log of uniforms -> (B,) ids.

    Token v arrives after E_v / p_v, and the first one wins, which is v with probability p_v: the Gumbel-max trick,
    since -log E is a Gumbel variable. Two policies that share the noise and hardly differ draw the same token almost
    always ("common random numbers"). Inverting the distribution function would draw from p as well, but there every
    small change of one probability moves the borders of all tokens behind it.

    Nucleus sampling (Holtzman et al. 2020) keeps the smallest set of likeliest tokens whose probability
    reaches top_p. The likeliest token always stays.
    """
    logits = tempered(logits, temperature)
    if top_p < 1.0:
        probs, order = torch.softmax(logits, -1).sort(-1, descending=True)
        likelier = probs.cumsum(-1) - probs  # probability of all likelier tokens
        is_outside = (likelier >= top_p).gather(-1, order.argsort(-1))
        logits = logits.masked_fill(is_outside, float("-inf"))
    return (logits - noise.log()).argmax(-1)


def sample(
    model: Model,
    tokenizer: Tokenizer,
    prompts: tuple[Tensor, Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    k: int = 1,
) -> Batch:
    """Sample k responses per prompt with a key-value cache; a row stops at its EOS.

    prompts: (B, P) left-padded ids and their mask. Returns B * k rows, those of one prompt together, with as many
    response columns as the longest response has. Every step draws noise for all rows, also those that have ended, so
    what a row draws depends on no other row.
    """
    prompt_ids, prompt_mask = prompts
    batch = unwritten_batch(prompt_ids, prompt_mask, max_new_tokens, tokenizer.pad_token_id, k)
    N = len(batch)
    rows = torch.arange(N, device=prompt_ids.device)  # which responses are still being written
    alive = torch.ones_like(rows, dtype=torch.bool)  # and of these, which have not ended
    with sampling(model):
        cache = sampling_cache(model, prompt_mask, max_new_tokens, k)
        logits = cache.next_logits(prompt_ids)
        if k > 1:  # the k responses to a prompt share its pass
            logits = logits.repeat_interleave(k, 0)
            cache.repeat(k)
        for t in range(max_new_tokens):
            noise = race_noise(N, logits.shape[1], rows, generator)
            token = next_token(logits, noise, temperature, top_p)
            batch.response_ids[rows, t] = torch.where(alive, token, tokenizer.pad_token_id)
            batch.response_mask[rows, t] = alive
            alive = alive & (token != tokenizer.eos_token_id)
            if t + 1 == max_new_tokens:
                break
            if t % 4 == 3:  # reading `alive` waits for the GPU: every fourth token only
                keep = rows_that_go_on(alive)
                if len(keep) == 0:
                    break
                if len(keep) < len(rows):
                    cache.keep(keep)
                    rows = rows[keep]
                    alive = alive[keep]
                    token = token[keep]
            logits = cache.next_logits(token[:, None])
    longest = int(batch.response_mask.any(0).sum())
    batch.response_ids = batch.response_ids[:, :longest]
    batch.response_mask = batch.response_mask[:, :longest]
    return batch


def unwritten_batch(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: int,
    pad_id: int,
    k: int,
) -> Batch:
    """A batch of k responses to each prompt, of which no token is written yet."""
    N = len(prompt_ids) * k
    response_ids = torch.full((N, max_new_tokens), pad_id, device=prompt_ids.device)
    return Batch(
        prompt_ids=prompt_ids.repeat_interleave(k, 0),
        prompt_mask=prompt_mask.repeat_interleave(k, 0),
        response_ids=response_ids,
        response_mask=torch.zeros_like(response_ids, dtype=torch.bool),
    )


def race_noise(N: int, n_tokens: int, rows: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exponential noise for N rows, of which those of `rows` are given back: (len(rows), V)."""
    uniform = torch.rand(N, n_tokens, device=rows.device, generator=generator)
    noise = uniform.log_().neg_()
    return noise if len(rows) == N else noise[rows]


def rows_that_go_on(alive: Tensor) -> Tensor:
    """Numbers of the rows to go on with: those still alive, or all while too few have ended for copying to pay."""
    still_alive = alive.nonzero().squeeze(1)
    if 3 * len(still_alive) <= 2 * len(alive):
        return still_alive
    return torch.arange(len(alive), device=alive.device)


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
    """B prompt texts -> (B * k response texts, (B * k,) bool on the CPU: did it end by EOS, the Batch of ids)."""
    prompt_ids, prompt_mask = pad_prompts(tokenizer, prompts)
    padded = prompt_ids.to(model.device), prompt_mask.to(model.device)
    batch = sample(model, tokenizer, padded, max_new_tokens, temperature, top_p, generator, k)
    ids = batch.response_ids.masked_fill(~batch.response_mask, -1).cpu()  # ids and mask in one transfer
    responses = decode(tokenizer, ids, ids >= 0)
    has_ended = (ids == tokenizer.eos_token_id).any(1)
    return responses, has_ended, batch
