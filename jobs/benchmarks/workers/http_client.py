"""A tenant's client: streams over HTTP from a server that runs elsewhere, and notes when tokens come. Needs httpx."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from jobs.benchmarks.http_costs import ProcessorTime
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.timeline import Timeline


class HttpClient:
    """Set-up: size, url, key, model. A run streams the order's prompts at once; `callers` are others than the set-up's,
    a model and a key for each prompt; `home` is the server's, whose processes' time is to be told."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._size, self._model = MODEL_SIZES[setup["size"]], setup["model"]
        self._url, self._key = setup["url"], setup["key"]

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """Figures of Timeline, the events that brought tokens, and the processor time that all this took of the client.
        A slice of the stream may bring several tokens, which count from when they came."""
        return asyncio.run(self._run(order))

    async def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        asked = prompts(self._size, order["batch"], order["prompt"], order["seed"])
        callers = order.get("callers") or [(self._model, self._key)] * len(asked)
        limits = httpx.Limits(max_connections=len(asked), max_keepalive_connections=len(asked))
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=300) as client:
            await asyncio.gather(*(client.get("/health") for _ in asked))  # connections are open before time is taken
            watched = ProcessorTime(Path(order["home"])) if "home" in order else None
            before = watched.read() if watched is not None else Counter[str]()
            timeline, cpu_s = Timeline(), time.process_time()
            streams = enumerate(zip(asked, callers, strict=True))
            await asyncio.gather(
                *(_stream(client, str(i), ids, caller, order["new"], timeline) for i, (ids, caller) in streams)
            )
            used: dict[str, Any] = {"events": timeline.events, "cpu_s": time.process_time() - cpu_s}
            if watched is not None:
                used["seconds"] = await watched.since(before)
        return {**timeline.figures(), **timeline.tails(), **used}


async def _stream(
    client: httpx.AsyncClient, name: str, ids: list[int], caller: tuple[str, str], new: int, timeline: Timeline
) -> None:
    model, key = caller
    body = {"model": model, "prompt": ids, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"HTTP {reply.status_code}: {(await reply.aread()).decode()[:300]}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                _take(json.loads(line.removeprefix("data: ")), name, timeline)


def _take(event: dict[str, Any], name: str, timeline: Timeline) -> None:
    """Count an event's tokens, one a word: every token of the benchmark's tokenizer is a word of its own."""
    if "error" in event:
        raise RuntimeError(str(event["error"]))
    words = sum(len(choice["text"].split()) for choice in event["choices"])
    if words:
        timeline.take(name, words)
