"""Texts as ids: prompts padded on the left, (B, P), responses on the right, (B, T).

So every response starts in the same column, and the token at column t of the response is predicted at column
P + t - 1. Masks are built from positions and never from the identity of a token: with many tokenizers padding *is*
the EOS token, and a mask that hides padding by its id hides the EOS from the loss, so the policy never learns to stop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

Reward = Callable[[list[str], list[str]], Tensor]  # B prompts and B responses -> (B,) float on the CPU


@dataclass
class Batch:
    """Prompts and responses as padded ids. Index it with rows to get a smaller batch, trimmed to fit."""

    prompt_ids: Tensor  # (B, P) left-padded
    prompt_mask: Tensor  # (B, P) bool
    response_ids: Tensor  # (B, T) right-padded
    response_mask: Tensor  # (B, T) bool, True up to and including EOS

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, rows: Tensor | list[int]) -> "Batch":
        """Some rows, without the columns that are padding in all of them."""
        prompt_mask, response_mask = self.prompt_mask[rows], self.response_mask[rows]
        return self.part(rows, *torch.stack([prompt_mask.sum(1).max(), response_mask.sum(1).max()]).tolist())

    def part(self, rows: Tensor | list[int], P: int, T: int) -> "Batch":
        """Some rows, the last P columns of prompts and the first T (at least one) of responses."""
        prompts, responses = slice(-P, None), slice(max(T, 1))
        tensors = (self.prompt_ids, prompts), (self.prompt_mask, prompts)
        tensors += (self.response_ids, responses), (self.response_mask, responses)
        return Batch(*(tensor[rows][:, columns] for tensor, columns in tensors))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def ids_and_mask(self) -> tuple[Tensor, Tensor]:
        """Prompt and response side by side: (B, P + T) ids and bool mask."""
        ids = torch.cat([self.prompt_ids, self.response_ids], 1)
        return ids, torch.cat([self.prompt_mask, self.response_mask], 1)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt. A tokenizer that opens every text with BOS does so here, once."""
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    return tokenizer(response, add_special_tokens=False)["input_ids"]


def pad(sequences: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (B, L) ids and bool mask, padded on the 'left' or 'right'."""
    length = max(max(map(len, sequences)), 1)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if side == "left" else slice(0, len(sequence))
        ids[row, place], mask[row, place] = torch.tensor(sequence, dtype=torch.long), True
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row: the first real token is 0. (B, L) -> (B, L)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def pad_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """B texts -> ((B, P) ids, (B, P) mask), left-padded."""
    return pad([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id, "left")


def make_batch(tokenizer: Tokenizer, prompts: list[str], responses: list[str], max_response_tokens: int) -> Batch:
    """Tokenise pairs of texts. A response that fits ends in EOS; a longer one is cut and has none."""
    sequences = [encode_response(tokenizer, text) + [tokenizer.eos_token_id] for text in responses]
    responses_padded = pad([ids[:max_response_tokens] for ids in sequences], tokenizer.pad_token_id, "right")
    return Batch(*pad_prompts(tokenizer, prompts), *responses_padded)


def join(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Batches one below the other, as wide as the widest of them."""
    P = max(batch.prompt_ids.shape[1] for batch in batches)
    T = max(batch.response_ids.shape[1] for batch in batches)
    wide = []
    for batch in batches:
        left, right = (P - batch.prompt_ids.shape[1], 0), (0, T - batch.response_ids.shape[1])
        prompts = F.pad(batch.prompt_ids, left, value=pad_id), F.pad(batch.prompt_mask, left)
        wide.append((*prompts, F.pad(batch.response_ids, right, value=pad_id), F.pad(batch.response_mask, right)))
    return Batch(*map(torch.cat, zip(*wide)))


def decode(tokenizer: Tokenizer, response_ids: Tensor, response_mask: Tensor) -> list[str]:
    """(B, T) ids -> B texts, without special tokens and without what stands after the mask."""
    lengths = response_mask.sum(1).tolist()
    responses = [ids[:n] for ids, n in zip(response_ids.tolist(), lengths)]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)
