"""What the demo does over HTTP: ask questions, and keep asking while an adapter is swapped.

It sees only what a tenant sees: no training, no registry, no Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from pedro.errors import PedroError

if TYPE_CHECKING:
    from pedro.demo.questions import Messages

CONCURRENCY = 16
MAX_TOKENS = 32  # the longest answer and its end, or a sentence around it
TIMEOUT_S = 120
PATIENCE_S = 120.0  # a machine so slow that nothing was answered in the time meant for it is waited for


@dataclass
class Swap:
    """What the load saw of one hot swap. Times are seconds from the call that moved the alias."""

    requests: int = 0
    failed: int = 0
    mixed: int = 0
    in_flight: int = 0
    seconds_to_first_new: float | None = None
    answers: Counter[str] = field(default_factory=Counter)


def answers(url: str, key: str, model: str, asked: Sequence[Messages | str]) -> list[str]:
    """What `model` answers to each of `asked`, greedy, over `/v1/chat/completions`.

    A text is continued to the end of its line instead, over `/v1/completions`.
    """
    return asyncio.run(_answers(url, key, model, asked))


def promote(url: str, admin_key: str, model: str, version: int) -> None:
    """Make `version` the one that `model` means, for whoever asks next."""
    asyncio.run(_promote(url, admin_key, model, version))


def swap_under_load(
    url: str, key: str, admin_key: str, model: str, version: int, asked: Sequence[Messages], seconds: float = 6.0
) -> Swap:
    """Promote `version` of `model` while streams run; every stream must end well and come from one version."""
    return asyncio.run(_swap_under_load(url, key, admin_key, model, version, asked, seconds))


async def _answers(url: str, key: str, model: str, asked: Sequence[Messages | str]) -> list[str]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with _client(url, key) as client:

        async def answer(question: Messages | str) -> str:
            chat = not isinstance(question, str)
            body: dict[str, Any] = {"messages": list(question)} if chat else {"prompt": question, "stop": "\n"}
            async with gate:
                reply = await client.post(f"/v1/{'chat/' if chat else ''}completions", json=_body(model, body))
            if reply.status_code != 200:
                raise PedroError(f"{model}: the server answered {reply.status_code}: {reply.text[:300]}")
            choice = reply.json()["choices"][0]
            text: str = choice["message"]["content"] if chat else choice["text"]
            return text

        return await asyncio.gather(*(answer(question) for question in asked))


async def _swap_under_load(
    url: str, key: str, admin_key: str, model: str, version: int, asked: Sequence[Messages], seconds: float
) -> Swap:
    seen = Swap()
    running: set[int] = set()
    moved: float | None = None
    stop_at = time.monotonic() + seconds
    give_up_at = stop_at + PATIENCE_S
    async with _client(url, key) as client:

        async def stream(number: int) -> None:
            while (now := time.monotonic()) < stop_at or (seen.seconds_to_first_new is None and now < give_up_at):
                running.add(number)
                seen.requests += 1
                prints: set[str] = set()
                try:
                    body = _body(model, {"messages": list(asked[seen.requests % len(asked)])}, stream=True)
                    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                        lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
                    ok = reply.status_code == 200 and bool(lines) and lines[-1] == "data: [DONE]"
                    prints = {part["system_fingerprint"] for part in map(_event, lines[:-1]) if part.get("choices")}
                except (httpx.HTTPError, ValueError, KeyError):
                    ok = False
                running.discard(number)
                seen.failed += not ok
                seen.mixed += len(prints) > 1
                for fingerprint in prints:
                    if moved is not None and fingerprint not in seen.answers and seen.seconds_to_first_new is None:
                        seen.seconds_to_first_new = round(time.monotonic() - moved, 3)
                    seen.answers[fingerprint] += 1

        load = asyncio.gather(*(stream(number) for number in range(CONCURRENCY)))
        try:
            await asyncio.sleep(seconds / 3)
            while not seen.answers and time.monotonic() < give_up_at:
                await asyncio.sleep(0.05)
            moved, seen.in_flight = time.monotonic(), len(running)
            await _promote(url, admin_key, model, version)
            await load
        finally:
            load.cancel()
    return seen


async def _promote(url: str, admin_key: str, model: str, version: int) -> None:
    async with _client(url, admin_key) as admin:
        reply = await admin.post(f"/v1/adapters/{model}/promote", json={"version": version})
    if reply.status_code != 200:
        raise PedroError(f"{model}: promote answered {reply.status_code}: {reply.text[:300]}")


def _client(url: str, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=TIMEOUT_S)


def _body(model: str, asked: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    return {"model": model, **asked, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": stream}


def _event(line: str) -> dict[str, Any]:
    import json

    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return event
