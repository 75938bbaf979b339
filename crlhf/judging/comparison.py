"""The folder of a comparison: its key, the salt that keeps the pairs blind, and what in it is ours.

Ids and the order of A and B are hashes of a random salt and the number of a row: whoever has the page, both policies'
responses and this code can compute neither. The salt stays in key.json, so a comparison that was stopped goes on.
key.json is written before all else: a folder without it is not ours, whatever its files are called.
"""

import secrets
from pathlib import Path

from ..config import JudgeConfig, UserError
from ..engine.files import read_json, write_atomic
from .pairs import RUBRIC

KEY_NAMES = {"of", "against", "seed", "pairs"}
KEY_START = b'{\n  "of":'
REPORTS = ("judge.csv", "judge.md", "judge.png", "judge.tmp.png")
WRITTEN = ("key.json", "pairs.jsonl", "rubric.txt", "answers.jsonl", "people.html", *REPORTS)


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else than a comparison, or links and folders where its files go."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file", "choose a folder")
    for name in WRITTEN:
        for path in (out / name, out / f"{name}.tmp"):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                what = f"{path} is a link or a folder where a file of this comparison goes"
                raise UserError(what, "move it away")
    foreign = [path for path in out.glob("*") if path.name != ".lock" and not is_half_written(path)]
    if foreign and not read_key(out):
        raise UserError(f"--out {out} holds other things than a comparison", "choose an empty or new folder")


def is_half_written(path: Path) -> bool:
    """Is it what a stop leaves before the key is whole?"""
    if path.suffix != ".tmp" or path.stem not in WRITTEN:
        return False
    start = path.read_bytes()[: len(KEY_START)]
    return KEY_START.startswith(start)


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


def write_rubric(path: Path, rubric: str) -> None:
    """Keep what judges were told. One that was edited in its place is somebody's work, and stays."""
    held = path.read_text(encoding="utf-8", errors="replace") if path.exists() else RUBRIC
    if held not in (rubric, RUBRIC):
        mend = "move it away, give it by --judge-rubric, or choose another --out"
        raise UserError(f"{path} holds another rubric", mend)
    write_atomic(path, rubric)
