"""Rows of a batch: reads and validates them from its file, and formats its answers. Pure functions.

Reference: https://platform.openai.com/docs/api-reference/batch/request-input and .../batch/request-output
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pedro.data.files import BOM

if TYPE_CHECKING:
    from pedro.gateway.in_process import Reply

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]  # of every row
FIELDS = ("custom_id", "method", "url", "body")
MAX_ROWS = 50_000
MAX_CUSTOM_ID = 512  # characters
MAX_SHOWN = 80
BLOCK = 1 << 18


@dataclass(frozen=True)
class BatchRow:
    line: int
    custom_id: str
    model: str
    body: bytes  # JSON, as a client sends it


@dataclass(frozen=True)
class RowMistake:
    """Why a file cannot be a batch; `line` None: the error is not in a single line."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Wrong(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.message, self.param = code, message, param


def read_rows(stream: BinaryIO, endpoint: str, max_bytes: int) -> Iterator[BatchRow | RowMistake]:
    """Each non-blank line, as a row or as its mistake."""
    seen: set[bytes] = set()
    for number, line in _lines(stream, max_bytes):
        try:
            yield _row(number, line, endpoint, max_bytes, seen)
        except _Wrong as wrong:
            yield RowMistake(wrong.code, wrong.message, number, wrong.param)


def answer_line(batch_id: str, row: BatchRow, reply: Reply, request_id: str) -> str:
    """The line of an answered row, for the output file."""
    response = {"status_code": reply.status, "request_id": request_id, "body": reply.json()}
    return _line(batch_id, row, response, None)


def unasked_line(batch_id: str, row: BatchRow, code: str, message: str) -> str:
    """The line of an unanswered row, for the error file."""
    return _line(batch_id, row, None, {"code": code, "message": message})


def _line(batch_id: str, row: BatchRow, response: dict[str, Any] | None, error: dict[str, Any] | None) -> str:
    number = hashlib.sha256(f"{batch_id}:{row.line}".encode()).hexdigest()[:24]
    line = {"id": f"batch_req_{number}", "custom_id": row.custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False)


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines; lines over the limit are truncated just beyond it."""
    number, kept = 1, b""
    while block := stream.read(BLOCK):
        first, *rest = block.split(b"\n")
        kept = (kept + first)[: max_bytes + 1]
        for more in rest:
            if kept.strip():
                yield number, kept
            number, kept = number + 1, more[: max_bytes + 1]
    if kept.strip():
        yield number, kept


def _row(number: int, line: bytes, endpoint: str, max_bytes: int, seen: set[bytes]) -> BatchRow:
    from pydantic_core import from_json

    if len(line) > max_bytes:
        raise _Wrong("line_too_large", f"the line is larger than {max_bytes:,} bytes")
    try:
        value = from_json(line.removeprefix(BOM) if number == 1 else line, allow_inf_nan=False)
    except ValueError as error:
        raise _Wrong("invalid_json_line", f"the line is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _Wrong("invalid_json_line", "the line must be a JSON object")
    if unknown := sorted(value.keys() - set(FIELDS)):
        message = f"{_shown(unknown[0])} is not a field of a row; known: {', '.join(FIELDS)}"
        raise _Wrong("unknown_parameter", message, unknown[0][:MAX_SHOWN])
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        message = f"custom_id: expected 1 to {MAX_CUSTOM_ID} characters, got {_shown(custom_id)}"
        raise _Wrong("missing_custom_id" if custom_id is None else "invalid_custom_id", message, "custom_id")
    digest = hashlib.sha256(custom_id.encode(errors="replace")).digest()[:16]
    if digest in seen:
        message = f"custom_id: {_shown(custom_id)} was used by an earlier line; it must be unique"
        raise _Wrong("duplicate_custom_id", message, "custom_id")
    seen.add(digest)
    if value.get("method") != "POST":
        raise _Wrong("invalid_method", f'method: expected "POST", got {_shown(value.get("method"))}', "method")
    if value.get("url") != endpoint:
        message = f'url: expected "{endpoint}", the endpoint of the batch, got {_shown(value.get("url"))}'
        raise _Wrong("invalid_url", message, "url")
    body = value.get("body")
    if not isinstance(body, dict):
        raise _Wrong("invalid_body", f"body: expected an object, got {_shown(body)}", "body")
    model = body.get("model")
    if not isinstance(model, str):
        raise _Wrong("missing_model", f"body.model: expected a model's name, got {_shown(model)}", "body.model")
    if body.get("stream"):
        raise _Wrong("stream_not_supported", "body.stream: batches do not stream; leave it out", "body.stream")
    return BatchRow(number, custom_id, model, json.dumps(body).encode())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
