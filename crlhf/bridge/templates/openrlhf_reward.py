"""Contrastive rewards for OpenRLHF: r(x, y) - c * b(x), where the label of a prompt is its baseline b(x).

OpenRLHF loads this file with --reward.remote_url and calls reward_func from many threads, with lists of one text each.
It only logs an exception of ours, and goes on with the reward None: look for "Failed to fetch reward" in its log.
"""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

COEFFICIENT = 1.0  # c: the share of the baseline that is subtracted
SPECIAL_TOKENS = ["<eos>"]  # of the policy's tokenizer: a query has them, and texts were scored without
BOS = ""  # what stands before every prompt in prompts.jsonl, because OpenRLHF adds none

spec = spec_from_file_location("scoring", Path(__file__).with_name("scoring.py"))  # this file's folder is on no path
scoring = module_from_spec(spec)
spec.loader.exec_module(scoring)


def reward_func(queries: list[str], prompts: list[str], labels: list) -> dict:
    """queries: each a prompt and its response as one text. labels: each prompt's baseline."""
    if not len(queries) == len(prompts) == len(labels):
        counts = f"{len(queries)} queries, {len(prompts)} prompts and {len(labels)} labels"
        raise ValueError(f"prompt {prompts[:1]}: got {counts}")
    responses = [response_of(query, prompt) for query, prompt in zip(queries, prompts)]
    baselines = torch.tensor([number(label, "label", prompt) for label, prompt in zip(labels, prompts)])
    scores = scoring.score([prompt.removeprefix(BOS) for prompt in prompts], responses)
    raw = torch.tensor([number(score, "score", prompt) for score, prompt in zip(scores, prompts)])
    return {
        "rewards": raw - COEFFICIENT * baselines,  # what the policy learns from
        "scores": raw,  # what filters and logs see
        "extra_logs": {"raw_reward": raw, "baseline": baselines},
    }


def response_of(query: str, prompt: str) -> str:
    """The text of a query after its prompt, without special tokens."""
    if not query.startswith(prompt):
        raise ValueError(f"prompt {prompt[:80]!r}: the query doesn't begin with it; raise --data.max_len if it was cut")
    response = query[len(prompt) :]
    for token in SPECIAL_TOKENS:
        response = response.replace(token, "")
    return response


def number(value: object, what: str, prompt: str) -> float:
    """The value as a float. "" is what OpenRLHF gives for a label if --data.label_key is left out."""
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"prompt {prompt[:80]!r}: its {what} is {value!r}, not a finite number (--data.label_key baseline)"
    )
