"""A language model as a policy: sample responses, read off log-probabilities and values.

A policy assigns to a response y = (y_1 ... y_T) to a prompt x the log-probability

    log pi(y | x) = sum_t log pi(y_t | x, y_<t).

Prompts are padded on the left, (B, P), and responses on the right, (B, T), so that every response starts in
the same column and the token at column t of the response is predicted at column P + t - 1. Masks are built
from positions and never from the identity of a token: with many tokenizers padding *is* the EOS token, and
a mask that hides padding by its id hides the EOS from the loss, so the policy never learns to stop.
`response_mask` is True up to and including the EOS that the policy emitted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from . import fast
from .runs import autocast

# ------------------------------------------------------------------------------------------- text and ids


@dataclass
class Batch:
    """Prompts and responses as padded ids. Index it with rows to get a smaller batch, trimmed to fit."""

    prompt_ids: torch.Tensor     # (B, P) left-padded
    prompt_mask: torch.Tensor    # (B, P) bool
    response_ids: torch.Tensor   # (B, T) right-padded
    response_mask: torch.Tensor  # (B, T) bool, True up to and including EOS

    def __len__(self):
        return len(self.prompt_ids)

    def __getitem__(self, rows):
        """Some rows, without the columns that are padding in all of them."""
        prompt_mask, response_mask = self.prompt_mask[rows], self.response_mask[rows]
        P, T = int(prompt_mask.sum(1).max()), max(int(response_mask.sum(1).max()), 1)
        return Batch(self.prompt_ids[rows][:, -P:], prompt_mask[:, -P:],
                     self.response_ids[rows][:, :T], response_mask[:, :T])

    def to(self, device):
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def ids_and_mask(self):
        """Prompt and response side by side: (B, P + T) ids and bool mask."""
        return (torch.cat([self.prompt_ids, self.response_ids], 1),
                torch.cat([self.prompt_mask, self.response_mask], 1))


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt. A tokenizer that opens every text with BOS does so here, once."""
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]


def encode_response(tokenizer, response):
    return tokenizer(response, add_special_tokens=False)["input_ids"]


def pad(sequences, pad_id, side):
    """Lists of ids -> (B, L) ids and bool mask, padded on the 'left' or 'right'."""
    length = max(max(map(len, sequences)), 1)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence, dtype=torch.long), True
    return ids, mask


def pad_prompts(tokenizer, prompts):
    """B texts -> ((B, P) ids, (B, P) mask), left-padded."""
    return pad([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id, "left")


def make_batch(tokenizer, prompts, responses, max_response_tokens):
    """Tokenise pairs of texts. A response that fits ends in EOS; a longer one is cut and has none."""
    prompt_ids, prompt_mask = pad_prompts(tokenizer, prompts)
    sequences = [(encode_response(tokenizer, text) + [tokenizer.eos_token_id])[:max_response_tokens]
                 for text in responses]
    return Batch(prompt_ids, prompt_mask, *pad(sequences, tokenizer.pad_token_id, "right"))


def decode(tokenizer, response_ids, response_mask):
    """(B, T) ids -> B texts, without special tokens and without what stands after the mask."""
    lengths = response_mask.sum(1).tolist()
    return tokenizer.batch_decode([ids[:n] for ids, n in zip(response_ids.tolist(), lengths)], skip_special_tokens=True)


def positions(mask):
    """Position of each token among the real ones of its row: the first real token is 0. (B, L) -> (B, L)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


# ------------------------------------------------------------------------------- log-probabilities, values


def response_logits(model, batch):
    """Logits that predict each response token, and the trunk's hidden states they come from.

    Returns (B, T, V) and (B, T, D). Column P - 1 (the last prompt token) predicts the first response token,
    so the last response token's own output is not used. The LM head runs on response positions only.
    """
    ids, mask = batch.ids_and_mask()
    T = batch.response_ids.shape[1]
    if fast.supports(model):
        hidden = fast_hidden(model, ids, mask, T)
        return model.lm_head(hidden), hidden
    out = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), logits_to_keep=T + 1,
                output_hidden_states=True, use_cache=False)
    return out.logits[:, :-1], out.hidden_states[-1][:, -T - 1:-1]


def log_probs_of(logits, ids, temperature=1.0):
    """log softmax(logits / temperature) at `ids`: (B, T, V), (B, T) -> (B, T)."""
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


def entropy_of(logits, temperature=1.0):
    """Entropy in nats of softmax(logits / temperature): (B, T, V) -> (B, T)."""
    log_probs = torch.log_softmax(logits.float() / temperature, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


def response_log_probs(model, batch, temperature=1.0):
    """log pi(y_t | x, y_<t) of each response token: (B, T). What stands at padding is meaningless."""
    with autocast(batch.prompt_ids.device):
        logits, _ = response_logits(model, batch)
    return log_probs_of(logits, batch.response_ids, temperature)


def response_values(critic, batch):
    """V(x, y_<t), the critic's prediction before each response token is chosen: (B, T)."""
    ids, mask = batch.ids_and_mask()
    T = batch.response_ids.shape[1]
    with autocast(ids.device):
        if fast.supports(critic):
            hidden = fast_hidden(critic, ids, mask, T)
        else:
            hidden = critic.base_model(input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask),
                                       use_cache=False).last_hidden_state[:, -T - 1:-1]
        return critic.score(hidden).squeeze(-1).float()


