"""Batches for the gateway's tests: rows, files, and what came of them, with the official openai client."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from gateway_backend import BACKBONE

if TYPE_CHECKING:
    import openai
    from gateway_server import Gateway
    from openai.types import Batch

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCOPES = ("infer", "train")
LONG = 8  # tokens: more than a backend gives while it is held
OVER = ("completed", "failed", "expired", "cancelled")
ODD, EVEN = ([f"r{number}" for number in range(20) if number % 2 == odd] for odd in (1, 0))
T = TypeVar("T")


def row(name: str, tokens: int = 1, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"messages": [{"role": "user", "content": name}]} if url == CHAT else {"prompt": name}
    body = {"model": BACKBONE, **given, "max_tokens": tokens, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def upload(client: openai.OpenAI, rows: list[Any], purpose: str = "batch") -> str:
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows)
    return client.files.create(file=("rows.jsonl", io.BytesIO(text.encode())), purpose=purpose).id  # type: ignore[arg-type]


def begin(client: openai.OpenAI, rows: list[Any], url: str = COMPLETIONS, **more: Any) -> Batch:
    asked: dict[str, Any] = {"endpoint": url, "completion_window": "24h", **more}
    return client.batches.create(input_file_id=upload(client, rows), **asked)


def until(condition: Callable[[], T | None]) -> T:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
    return found


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    def look() -> Batch | None:
        now = client.batches.retrieve(batch.id)
        return now if now.status in OVER else None

    return until(look)


def answers(client: openai.OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    """The lines of a file by custom_id, of which none is there twice."""
    if file_id is None:
        return {}
    lines = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def half_answered(gateway: Gateway, client: openai.OpenAI, rows: int = 20) -> Batch:
    """A batch of which half of the rows are answered, and the others are held."""
    gateway.backend.allowed = 2
    made = begin(client, [row(f"r{number}", 1 if number % 2 else LONG) for number in range(rows)])
    until(lambda: counts(client.batches.retrieve(made.id))[1] == rows // 2)
    return made
