"""Shared pieces: a tiny policy with the embedded world's tokenizer, and a reader of reference values."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub library: tests never wait for a network

import pytest
import torch

from crlhf import reviews
from crlhf.vocabulary import word_tokenizer
from crlhf.models import tiny_model

torch.set_num_threads(1)  # models this small gain nothing from threads, and busy machines lose a lot


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(reviews.WORDS)


@pytest.fixture
def policy(tokenizer):
    return random_model(tokenizer)


def random_model(tokenizer, seed=0, width=32):
    """A tiny GPT-2 whose weights are large enough for its distributions to be far from uniform."""
    model = tiny_model(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, 96, 2, width, 4, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


@pytest.fixture(scope="session")
def reference():
    """name -> (inputs, outputs) of values computed by another implementation, in float64."""
    cases = json.loads((Path(__file__).parent / "reference_values.json").read_text())["cases"]

    def lookup(name):
        case = next(case for case in cases if case["name"] == name)
        return as_tensors(case["inputs"]), as_tensors(case["outputs"])

    return lookup


def as_tensors(values):
    return {name: torch.tensor(value) if isinstance(value, list) and isinstance(flat(value), bool)
            else torch.tensor(value, dtype=torch.float64) if isinstance(value, list) and isinstance(flat(value), float)
            else torch.tensor(value) if isinstance(value, list) else value for name, value in values.items()}


def flat(value):
    while isinstance(value, list):
        value = value[0]
    return value
