"""A gateway's view of names, alone in a process: follows the store, and says what following costs and when it heard.

`python -m jobs.benchmarks.workers.catalogue`, with the settings in its environment. Each line on standard input is a
command as JSON, each line on standard output its answer.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import psutil

from pedro.config import Settings
from pedro.errors import PedroError
from pedro.gateway.backend import ALL_TENANTS
from pedro.registry import Registry
from pedro.serving.resolver import ModelResolver

LOOK_S = 0.002
INTERVAL_S = 0.5
TOGETHER = 400
BACKBONE = "sha256:" + "b" * 64


async def main() -> None:
    """Answer commands until standard input ends."""
    resolver = ModelResolver(Registry.open(Settings.from_env()), "b", BACKBONE, interval_s=INTERVAL_S)
    await resolver.refresh()
    watching = asyncio.create_task(resolver.watch())
    answers: dict[str, Callable[..., Awaitable[Any]]] = {"warm": warm, "idle": idle, "moves": moves}
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        answer = await answers[command.pop("do")](resolver, **command)
        print(json.dumps(answer), flush=True)
    watching.cancel()


async def warm(resolver: ModelResolver, names: list[str]) -> dict[str, Any]:
    """Ask for every name once: how long that took, and how much memory knowing them takes."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    for start in range(0, len(names), TOGETHER):
        await asyncio.gather(*(resolver.resolve(ALL_TENANTS, name) for name in names[start : start + TOGETHER]))
    after = process.memory_info().rss
    return {"seconds": time.perf_counter() - began, "mib": (after - before) / 2**20, "rss_mib": after / 2**20}


async def idle(resolver: ModelResolver, seconds: float) -> dict[str, float]:
    """Do nothing but follow: the share of a core that it takes, and the transactions an interval."""
    database, asked = resolver._registry.store._database, [0]
    reading = database.reading

    def counted() -> AbstractContextManager[Any]:
        asked[0] += 1
        return reading()

    database.reading = counted  # type: ignore[method-assign, assignment]
    cpu, began = time.process_time(), time.perf_counter()
    await asyncio.sleep(seconds)
    passed = time.perf_counter() - began
    database.reading = reading  # type: ignore[method-assign]
    return {"share_of_a_core": (time.process_time() - cpu) / passed, "questions": asked[0] * INTERVAL_S / passed}


async def moves(resolver: ModelResolver, targets: list[tuple[str, int]]) -> dict[str, list[float]]:
    """Resolve each name in turn until it means the version that is to come: when (Unix seconds) it first did."""
    heard = []
    for name, version in targets:
        while True:
            try:
                if (await resolver.resolve(ALL_TENANTS, name)).version == version:
                    break
            except PedroError as error:
                raise SystemExit(f"{name}: {error.message}") from error
            await asyncio.sleep(LOOK_S)
        heard.append(time.time())
        print(json.dumps({"heard": name}), flush=True)
    return {"heard": heard}


if __name__ == "__main__":
    asyncio.run(main())
