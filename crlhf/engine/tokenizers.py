"""Tokenizers made here: one token per word for the embedded world, byte-level BPE for your own texts."""

from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import ByteLevelBPETokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .text import Tokenizer


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """One token per word: the embedded world's tokenizer."""
    vocab = {token: i for i, token in enumerate(("<pad>", "<eos>", "<unk>", *words))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from texts, in GPT-2's manner: it can spell any text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return wrap(tokenizer._tokenizer, pad_token="<pad>", eos_token="<eos>")


def wrap(tokenizer: tokenizers.Tokenizer, **special_tokens: str) -> Tokenizer:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **special_tokens
    )


def training_texts(rows: Iterable[dict]) -> Iterator[str]:
    """Every text in the rows, whatever the columns, for learning a tokenizer; of a very long one the beginning."""
    for row in rows:
        for value in row.values():
            if isinstance(value, str):
                yield value[:100_000]
            elif isinstance(value, list):
                yield from training_texts(item for item in value if isinstance(item, dict))
            elif isinstance(value, dict):
                yield from training_texts([value])
