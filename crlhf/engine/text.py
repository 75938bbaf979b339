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
        longest_prompt = self.prompt_mask[rows].sum(1).max()
        longest_response = self.response_mask[rows].sum(1).max()
        P, T = torch.stack([longest_prompt, longest_response]).tolist()  # one read
        return self.part(rows, P, T)

    def part(self, rows: Tensor | list[int], P: int, T: int) -> "Batch":
        """Some rows, the last P columns of prompts and the first T (at least one) of responses."""
        T = max(T, 1)
        return Batch(
            prompt_ids=self.prompt_ids[rows][:, -P:],
            prompt_mask=self.prompt_mask[rows][:, -P:],
            response_ids=self.response_ids[rows][:, :T],
            response_mask=self.response_mask[rows][:, :T],
        )

    def to(self, device: torch.device) -> "Batch":
        moved = {name: tensor.to(device) for name, tensor in vars(self).items()}
        return Batch(**moved)

    def ids_and_mask(self) -> tuple[Tensor, Tensor]:
        """Prompt and response side by side: (B, P + T) ids and bool mask."""
        ids = torch.cat([self.prompt_ids, self.response_ids], 1)
        mask = torch.cat([self.prompt_mask, self.response_mask], 1)
        return ids, mask


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt. A tokenizer that opens every text with BOS does so here, once."""
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    return tokenizer(response, add_special_tokens=False)["input_ids"]


def pad(sequences: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Lists of ids -> (B, L) ids and bool mask, padded on the 'left' or 'right'."""
    longest = max(map(len, sequences))
    length = max(longest, 1)
    ids = torch.full((len(sequences), length), pad_id)
    mask = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        start = length - len(sequence) if side == "left" else 0
        columns = slice(start, start + len(sequence))
        ids[row, columns] = torch.tensor(sequence, dtype=torch.long)
        mask[row, columns] = True
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row: the first real token is 0. (B, L) -> (B, L)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def pad_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """B texts -> ((B, P) ids, (B, P) mask), left-padded."""
    sequences = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return pad(sequences, tokenizer.pad_token_id, "left")


def make_batch(tokenizer: Tokenizer, prompts: list[str], responses: list[str], max_response_tokens: int) -> Batch:
    """Tokenise pairs of texts. A response that fits ends in EOS; a longer one is cut and has none."""
    sequences = []
    for response in responses:
        ids = encode_response(tokenizer, response) + [tokenizer.eos_token_id]
        sequences.append(ids[:max_response_tokens])
    prompt_ids, prompt_mask = pad_prompts(tokenizer, prompts)
    response_ids, response_mask = pad(sequences, tokenizer.pad_token_id, "right")
    return Batch(prompt_ids, prompt_mask, response_ids, response_mask)


def join(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Batches one below the other, as wide as the widest of them."""
    return Batch(
        prompt_ids=stack([batch.prompt_ids for batch in batches], "left", pad_id),
        prompt_mask=stack([batch.prompt_mask for batch in batches], "left", False),
        response_ids=stack([batch.response_ids for batch in batches], "right", pad_id),
        response_mask=stack([batch.response_mask for batch in batches], "right", False),
    )


def stack(tables: list[Tensor], side: str, fill: int) -> Tensor:
    """Tables of (B, L) each, padded on one side to the longest L, one below the other."""
    longest = max(table.shape[1] for table in tables)
    widened = []
    for table in tables:
        missing = longest - table.shape[1]
        amounts = (missing, 0) if side == "left" else (0, missing)
        widened.append(F.pad(table, amounts, value=fill))
    return torch.cat(widened)


def decode(tokenizer: Tokenizer, response_ids: Tensor, response_mask: Tensor) -> list[str]:
    """(B, T) ids -> B texts, without special tokens and without what stands after the mask."""
    lengths = response_mask.sum(1).tolist()
    responses = [ids[:n] for ids, n in zip(response_ids.tolist(), lengths)]
    return tokenizer.batch_decode(responses, skip_special_tokens=True)
