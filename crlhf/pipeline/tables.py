"""Tables of results: Markdown for pages and terminals, CSV for other programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..engine.files import write_atomic


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """Names of columns, and lines of cells. A pipe inside a cell is escaped. aligned: padded, for a terminal."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [3] * len(lines[0])
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows (dicts with the same keys) as a CSV; numbers keep four digits behind the point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: rounded(value) for name, value in row.items()})
    write_atomic(path, text.getvalue())


def rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
