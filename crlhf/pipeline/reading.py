"""Rows from the disk or the hub, as a list of dicts: JSON, JSON lines, gzip, CSV, Parquet, saved folders, hub names.

No more is read than `max_rows` asks for: lines of JSON up to the last one that is wanted, and of what `datasets` keeps
on the disk those rows alone. One long JSON list has to be read whole.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..config import DataConfig, UserError
from ..engine.files import first_line
from ..engine.hub import hub_answers

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".parquet")


def read_rows(name: str, split: str = DataConfig.split, max_rows: int = DataConfig.max_rows) -> list[dict]:
    """The first max_rows rows (0: all) of a local file or folder, or of a dataset of the Hugging Face hub."""
    if name.endswith(JSON_SUFFIXES):
        rows = read_json_rows(Path(name), max_rows)
    else:
        rows = read_with_datasets(name, split, max_rows)
    if not rows:
        raise UserError(f"{name} holds no rows", "give a dataset with at least a few hundred")
    return rows


# ---------------------------------------------------------------------------------------------------- JSON


def read_json_rows(path: Path, max_rows: int = 0) -> list[dict]:
    """JSON lines, or one JSON list; gzip by the suffix. A bad line is named by its number."""
    rows = []
    with open_text(path) as file:
        for position, value in json_values(file, path):
            if not isinstance(value, dict):
                problem = f'expected an object like {{"prompt": ...}}, got {type(value).__name__}'
                raise UserError(f"{path}, {position}", f"{problem}; mend or delete it")
            rows.append(value)
            if len(rows) == max_rows:
                break
    return rows


def json_values(file: TextIO, path: Path) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, value): 'line 3' of JSON lines, 'row 3' of a list."""
    may_be_list = True
    for number, line in enumerate(file, 1):  # not splitlines: it also splits at U+2028, which may stand inside a string
        if not line.strip():
            continue
        if may_be_list and line.lstrip().startswith("["):
            for row, value in enumerate(parse_json(line + file.read(), path, number), 1):
                yield f"row {row}", value
            return
        may_be_list = False
        yield f"line {number}", parse_json(line.removesuffix("\n"), path, number)


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A file of text, with or without gzip, a byte-order mark or Windows line ends."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or a device", "give a file, or a name without the ending")
    if not path.is_file():
        raise UserError(f"{path} does not exist", "check the path, or give a Hugging Face dataset name")
    is_gzip = path.suffix == ".gz"
    opener = gzip.open if is_gzip else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        wanted = "UTF-8 text in gzip" if is_gzip else "UTF-8 text"
        raise UserError(f"{path} can't be read", f"{error}; it should be {wanted}") from None


def read_text(path: Path) -> str:
    with open_text(path) as file:
        return file.read()


def parse_json(text: str, path: Path, line: int) -> object:
    """The value of a JSON text that begins in this line of the file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{path}, line {line + error.lineno - 1}", f"{problem}; mend or delete the line") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; a nest of thousands of brackets
        problem = "JSON too large or too deep to read"
        raise UserError(f"{path}, line {line}", f"{problem}; mend or delete the line") from None
    if "\\ud" in text.lower():  # half of an escaped surrogate pair can be neither tokenised nor written: make it '?'
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


# -------------------------------------------------------------------------------- the library `datasets`


def read_with_datasets(name: str, split: str, max_rows: int) -> list[dict]:
    """CSV, Parquet, local dataset folders and hub names."""
    path = Path(name)
    if path.suffix and not path.exists() and name.endswith(SUFFIXES):
        raise UserError(f"{name} does not exist", "check the path, or give a Hugging Face dataset name")
    if path.is_file() and path.suffix not in (".csv", ".parquet"):
        raise UserError(name, f"unknown kind of file '{path.suffix}'; use one of {', '.join(SUFFIXES)}")
    try:
        dataset = load_with_datasets(name, path, split)
        if max_rows:
            dataset = dataset.select(range(min(max_rows, len(dataset))))
        return dataset.to_list()
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: no such name, split or column, no network, bad file
        while error.__cause__ is not None:  # what went wrong, instead of "an error occurred while generating"
            error = error.__cause__
        problem = f"dataset '{name}' (split '{split}') can't be loaded"
        raise UserError(problem, f"{first_line(error)}; check the name and --split") from None


def load_with_datasets(name: str, path: Path, split: str) -> Any:
    """A `datasets.Dataset` on this disk, where the library also keeps what comes from the hub: not in memory yet."""
    import datasets  # slow to import, and files of JSON don't need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if path.is_file() and path.suffix == ".csv":  # the answers 'None' and 'NA' are texts, not missing values
        return datasets.load_dataset("csv", data_files=name, split="train", keep_default_na=False)
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=name, split="train")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"its splits are {', '.join(saved)}")
        return saved[split]
    if path.exists():
        return datasets.load_dataset(name, None, split=split)
    repository, _, subset = name.partition(":")
    hub_answers("datasets", repository)
    return datasets.load_dataset(repository, subset or None, split=split)
