"""What a benchmark gives out: a table, the targets, one JSON line, and a file that carries its provenance.

Plain text, so that it reads the same in a log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.benchmarks.stats import Ratio
from pedro.provenance import provenance

ReportRow = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A promise and its measure: met when the value keeps it, unclear while its 95 % interval holds the target."""

    name: str
    target: float
    measured: Ratio
    at_most: bool = False

    @property
    def met(self) -> bool:
        value = self.measured.value
        return value <= self.target if self.at_most else value >= self.target

    @property
    def unclear(self) -> bool:
        return self.measured.low < self.target < self.measured.high

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "target": f"{'<=' if self.at_most else '>='} {self.target:g}",
            "value": round(self.measured.value, 4),
            "interval": self.measured.interval,
            "met": self.met,
            "unclear": self.unclear,
        }


def exactly(value: float) -> Ratio:
    """A figure that was measured once."""
    return Ratio(value, value, value)


@dataclass
class BenchmarkReport:
    """The outcome of one benchmark. `facts` are figures that are neither a row nor a target."""

    name: str
    settings: Mapping[str, Any]
    rows: list[ReportRow] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "targets": [target.as_dict() for target in self.targets],
            "skipped": self.skipped,
            **self.facts,
        }

    def save(self, path: Path, code: Mapping[str, str | None]) -> None:
        """Write the report with its provenance, whole or not at all; `code` is its state when measuring began."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".new")
        whole = {"benchmark": self.name, **provenance(code), "settings": dict(self.settings), **self.as_dict()}
        scratch.write_text(json.dumps(whole, indent=2) + "\n")
        scratch.rename(path)

    def show(self, columns: Sequence[str]) -> str:
        """Rows and targets as tables; `columns` names the rows' keys to show."""
        parts = [table(columns, [[_cell(row.get(column)) for column in columns] for row in self.rows])]
        if self.targets:
            lines = [target.as_dict() for target in self.targets]
            heads = ("name", "target", "value", "interval", "met", "unclear")
            parts.append(table(heads, [[_cell(line[head]) for head in heads] for line in lines]))
        parts += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n\n".join(parts)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(text) for text in column) for column in zip(heads, *lines, strict=True)]

    def draw(line: Sequence[str]) -> str:
        cells = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([draw(heads), draw(["-" * width for width in widths]), *map(draw, lines)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, list):
        return "–".join(_cell(float(part)) for part in value)
    return str(value)
