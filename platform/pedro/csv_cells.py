"""CSV that people open in a spreadsheet. Standard library only."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of one


def plain_cell(text: str) -> str:
    """Text that no spreadsheet computes."""
    return f"'{text}" if text.startswith(FORMULA) else text


def csv_table(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A head and a line for each row; numbers as they are, texts as plain cells."""
    columns = list(columns)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = (row[name] for name in columns)
        writer.writerow([plain_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return stream.getvalue()
