"""Contrastive rewards for verl: r(x, y) - c * b(x), where extra_info brings the prompt x and its baseline b(x).

verl loads this file with reward.custom_reward_function.path and calls compute_score once a response, from several
processes and threads. It passes no prompt, so the prompt travels in extra_info, too.
"""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

COEFFICIENT = 1.0  # c: the share of the baseline that is subtracted

spec = spec_from_file_location("scoring", Path(__file__).with_name("scoring.py"))  # this file's folder is on no path
scoring = module_from_spec(spec)
spec.loader.exec_module(scoring)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs: object
) -> dict[str, float]:
    """solution_str: the response, without special tokens. verl trains on "score" and logs the others."""
    extra_info = extra_info or {}
    prompt = extra_info.get("prompt")
    if not isinstance(prompt, str):
        what = f"extra_info holds no prompt, only {sorted(extra_info)}"
        raise ValueError(f"response {solution_str[:80]!r}: {what}; use the exported prompts.parquet")
    baseline = number(extra_info.get("baseline"), "baseline", prompt)
    raw = number(scoring.score([prompt], [solution_str])[0], "score", prompt)
    return {"score": raw - COEFFICIENT * baseline, "raw": raw, "baseline": baseline}


def number(value: object, what: str, prompt: str) -> float:
    """The value as a float."""
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"prompt {prompt[:80]!r}: its {what} is {value!r}, not a finite number")
