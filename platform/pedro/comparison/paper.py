"""What a paper reports for the same methods and tasks, as the spec carries it: shown beside, never mixed with ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    """Numbers as printed in `table` of `source`; None where the paper has none."""

    source: str
    table: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, float | None]]
    note: str = ""

    @property
    def title(self) -> str:
        return f"As reported in the paper ({', '.join(part for part in (self.source, self.table) if part)})"

    def value(self, label: str, column: str) -> float | None:
        """The paper's number; None where it has none."""
        return self.rows.get(label, {}).get(column)


def parse_paper(block: Any) -> Paper | None:
    """A `paper` block: source, table, columns, rows by label. Raises ValueError that says what is wrong with it."""
    if block is None:
        return None
    if not isinstance(block, Mapping) or not isinstance(block.get("rows"), Mapping):
        raise ValueError("paper: expected source, table, columns and rows by method")
    rows = {str(label): _row(label, row) for label, row in block["rows"].items()}
    named = dict.fromkeys(column for row in rows.values() for column in row)
    columns = tuple(map(str, block.get("columns") or named))
    if unknown := [column for column in named if column not in columns]:
        raise ValueError(f"paper.rows: {', '.join(unknown)} not in paper.columns ({', '.join(columns)})")
    source, table, note = (str(block.get(key) or "") for key in ("source", "table", "note"))
    return Paper(source, table, columns, rows, note)


def _row(label: Any, row: Any) -> dict[str, float | None]:
    if not isinstance(row, Mapping):
        raise ValueError(f"paper.rows.{label}: expected a number for each column")
    for column, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"paper.rows.{label}.{column}: expected a number or null, got {value!r}")
    return {str(column): value for column, value in row.items()}
