"""The rows behind a job's scores: prompt, expected answer, answers of the adapter and the bare backbone; bounded.

They are a file of the job's folder in the storage (`jobs/<id>/rows.jsonl.gz`), so they go with the job: at erasure, at
`pedro gc`. No route serves them.
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
MOST_CHARS = 4000  # of a text; of a prompt its end is kept, which holds the question
MOST_BYTES = 64 * 2**20  # unpacked, of a file that is read back


@dataclass(frozen=True)
class ScoredRow:
    """One row of the test file, or of validation where there is none. Losses are nats of an answer token."""

    prompt: str
    wanted: str
    answer: str
    right: bool
    loss: float
    backbone_answer: str = ""
    backbone_right: bool | None = None
    """None where the backbone was not asked."""
    backbone_loss: float | None = None


def scored_rows(prompts: Iterable[str], wanted: Iterable[str], adapted: Score, bare: Score) -> list[ScoredRow]:
    """The first rows with both scores; none where answers were not kept, as of preferences."""
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
    """Pack rows into a file; none where there are none."""
    if rows:
        text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode("utf-8", "replace"), mtime=0))


def keep_rows(storage: str, job_id: str, packed: Path, log: Callable[[str], None]) -> None:
    """Put a job's packed rows into the storage, if it has any. Where that fails, the job goes on, and says so."""
    if packed.is_file():
        try:
            put_file(str(packed), join(storage, "jobs", job_id, FILE))
        except PedroError as error:
            log(f"the rows behind the scores are not kept: {error.message}")


def read_rows(storage: str, job_id: str) -> list[ScoredRow]:
    """A job's rows; none where none were kept. Raises ValueError for a file that is broken or too large."""
    packed = read_bytes(join(storage, "jobs", job_id, FILE))
    if packed is None:
        return []
    try:
        with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"{FILE} holds more than {MOST_BYTES:,} characters")
        return [ScoredRow(**_known(json.loads(line))) for line in text.splitlines() if line]
    except (OSError, EOFError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{FILE} of job {job_id} cannot be read ({type(error).__name__})") from error


def _known(values: Any) -> dict[str, Any]:
    """The fields that this release knows."""
    return {name: values[name] for name in ScoredRow.__dataclass_fields__ if name in values}
