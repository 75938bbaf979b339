"""The folder of a comparison: its key, the salt that keeps the pairs blind, and what in it is ours.

Ids and the order of A and B are hashes of a random salt and the number of a row: whoever has the page, both policies'
responses and this code can compute neither. The salt stays in key.json, so a comparison that was stopped goes on.
key.json is written before all else: a folder without it is not ours, whatever its files are called. Once raters have a
page, its pairs and key stay, and answers are read against them, whatever the run has become.
"""

import secrets
from pathlib import Path

from ..config import JudgeConfig, UserError
from ..engine.files import json_object, write_atomic, write_json, write_jsonl
from ..pipeline.reading import read_json_rows
from .pairs import RUBRIC, make_pairs
from .people import comparison_of

KEY_FIELDS = {"of": str, "against": str, "seed": int, "pairs": list}
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
    """{of, against, seed, pairs, ...} of the folder's key.json, or {} if there is none of ours."""
    key = json_object(out / "key.json")
    is_ours = all(isinstance(key.get(name), kind) for name, kind in KEY_FIELDS.items())
    return key if is_ours else {}


def read_comparison(out: Path) -> tuple[list[dict], dict]:
    """(pairs, key) as the folder holds them."""
    key = read_key(out)
    if not key:
        raise UserError(f"{out} holds no comparison", "give the folder of the page that was sent by --out")
    pairs = read_json_rows(out / "pairs.jsonl")
    if len(pairs) != len(key["pairs"]) or not all(map(is_key_to, key["pairs"], pairs)):
        mend = "put back the files that lay beside the page"
        raise UserError(f"{out / 'pairs.jsonl'} and key.json are not of one comparison", mend)
    return pairs, key


def is_key_to(entry: object, pair: dict) -> bool:
    """Does this entry of the key say who wrote what in this pair?"""
    if not isinstance(entry, dict) or entry.get("id") != pair.get("id"):
        return False
    policies = [entry.get("a"), entry.get("b")]
    is_known = isinstance(entry.get("gold_gap"), int | float | None)
    are_texts = all(isinstance(pair.get(name), str) for name in ("id", "prompt", "a", "b"))
    return are_texts and is_known and policies in (["of", "against"], ["against", "of"])


def write_comparison(
    rows: list[dict], other_rows: list[dict], config: JudgeConfig, out: Path
) -> tuple[list[dict], dict]:
    """Make the pairs and their key, and write them; refuse to replace those of a page that raters have."""
    old_key = read_key(out)
    key = {"of": config.of, "against": config.against, "seed": config.seed}
    is_same = all(old_key.get(name) == value for name, value in key.items())
    key["salt"] = old_key["salt"] if is_same and "salt" in old_key else secrets.token_hex(16)
    pairs, key["pairs"] = make_pairs(rows, other_rows, config.prompts, config.seed, key["salt"])
    if config.by == "people":
        key["sent"] = comparison_of(pairs)
    if "sent" in old_key or (out / "people.html").exists():
        if old_key.get("sent") != comparison_of(pairs):
            raise UserError(f"{out} holds a page for raters, made with other pairs", "choose another --out")
        key = old_key
    write_json(out / "key.json", key)  # before the pairs: a stop in between must not lose the salt
    write_jsonl(out / "pairs.jsonl", pairs)
    return pairs, key


def write_rubric(path: Path, rubric: str) -> None:
    """Keep what judges were told. One that was edited in its place is somebody's work, and stays."""
    held = path.read_text(encoding="utf-8", errors="replace") if path.exists() else RUBRIC
    if held not in (rubric, RUBRIC):
        mend = "move it away, give it by --judge-rubric, or choose another --out"
        raise UserError(f"{path} holds another rubric", mend)
    write_atomic(path, rubric)
