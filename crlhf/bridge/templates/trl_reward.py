"""Contrastive rewards for TRL: r(x, y) - c * b(x), where the column `baseline` holds each prompt's b(x).

TRL calls `reward` with lists, one entry a response; the columns of the data set come as lists of the same length.
GRPO and RLOO subtract a mean of the prompt's own group, in which b(x) cancels: see the README beside this file.
"""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

COEFFICIENT = 1.0  # c: the share of the baseline that is subtracted

spec = spec_from_file_location("scoring", Path(__file__).with_name("scoring.py"))  # wherever this file was loaded from
scoring = module_from_spec(spec)
spec.loader.exec_module(scoring)


def reward(prompts: list[str], completions: list[str], baseline: list[float], **kwargs: object) -> list[float]:
    """One contrastive reward a completion. kwargs: whatever else TRL passes, such as completion_ids."""
    if not len(prompts) == len(completions) == len(baseline):
        counts = f"{len(prompts)} prompts, {len(completions)} completions and {len(baseline)} baselines"
        raise ValueError(f"prompt {prompts[:1]}: got {counts}")
    for prompt, completion in zip(prompts, completions):
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(f"prompt {prompt!r}: plain texts are needed, as in the exported prompts, not messages")
    baselines = [number(b, "baseline", prompt) for b, prompt in zip(baseline, prompts)]
    scores = [number(score, "score", prompt) for score, prompt in zip(scoring.score(prompts, completions), prompts)]
    if "log_metric" in kwargs:  # TRL's, for its log
        kwargs["log_metric"]("raw_reward", sum(scores) / len(scores))
        kwargs["log_metric"]("baseline", sum(baselines) / len(baselines))
    return [score - COEFFICIENT * b for score, b in zip(scores, baselines)]


def number(value: object, what: str, prompt: str) -> float:
    """The value as a float."""
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"prompt {prompt[:80]!r}: its {what} is {value!r}, not a finite number")
