"""The reward of a response: what the model in the folder reward_model, beside this file, says at its last token.

It needs torch and transformers. Every process that loads this file holds a copy of the model, on DEVICE.
"""

import threading
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FOLDER = Path(__file__).with_name("reward_model")
DEVICE = "cpu"  # or "cuda:0", where that GPU has room
MAX_RESPONSE_TOKENS = 24  # a response is cut there, as it was for the baselines
LABEL = 0  # of a classifier with several: the one whose log-odds are the reward

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, use_safetensors=True, dtype=torch.float32)
model = model.to(DEVICE).eval()
model.config.pad_token_id = None  # rows go in one by one, so nothing is padding, not even a final EOS
one_at_a_time = threading.Lock()  # engines call from several threads


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One reward for each pair of texts."""
    return [reward_of(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


@torch.no_grad()
def reward_of(prompt: str, response: str) -> float:
    has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
    ids = ids + tokenizer(response, add_special_tokens=False)["input_ids"][:MAX_RESPONSE_TOKENS]
    with one_at_a_time:
        logits = model(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].float()  # (labels,)
    if len(logits) == 1:
        return logits.item()
    others = torch.cat([logits[:LABEL], logits[LABEL + 1 :]])
    return (logits[LABEL] - others.logsumexp(0)).item()  # log p / (1 - p)
