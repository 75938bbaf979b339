"""Tables of results: Markdown for pages and terminals, CSV for other programs."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..engine.files import write_atomic


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """Names of columns, and lines of cells. A pipe inside a cell is escaped. aligned: padded, for a terminal."""
    table = []
    for cells in (header, *rows):
        table.append([cell.replace("|", "\\|") for cell in cells])
    widths = [3] * len(header)
    if aligned:
        widths = [max(map(len, column)) for column in zip(*table)]
    table.insert(1, ["-" * width for width in widths])
    lines = []
    for cells in table:
        if aligned:
            cells = [cell.ljust(width) for cell, width in zip(cells, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows (dicts with the same keys) as a CSV; numbers keep four digits behind the point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        rounded = dict(row)
        for name, value in row.items():
            if isinstance(value, float):
                rounded[name] = round(value, 4)
        writer.writerow(rounded)
    write_atomic(path, text.getvalue())
