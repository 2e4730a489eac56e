"""The rows behind a job's scores: filters, counts, a confusion matrix, the test of two versions, a file to download.

Rows are a tenant's own data: its own readers see them, and operators; they leave by a download alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pedro.csv_cells import csv_table
from pedro.errors import PedroError
from pedro.training.paired_test import PairedTest, compare_rows
from pedro.training.scored_rows import ScoredRow, read_rows
from sources.view import without_places

if TYPE_CHECKING:
    from pedro.config import Settings

ALL, RIGHT, WRONG, GAINED, LOST = "All", "Right", "Wrong", "Gained over the backbone", "Lost to the backbone"
DIFFER = "The two differ"
FILTERS = (ALL, WRONG, RIGHT, GAINED, LOST)
MOST_LABELS = 40  # of a confusion matrix; more wanted answers are no labels
COLUMNS = (
    *("prompt", "wanted", "answer", "right", "loss", "backbone_answer", "backbone_right", "backbone_loss"),
    *("other_answer", "other_right"),
)


@dataclass(frozen=True)
class Compared:
    """A row, and what another version answered to the same prompt."""

    row: ScoredRow
    other: ScoredRow | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a line of a table."""
        other = self.other
        beside = {"other_answer": other.answer if other else None, "other_right": other.right if other else None}
        return {**asdict(self.row), **beside}


def rows_of(settings: Settings, job_id: str) -> tuple[list[ScoredRow], str]:
    """A job's rows, or why they cannot be read."""
    try:
        return read_rows(settings.storage, job_id), ""
    except (PedroError, ValueError, OSError) as error:
        return [], without_places(settings, error.message if isinstance(error, PedroError) else str(error))


def beside(rows: Sequence[ScoredRow], others: Sequence[ScoredRow]) -> list[Compared]:
    """Rows beside those of another version that ask the same and want the same."""
    by_question: dict[tuple[str, str], ScoredRow] = {}
    for other in others:
        by_question.setdefault((other.prompt, other.wanted), other)
    return [Compared(row, by_question.get((row.prompt, row.wanted))) for row in rows]


def chosen(rows: Sequence[Compared], kind: str, text: str = "", wanted: str = "") -> list[Compared]:
    """Those of a kind whose texts hold every word of `text`, and that want this answer, if one is named."""
    words = text.lower().split()
    tests: dict[str, Callable[[Compared], bool]] = {
        ALL: lambda _: True,
        RIGHT: lambda each: each.row.right,
        WRONG: lambda each: not each.row.right,
        GAINED: lambda each: each.row.right and each.row.backbone_right is False,
        LOST: lambda each: not each.row.right and each.row.backbone_right is True,
        DIFFER: lambda each: each.other is not None and each.other.right != each.row.right,
    }
    kept = tests[kind]
    return [
        each
        for each in rows
        if kept(each)
        and (not wanted or each.row.wanted == wanted)
        and all(word in f"{each.row.prompt} {each.row.wanted} {each.row.answer}".lower() for word in words)
    ]


def confusion(rows: Sequence[ScoredRow]) -> list[dict[str, Any]]:
    """How often which label was answered where which was wanted; nothing where answers are no labels.

    An answer that is none of the wanted ones counts as "something else".
    """
    labels = {row.wanted.strip() for row in rows}
    if not 2 <= len(labels) <= MOST_LABELS or len(rows) < 2 * len(labels):
        return []
    cells = Counter(
        (row.wanted.strip(), row.answer.strip() if row.answer.strip() in labels else "something else") for row in rows
    )
    return [{"wanted": wanted, "answer": answer, "rows": count} for (wanted, answer), count in sorted(cells.items())]


def against_backbone(rows: Sequence[ScoredRow]) -> PairedTest | None:
    """McNemar's exact test of the adapter against the bare backbone; None where that was not asked."""
    asked = [row for row in rows if row.backbone_right is not None]
    return compare_rows(
        "accuracy",
        [(float(row.right), 0.0, 1) for row in asked],
        [(float(bool(row.backbone_right)), 0.0, 1) for row in asked],
    )


def against_other(rows: Sequence[Compared]) -> PairedTest | None:
    """The same against the other version, on the rows that both answered."""
    both = [(each.row, each.other) for each in rows if each.other is not None]
    return compare_rows(
        "accuracy",
        [(float(row.right), 0.0, 1) for row, _ in both],
        [(float(other.right), 0.0, 1) for _, other in both],
    )


def columns(rows: Sequence[Compared]) -> list[str]:
    """Those that say something of any row."""
    told = [each.to_dict() for each in rows]
    return [name for name in COLUMNS if any(row[name] not in (None, "") and row[name] == row[name] for row in told)]


def as_csv(rows: Sequence[Compared]) -> str:
    """A line a row; texts that a spreadsheet would compute are kept from it."""
    return csv_table(columns(rows), (each.to_dict() for each in rows))
