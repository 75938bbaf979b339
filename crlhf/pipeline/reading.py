"""Rows from the disk or the hub, as a list of dicts: JSON, JSON lines, gzip, CSV, Parquet, saved folders, hub names."""

import gzip
import json
import zlib
from pathlib import Path

from ..config import DataConfig, UserError
from ..engine.files import first_line
from ..engine.hub import hub_answers

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")


def read_rows(name: str, split: str = DataConfig.split, max_rows: int = DataConfig.max_rows) -> list[dict]:
    """A list of dicts from a local file or folder, or from a dataset of the Hugging Face hub."""
    path = Path(name)
    if name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        rows = read_json_rows(path)
    else:
        rows = read_with_datasets(name, path, split)
    rows = rows[:max_rows] if max_rows else rows
    if not rows:
        raise UserError(f"{name} holds no rows: give a dataset with at least a few hundred")
    return rows


def read_json_rows(path: Path) -> list[dict]:
    """JSON lines, or one JSON list; gzip by the suffix. A bad line is named by its number."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        place, rows = "row", dict(enumerate(parse_json(text, path, 1), 1))
    else:  # not splitlines: it also splits at U+2028 and others, which may stand inside a JSON string
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        place, rows = "line", {number: parse_json(line, path, number) for number, line in lines}
    for number, row in rows.items():
        if not isinstance(row, dict):
            what = f'expected an object like {{"prompt": ...}}, got {type(row).__name__}'
            raise UserError(f"{path}, {place} {number}: {what}; mend or delete it")
    return list(rows.values())


def read_text(path: Path) -> str:
    """The text of a file, with or without gzip, a byte-order mark or Windows line ends."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device: give a file, or a name without the ending")
    if not path.is_file():
        raise UserError(f"{path} does not exist: check the path, or give a Hugging Face dataset name")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        wanted = "UTF-8 text in gzip" if path.suffix == ".gz" else "UTF-8 text"
        raise UserError(f"{path} can't be read: {error}; it should be {wanted}") from None


def parse_json(text: str, path: Path, line: int) -> object:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{path}, line {line + error.lineno - 1}: {what}; mend or delete the line") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a nest of thousands of brackets
        raise UserError(f"{path}, line {line}: JSON too large or too deep to read; mend or delete the line") from None
    if "\\ud" in text.lower():  # half of an escaped surrogate pair can be neither tokenised nor written: make it '?'
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def read_with_datasets(name: str, path: Path, split: str) -> list[dict]:
    """CSV, Parquet, local dataset folders and hub names, all through the `datasets` library."""
    import datasets  # slow to import, and files of JSON don't need it

    if path.suffix and not path.exists() and name.endswith(SUFFIXES):
        raise UserError(f"{name} does not exist: check the path, or give a Hugging Face dataset name")
    if path.is_file() and path.suffix not in (".csv", ".parquet"):
        raise UserError(f"{name}: unknown kind of file '{path.suffix}'; use one of {', '.join(SUFFIXES)}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if path.suffix == ".csv" and path.is_file():  # the answers 'None' and 'NA' are texts, not missing values
            rows = datasets.load_dataset("csv", data_files=name, split="train", keep_default_na=False)
        elif path.is_file():
            rows = datasets.load_dataset("parquet", data_files=name, split="train")
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    raise ValueError(f"its splits are {', '.join(rows)}")
                rows = rows[split]
        else:
            dataset, _, subset = (name, "", "") if path.exists() else name.partition(":")
            if not path.exists():
                hub_answers("datasets", dataset)
            rows = datasets.load_dataset(dataset, subset or None, split=split)
        return rows.to_list()
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: no such name, split or column, no network, bad file
        while error.__cause__ is not None:  # what went wrong, instead of "an error occurred while generating"
            error = error.__cause__
        what = f"dataset '{name}' (split '{split}') can't be loaded: {first_line(error)}"
        raise UserError(f"{what}; check the name and --split") from None
