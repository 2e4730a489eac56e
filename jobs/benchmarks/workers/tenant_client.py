"""A tenant's client over HTTP that keeps streams running for a while, or asks one at a time. Needs httpx."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx

from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts


class TenantClient:
    """Set-up: size, url, key, model. An order: `seconds`, `streams`, `prompt`, `new`, `n`, `think_s`, `seed`."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._size, self._model = MODEL_SIZES[setup["size"]], setup["model"]
        self._url, self._headers = setup["url"], {"Authorization": f"Bearer {setup['key']}"}

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answers that came whole: when each was asked for and when its tokens came; and all tokens' count."""
        return asyncio.run(self._run(order))

    async def _run(self, order: dict[str, Any]) -> dict[str, Any]:
        streams = order["streams"]
        answers: list[tuple[float, list[float]]] = []
        tokens = [0]
        limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
        async with httpx.AsyncClient(base_url=self._url, headers=self._headers, limits=limits, timeout=300) as client:
            await asyncio.gather(*(client.get("/health") for _ in range(streams)))
            end = time.perf_counter() + order["seconds"]
            asking = [
                asyncio.create_task(
                    self._ask(client, {**order, "seed": order["seed"] * 1000 + i}, end, answers, tokens)
                )
                for i in range(streams)
            ]
            await asyncio.wait(asking, timeout=order["seconds"] if streams > 1 else None)
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
        for result in ended:
            if isinstance(result, Exception):
                raise result
        return {"answers": answers, "tokens": tokens[0]}

    async def _ask(
        self,
        client: httpx.AsyncClient,
        order: dict[str, Any],
        end: float,
        answers: list[tuple[float, list[float]]],
        tokens: list[int],
    ) -> None:
        """One request after the other until `end`, with a pause before each where the order has one."""
        rng = random.Random(order["seed"])  # noqa: S311
        while time.perf_counter() < end:
            await asyncio.sleep(rng.expovariate(1 / order["think_s"]) if order["think_s"] else 0)
            ids = prompts(self._size, 1, order["prompt"], rng.randrange(1 << 30))[0]
            body = {"model": self._model, "prompt": ids, "max_tokens": order["new"], "n": order["n"], "stream": True}
            body |= {"temperature": 0 if order["n"] == 1 else 1, "ignore_eos": True}
            asked, moments = time.perf_counter(), []
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    raise RuntimeError(f"HTTP {reply.status_code}: {(await reply.aread()).decode()[:300]}")
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise RuntimeError(str(event["error"]))
                        count = sum(len(choice["text"].split()) for choice in event["choices"])
                        moments += [time.perf_counter()] * count
                        tokens[0] += count
            answers.append((asked, moments))
