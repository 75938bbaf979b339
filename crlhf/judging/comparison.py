"""The folder of a comparison: its key, and the salt that keeps the pairs blind.

Ids and the order of A and B are hashes of a random salt and the number of a row: whoever has the page, both policies'
responses and this code can compute neither. The salt stays in key.json, so a comparison that was stopped goes on.
"""

import secrets
from pathlib import Path

from ..config import JudgeConfig
from ..engine.files import read_json

KEY_NAMES = {"of", "against", "seed", "pairs"}


def read_key(out: Path) -> dict:
    """The key.json of a comparison, or {} if there is none of ours."""
    try:
        key = read_json(out / "key.json")
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(key, dict) and KEY_NAMES <= set(key)
    return key if is_ours else {}


def salt_for(config: JudgeConfig, key: dict) -> str:
    """The salt of the folder's key if that is of the same comparison, else a new one."""
    settings = (config.of, config.against, config.seed)
    kept = (key.get("of"), key.get("against"), key.get("seed"))
    if settings == kept and "salt" in key:
        return key["salt"]
    return secrets.token_hex(16)
