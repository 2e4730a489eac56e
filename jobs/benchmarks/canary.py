"""A canary over HTTP: its share of 5,000 requests, the same version for the same user, and bad ones withdrawn.

Two gateways answer 32 clients. Of the bad versions one has damaged weights and cannot be served; the other is served,
and clients score its answers lower. No client may see an error of either.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx

from jobs.benchmarks.demo_server import MODEL, RunningServer, running_server
from jobs.benchmarks.hot_swap import SEEN_WITHIN_S
from jobs.benchmarks.local_server import TENANT
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import wilson
from pedro.adapter_directory import WEIGHTS
from pedro.errors import PedroError
from pedro.refs import ModelRef
from pedro.registry import Registry

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

COLUMNS = ("case", "requests", "failed", "of_canary", "share", "share_interval", "asked_again", "moved", "withdrawn_s")
REQUESTS, AGAIN, CLIENTS = 5_000, 1_000, 32
QUICK = (600, 100, 8)
GATEWAYS, WEIGHT, WITHIN = 2, 0.1, 0.01
PROMPT_TOKENS, NEW_TOKENS = 8, 2
WITHDRAWN_S, GUARD_S = 60.0, 300.0
SCORES = {"champion": (0.7, 0.9), "canary": (0.3, 0.5)}  # in turn


def canary_report(options: Options, log: Log) -> BenchmarkReport:
    """A good canary, then one that cannot be served, then one whose answers are liked less."""
    requests, again, clients = QUICK if options.quick else (REQUESTS, AGAIN, CLIENTS)
    with running_server(options, log, versions=3, gateways=GATEWAYS) as running:
        settings = {"model": running.server.size, "gateways": GATEWAYS, "weight": WEIGHT, "clients": clients}
        report = BenchmarkReport("canary", {**settings, "requests": requests, "asked_again": again})
        asking = _Asking(running, clients)
        registry = Registry.open(running.local.settings)
        _, good, damaged = running.versions
        _damage(registry, running, damaged)
        registry.canary(MODEL, good, WEIGHT)
        report.rows.append(asyncio.run(asking.share(good, requests, again)))
        for case, version in (("cannot be served", damaged), ("scored lower", good)):
            log(f"  a canary that {case.replace('scored', 'is scored')}")
            began = time.monotonic()
            registry.canary(MODEL, version, WEIGHT)
            report.rows.append(asyncio.run(asking.until_withdrawn(case, version, began)))
            log(f"  withdrawn after {report.rows[-1]['withdrawn_s']} s, {report.rows[-1]['requests']:,} requests")
        moves = [move for move in registry.store.alias_history(MODEL) if move.action == "withdraw"]
        report.facts["withdrawals"] = [move.reason for move in reversed(moves)]
    share, *bad = report.rows
    report.targets += [
        Target("share of the canary off 0.1 by", WITHIN, exactly(abs(share["share"] - WEIGHT)), at_most=True),
        Target("users who met another version when they asked again", 0, exactly(share["moved"]), at_most=True),
        *(Target(f"{row['case']}: s until withdrawn", WITHDRAWN_S, exactly(row["withdrawn_s"]), at_most=True)
          for row in bad),
        *(Target(f"{row['case']}: failed", 0, exactly(row["failed"]), at_most=True) for row in report.rows),
        Target("bad canaries that were withdrawn once each", len(bad), exactly(len(moves))),
    ]  # fmt: skip
    return report


def _damage(registry: Registry, running: RunningServer, number: int) -> None:
    """Make the weights in the artifact store others than those that were registered."""
    version = registry.get(MODEL, number)
    files = list(running.local.settings.home.glob(f"artifacts/**/{version.run_id}/**/{WEIGHTS}"))
    assert len(files) == 1, f"weights of {version.ref}: {files}"
    files[0].write_bytes(files[0].read_bytes()[:-4] + b"abcd")


class _Asking:
    """Clients that ask, each request as another user of the tenant."""

    def __init__(self, running: RunningServer, clients: int) -> None:
        self._running, self._clients = running, clients
        self._headers = {"authorization": f"Bearer {running.local.key(TENANT, 'infer', 'train')}"}
        self._prompt = prompts(MODEL_SIZES[running.server.size], 1, PROMPT_TOKENS, seed=0)[0]
        self.failures: list[str] = []

    async def share(self, canary: int, requests: int, again: int) -> dict[str, Any]:
        """Each user once, then the first of them again; what was met by whom."""
        self.failures = []
        await asyncio.sleep(SEEN_WITHIN_S)  # then every gateway has heard of it
        async with self._client() as client:
            began = time.monotonic()
            met = await self._users(client, requests)
            seconds = time.monotonic() - began
            second = await self._users(client, again)
        of_canary = sum(version == canary for version in met.values())
        share = wilson(of_canary, requests)
        return {
            "case": "a good one",
            "requests": requests,
            "failed": len(self.failures),
            "of_canary": of_canary,
            "share": round(share.value, 4),
            "share_interval": share.interval,
            "asked_again": again,
            "moved": sum(met.get(user) != version for user, version in second.items()),
            "requests_s": round(requests / seconds, 1),
            **self._first_failure(),
        }

    async def until_withdrawn(self, case: str, version: int, began: float) -> dict[str, Any]:
        """Ask until the adapter has no canary; how long that took from `began`, monotonic seconds."""
        self.failures = []
        users, stop = itertools.count(), asyncio.Event()
        scored = {"canary": itertools.cycle(SCORES["canary"]), "champion": itertools.cycle(SCORES["champion"])}
        answered: dict[int, int] = {}

        async def keep_asking() -> None:
            while not stop.is_set():
                met = await self._ask(client, f"{case} {next(users)}")
                if met is None:
                    continue
                answered[met] = answered.get(met, 0) + 1
                if case == "scored lower":
                    score = next(scored["canary" if met == version else "champion"])
                    await self._score(client, met, score)

        async with self._client() as client:
            asking = [asyncio.create_task(keep_asking()) for _ in range(self._clients)]
            try:
                while await self._has_canary(client):
                    if time.monotonic() - began > GUARD_S:
                        raise PedroError(f"the canary that {case} was not withdrawn within {GUARD_S:g} s")
                    await asyncio.sleep(0.1)
                seconds = time.monotonic() - began
            finally:
                stop.set()
                await asyncio.gather(*asking)
        return {
            "case": case,
            "requests": sum(answered.values()) + len(self.failures),
            "failed": len(self.failures),
            "of_canary": answered.get(version, 0),
            "withdrawn_s": round(seconds, 1),
            **self._first_failure(),
        }

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._clients + 1, max_keepalive_connections=self._clients + 1)
        return httpx.AsyncClient(base_url=self._running.local.url, headers=self._headers, limits=limits, timeout=120)

    async def _users(self, client: httpx.AsyncClient, count: int) -> dict[int, int]:
        """Which version each of the first `count` users met; one that failed met none."""
        met: dict[int, int] = {}
        numbers: Iterator[int] = iter(range(count))

        async def ask() -> None:
            for number in numbers:
                version = await self._ask(client, f"user {number}")
                if version is not None:
                    met[number] = version

        await asyncio.gather(*(ask() for _ in range(self._clients)))
        return met

    async def _ask(self, client: httpx.AsyncClient, user: str) -> int | None:
        """The version that answered; None, and a failure, where none did."""
        body = {"model": MODEL, "prompt": self._prompt, "max_tokens": NEW_TOKENS, "ignore_eos": True, "user": user}
        try:
            reply = await client.post("/v1/completions", json=body)
            if reply.status_code == 200:
                return ModelRef.parse(reply.json()["system_fingerprint"]).number
            self.failures.append(f"{reply.status_code}: {reply.text[:200]}")
        except httpx.HTTPError as error:
            self.failures.append(repr(error))
        return None

    async def _score(self, client: httpx.AsyncClient, version: int, score: float) -> None:
        with suppress(httpx.HTTPError):
            reply = await client.post(f"/v1/adapters/{MODEL}/feedback", json={"version": version, "score": score})
            if reply.status_code != 200:
                self.failures.append(f"feedback {reply.status_code}: {reply.text[:200]}")

    async def _has_canary(self, client: httpx.AsyncClient) -> bool:
        reply = await client.get(f"/v1/adapters/{MODEL}")
        if reply.status_code != 200:
            raise PedroError(f"{MODEL}: the adapter's card answered {reply.status_code}: {reply.text[:200]}")
        return reply.json()["canary"] is not None

    def _first_failure(self) -> dict[str, str]:
        return {"first_failure": self.failures[0]} if self.failures else {}