def fast_hidden(model, ids, mask, T):
    """Hidden states that predict the last T tokens: (B, T, D). Nothing reads the last token itself, so it stays out."""
    mask = mask[:, :-1]
    return fast.hidden_states(model.transformer, ids[:, :-1], mask, positions(mask), last=T)


# ------------------------------------------------------------------------------------------------ sampling


def next_token(logits, uniform, temperature=1.0, top_p=1.0):
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
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompt_ids, prompt_mask, uniforms, eos_id, pad_id, temperature=1.0, top_p=1.0):
    """Sample k responses per prompt with a key-value cache; a row stops at its EOS.

    prompt_ids, prompt_mask: (B, P), left-padded. uniforms: (B * k, T), one number in [0, 1) for each token that
    may be drawn, so that what a row draws depends on no other row. Returns (response_ids, response_mask), each
    with B * k rows, those of one prompt together, and as many columns, at most T, as the longest response has.
    """
    if fast.use_graphs and prompt_ids.is_cuda and fast.supports(model):  # the same for a GPU
        from .graph import sample as sample_on_gpu  # it imports this module

        return sample_on_gpu(model, prompt_ids, prompt_mask, uniforms, eos_id, pad_id, temperature, top_p)
    (B, P), (N, T), device = prompt_ids.shape, uniforms.shape, prompt_ids.device
    response_ids = torch.full((N, T), pad_id, device=device)
    response_mask = torch.zeros(N, T, dtype=torch.bool, device=device)
    rows = torch.arange(N, device=device)  # which responses are still being written
    alive = torch.ones(N, dtype=torch.bool, device=device)  # and of these, which have not ended
    mask = torch.cat([prompt_mask, torch.ones(B, T, dtype=torch.bool, device=device)], 1)
    ids, position = prompt_ids, positions(prompt_mask)
    with autocast(device):  # decides the precision of what is kept
        cache = fast.Cache(model, B, P + T, device) if fast.supports(model) else DynamicCache(config=model.config)
    with torch.inference_mode():  # tensors that autograd will never ask for take less time to make
        for t in range(T):
            logits = next_logits(model, ids, mask[:, :P + t], position, cache)
            if t == 0 and N > B:  # all k responses of a prompt share its one pass
                cache.batch_repeat_interleave(N // B)
                logits, mask, position = (x.repeat_interleave(N // B, 0) for x in (logits, mask, position))
            token = next_token(logits, uniforms[:, t], temperature, top_p)
            response_ids[rows, t] = torch.where(alive, token, pad_id)
            response_mask[rows, t] = alive
            alive = alive & (token != eos_id)
            ids, position = token[:, None], position[:, -1:] + 1
            # asking a GPU makes it wait, and leaving copies the cache: not every step, not for a few rows
            if t % 4 == 3 and 3 * (n_alive := int(alive.sum())) <= 2 * len(rows):
                if n_alive == 0:
                    break
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, alive, mask, ids, position, uniforms = (
                    x[keep] for x in (rows, alive, mask, ids, position, uniforms))
    longest = int(response_mask.any(0).sum())
    return response_ids[:, :longest], response_mask[:, :longest]


def next_logits(model, ids, mask, position, cache):
    """Logits after the last of some new ids: (B, n) ids, (B, L) mask of all columns so far -> (B, V)."""
    with autocast(ids.device):
        if fast.supports(model):
            return model.lm_head(fast.hidden_states(model.transformer, ids, mask, position, cache, last=1)[:, -1])
        return model(input_ids=ids, attention_mask=mask.long(), position_ids=position, past_key_values=cache,
                     use_cache=True, logits_to_keep=1).logits[:, -1]


def generate(model, tokenizer, prompts, max_new_tokens, temperature=1.0, top_p=1.0, generator=None, k=1):
    """B prompt texts -> (B * k response texts, (B * k,) bool: did it end by EOS, the Batch of ids)."""
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in pad_prompts(tokenizer, prompts))
    uniforms = torch.rand(len(prompts) * k, max_new_tokens, generator=generator, device=device)
    response_ids, response_mask = sample(model, prompt_ids, prompt_mask, uniforms, tokenizer.eos_token_id,
                                         tokenizer.pad_token_id, temperature, top_p)
    batch = Batch(prompt_ids.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0), response_ids, response_mask)
    return decode(tokenizer, response_ids, response_mask), ended(batch, tokenizer.eos_token_id), batch


def ended(batch, eos_id):
    """(B,) bool: the last token of the response is EOS."""
    last = batch.response_mask.sum(1, keepdim=True) - 1
    return batch.response_ids.gather(1, last.clamp(min=0)).squeeze(1) == eos_id
