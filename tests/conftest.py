"""Shared pieces: a tiny policy with the embedded world's tokenizer, and a reader of reference values."""

import html
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub library: tests never wait for a network
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # plain `pytest` finds the package too

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from crlhf import reviews
from crlhf.engine.models import tiny_model
from crlhf.engine.tokenizers import word_tokenizer
from crlhf.policy import response_log_probs

torch.set_num_threads(1)  # models this small gain nothing from threads, and busy machines lose a lot


def pytest_configure(config):
    config.addinivalue_line("markers", "engines: needs a version of TRL, OpenRLHF or verl that is named in the test")


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


def llama(tokenizer):
    """A modern architecture (rotary positions, grouped heads), to which the lean path does not apply."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def word_counts(prompts, responses):
    """A reward that tests can foresee: the number of words in each response."""
    return torch.tensor([float(len(response.split())) for response in responses])


def kept_for_backward(model, batch):
    """Gradients of the sum of log-probs, and the bytes of memory, weights aside, that the forward pass keeps."""
    weights, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        kept[memory.data_ptr()] = 0 if memory.data_ptr() in weights else memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = (response_log_probs(model, batch) * batch.response_mask).sum()
    model.zero_grad()
    total.backward()
    return [parameter.grad.clone() for parameter in model.parameters()], sum(kept.values())


@pytest.fixture(scope="session")
def reference():
    """name -> (inputs, outputs) of values computed by another implementation, in float64."""
    cases = json.loads((Path(__file__).parent / "reference_values.json").read_text())["cases"]

    def lookup(name):
        case = next(case for case in cases if case["name"] == name)
        return as_tensors(case["inputs"]), as_tensors(case["outputs"])

    return lookup


def as_tensors(values):
    """Lists become tensors, those of numbers with a point in float64; everything else stays."""
    tensors = {}
    for name, value in values.items():
        if isinstance(value, list):
            value = torch.tensor(value, dtype=torch.float64 if isinstance(first_number(value), float) else None)
        tensors[name] = value
    return tensors


def first_number(value):
    while isinstance(value, list):
        value = value[0]
    return value


def model_folder(folder, vocab_size=None, context=128, eos="<eos>", pad="<pad>", labels=0):
    """A tiny GPT-2 folder with its tokenizer; with `labels` it is a classifier."""
    tokenizer = word_tokenizer(reviews.WORDS)
    tokenizer.eos_token, tokenizer.pad_token = eos, pad
    tokenizer.save_pretrained(folder)
    model = tiny_model(vocab_size or len(tokenizer), 1, 0, context, layers=1, width=8, heads=1, seed=0)
    if labels:
        model.config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(model.config)
    model.save_pretrained(folder)
    return folder


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, script, profile):
    """What a headless browser makes of the page after a script of ours: the text that the script leaves in #out."""
    file = profile / "page.html"
    file.write_text(page.replace("</body>", f'<pre id="out"></pre><script>{script}</script></body>'), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    command = [CHROMIUM, *options, f"--user-data-dir={profile / 'profile'}", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return html.unescape(dom.split('<pre id="out">')[1].split("</pre>")[0])
