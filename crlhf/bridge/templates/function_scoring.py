"""The reward of a response: what a function in given_reward.py, beside this file, returns for it.

given_reward.py is the file that the run had as --reward FILE.py:FUNCTION, copied.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FUNCTION = "score"

spec = spec_from_file_location("given_reward", Path(__file__).with_name("given_reward.py"))
given_reward = module_from_spec(spec)
spec.loader.exec_module(given_reward)


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """One reward for each pair of texts."""
    return [float(reward) for reward in getattr(given_reward, FUNCTION)(list(prompts), list(responses))]
