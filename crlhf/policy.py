"""A language model as a policy: sample responses, read off log-probabilities and values.

A policy assigns to a response y = (y_1 ... y_T) to a prompt x the log-probability

    log pi(y | x) = sum_t log pi(y_t | x, y_<t).

A Batch (engine/text.py) holds prompts, (B, P), and responses, (B, T). Its `response_mask` is True up to and including
the EOS that the policy emitted; whatever is said per token counts only there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.forward import Cache, Model, hidden_states, in_fp32, logits_and_states, sampling
from .engine.text import Batch, Tokenizer, decode, pad_prompts

# ------------------------------------------------------------------------------- log-probabilities, values


def response_logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits that predict each response token, and the hidden states they come from: (B, T, V), (B, T, D).

    The last prompt token predicts the first response token. Nothing reads the last token, so it stays out.
    """
    ids, mask = batch.ids_and_mask()
    return logits_and_states(model, ids[:, :-1], mask[:, :-1], last=batch.response_ids.shape[1])


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature, without a copy of them where that changes nothing."""
    return logits if temperature == 1.0 else logits / temperature


def log_probs_of(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) -> (B, T)."""
    logits = tempered(logits, temperature)
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


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
    states = hidden_states(critic, ids[:, :-1], mask[:, :-1], last=batch.response_ids.shape[1])
    return in_fp32(critic.score, states).squeeze(-1)


# ------------------------------------------------------------------------------------------------ sampling


def next_token(logits: Tensor, noise: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
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
        before = probs.cumsum(-1) - probs  # probability of all likelier tokens
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), float("-inf"))
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
    (prompt_ids, prompt_mask), eos_id, pad_id = prompts, tokenizer.eos_token_id, tokenizer.pad_token_id
    N, device = len(prompt_ids) * k, prompt_ids.device
    response_ids = torch.full((N, max_new_tokens), pad_id, device=device)
    response_mask = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # which responses are still being written
    alive = torch.ones(N, dtype=torch.bool, device=device)  # and of these, which have not ended
    with sampling(model):
        cache = Cache(model, prompt_mask, max_new_tokens)
        logits = cache.next_logits(prompt_ids).repeat_interleave(k, 0)  # k responses share their prompt's pass
        if k > 1:
            cache.repeat(k)
        for t in range(max_new_tokens):
            noise = torch.rand(N, logits.shape[1], device=device, generator=generator).log_().neg_()
            token = next_token(logits, noise if len(rows) == N else noise[rows], temperature, top_p)
            response_ids[rows, t] = torch.where(alive, token, pad_id)
            response_mask[rows, t] = alive
            alive = alive & (token != eos_id)
            if t + 1 == max_new_tokens:
                break
            keep = rows_that_go_on(alive, len(rows)) if t % 4 == 3 else None  # to ask a GPU makes it wait
            if keep is not None:
                if len(keep) == 0:
                    break
                cache.keep(keep)
                rows, alive, token = rows[keep], alive[keep], token[keep]
            logits = cache.next_logits(token[:, None])
    longest = int(response_mask.any(0).sum())
    prompts = prompt_ids.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)
    return Batch(*prompts, response_ids[:, :longest], response_mask[:, :longest])


def rows_that_go_on(alive: Tensor, n_rows: int) -> Tensor | None:
    """Numbers of the rows that are still alive; None while too few have ended for copying the cache to pay."""
    keep = alive.nonzero().squeeze(1)
    return keep if 3 * len(keep) <= 2 * n_rows else None


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
    padded = tuple(tensor.to(model.device) for tensor in pad_prompts(tokenizer, prompts))
    batch = sample(model, tokenizer, padded, max_new_tokens, temperature, top_p, generator, k)
    ids = batch.response_ids.masked_fill(~batch.response_mask, -1).cpu()  # ids and mask in one transfer
    return decode(tokenizer, ids, ids >= 0), (ids == tokenizer.eos_token_id).any(1), batch
