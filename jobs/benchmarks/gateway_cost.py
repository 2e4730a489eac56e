"""What the gateway's own code takes of the processor: authentication, limits, JSON, events. Without a server before it
and without an engine behind it, so that what a gateway takes above that is Serve's and Ray's.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from jobs.benchmarks.model_sizes import PROMPT_TOKENS
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.backend import Delta, GenerateCall
from pedro.store import Store

MODEL = "memory"
TOGETHER = 32


class MemoryBackend:
    """Answers with as many deltas as tokens are asked for, each an event of its own."""

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """A token a delta."""
        count = call.params["max_tokens"]
        for number in range(1, count + 1):
            await asyncio.sleep(0)  # or several deltas would be one event
            last = "length" if number == count else None
            yield Delta(0, " w7", (7,), last, None, PROMPT_TOKENS, number, fingerprint=MODEL)


def own_code(folder: Path, requests: int, events: int) -> dict[str, float]:
    """Microseconds of a request by itself and of each event of its answer: streams of 1 and of `events` events.

    Without the cyclic garbage collector: one full collection takes longer than all that is measured here."""
    gc.collect()
    gc.disable()
    try:
        return asyncio.run(_own_code(folder, requests, events))
    finally:
        gc.enable()


async def _own_code(folder: Path, requests: int, events: int) -> dict[str, float]:
    store = Store(f"sqlite:///{folder / 'store.db'}")
    key = store.create_key("bench", ("infer",), "benchmark")[1]
    backend: Any = MemoryBackend()  # no other method is asked for
    app = create_app(lambda: backend, store, GatewaySettings())
    async with app.router.lifespan_context(app):
        await _ask(app, key, 2, TOGETHER)  # warms up
        one, of_one = await _ask(app, key, 1, requests)
        several, of_several = await _ask(app, key, events, requests)
    store.close()
    event_us = (several - one) / (of_several - of_one)
    return {"fixed_us": round(one - of_one * event_us), "event_us": round(event_us, 1)}


async def _ask(app: Any, key: str, tokens: int, requests: int) -> tuple[float, float]:
    """Microseconds of processor time and events, per request."""
    began, events, rounds = time.process_time(), 0, -(-requests // TOGETHER)
    for _ in range(rounds):
        events += sum(await asyncio.gather(*(_stream(app, key, tokens) for _ in range(TOGETHER))))
    asked = rounds * TOGETHER
    return 1e6 * (time.process_time() - began) / asked, events / asked


async def _stream(app: Any, key: str, tokens: int) -> int:
    """How often one stream was sent something."""
    body = {"model": MODEL, "prompt": [7] * PROMPT_TOKENS, "max_tokens": tokens, "temperature": 0, "stream": True}
    content = json.dumps(body).encode()
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "headers": [
            (b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    asked, events = False, 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await asyncio.Event().wait()  # stays
        asked = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal events
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise RuntimeError(f"HTTP {message['status']}")
        events += b"data: {" in message.get("body", b"")

    await app(scope, receive, send)
    return events
