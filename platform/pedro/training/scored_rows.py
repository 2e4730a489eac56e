"""The rows behind a job's scores: prompt, expected answer, answers of the adapter and the bare backbone; limited in
size.

They are a file in the job's folder in the storage (`jobs/<id>/rows.jsonl.gz`), so they are deleted with the job: by
erasure or `pedro gc`. No route serves them.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.training.storage import join, put_file, read_bytes

if TYPE_CHECKING:
    from pedro.evaluation.scoring import Score

FILE = "rows.jsonl.gz"
MOST_ROWS = 5000
MOST_CHARS = 4000  # per text; prompts are cut at the beginning, to keep the question
MOST_BYTES = 64 * 2**20  # uncompressed, when reading a file


@dataclass(frozen=True)
class ScoredRow:
    """One row of the test file, or else of validation. Losses are nats per answer token."""

    prompt: str
    wanted: str
    answer: str
    right: bool
    loss: float
    backbone_answer: str = ""
    backbone_right: bool | None = None
    """None if the backbone was not scored."""
    backbone_loss: float | None = None


def scored_rows(prompts: Iterable[str], wanted: Iterable[str], adapted: Score, bare: Score) -> list[ScoredRow]:
    """The first rows with both scores; none if there are no answers, as for preferences."""
    if not adapted.answers:
        return []
    beside = bare if len(bare.answers) == len(adapted.answers) else None
    rows = []
    for at, (prompt, want, answer) in enumerate(zip(prompts, wanted, adapted.answers, strict=False)):
        if at == MOST_ROWS:
            break
        right, loss, tokens = adapted.each[at]
        row = ScoredRow(prompt[-MOST_CHARS:], want[:MOST_CHARS], answer[:MOST_CHARS], right == 1, loss / max(tokens, 1))
        if beside is not None:
            also, its_loss, count = beside.each[at]
            row = ScoredRow(
                **{
                    **asdict(row),
                    "backbone_answer": beside.answers[at][:MOST_CHARS],
                    "backbone_right": also == 1,
                    "backbone_loss": its_loss / max(count, 1),
                }
            )
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[ScoredRow]) -> None:
    """Compress rows into a file; None if there are none."""
    if rows:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode("utf-8", "replace"), mtime=0))


def keep_rows(storage: str, job_id: str, packed: Path, log: Callable[[str], None]) -> None:
    """Store a job's compressed rows, if it has any. Failures are only logged."""
    if packed.is_file():
        try:
            put_file(str(packed), join(storage, "jobs", job_id, FILE))
        except PedroError as error:
            log(f"the rows behind the scores could not be stored: {error.message}")


def read_rows(storage: str, job_id: str) -> list[ScoredRow]:
    """A job's rows; empty if none were stored. Raises ValueError if the file is damaged or too large."""
    packed = read_bytes(join(storage, "jobs", job_id, FILE))
    if packed is None:
        return []
    try:
        with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"{FILE} contains more than {MOST_BYTES:,} characters")
        return [ScoredRow(**_known(json.loads(line))) for line in text.splitlines() if line]
    except (OSError, EOFError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE} of job {job_id} cannot be read ({type(error).__name__})") from error


def _known(values: Any) -> dict[str, Any]:
    """The row with the fields known to this release."""
    return {name: values[name] for name in ScoredRow.__dataclass_fields__ if name in values}
