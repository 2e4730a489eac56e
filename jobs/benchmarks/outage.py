"""A database that is away for a minute, under 64 streams of stock OpenAI clients at three gateways.

The store is in PostgreSQL, which is killed and started again; adapters and keys are known by then. No request may fail
or be answered otherwise than before, and the ledger must have every token once the database is back.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from jobs.benchmarks.demo_server import MODEL, RunningServer, running_server
from jobs.benchmarks.local_server import TENANT
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.errors import NotFoundError, PedroError

if TYPE_CHECKING:
    import openai

    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.postgres_server import PostgresServer

COLUMNS = ("case", "seconds", "answers", "failed", "wrong", "ready_says")
BEFORE, AWAY, AFTER = "before", "database away", "database back"
SECONDS, STREAMS = {BEFORE: 15.0, AWAY: 60.0, AFTER: 10.0}, 64
QUICK_SECONDS, QUICK_STREAMS = {BEFORE: 5.0, AWAY: 5.0, AFTER: 2.0}, 8
GATEWAYS, KEYS = 3, 4
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 33
NAMES = (MODEL, f"{MODEL}@champion", f"{MODEL}:1")
LOOK_S, GUARD_S = 0.5, 120.0


@dataclass
class _Seen:
    """What came of the requests that were asked in one span of time, and what `/ready` said meanwhile."""

    answers: int = 0
    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    ready_says: set[str] = field(default_factory=set)

    def row(self, case: str, seconds: float) -> dict[str, Any]:
        row: dict[str, Any] = {"case": case, "seconds": seconds, "answers": self.answers}
        row |= {"failed": len(self.failures), "wrong": self.wrong, "ready_says": ", ".join(sorted(self.ready_says))}
        return row | ({"first_failure": self.failures[0]} if self.failures else {})


def outage_report(options: Options, log: Log) -> BenchmarkReport:
    """What the streams saw before, meanwhile and after; and whether the ledger has it all."""
    from jobs.benchmarks.postgres_server import running_server as postgres_server

    if importlib.util.find_spec("openai") is None:
        raise NotFoundError("openai is not installed, whose client asks; pip install '.[dev]'")
    seconds, streams = (QUICK_SECONDS, QUICK_STREAMS) if options.quick else (SECONDS, STREAMS)
    with (
        postgres_server() as postgres,
        running_server(options, log, gateways=GATEWAYS, database_url=postgres.ready_database()) as running,
    ):
        settings = {"model": running.server.size, "gateways": GATEWAYS, "streams": streams, "new": NEW_TOKENS}
        report = BenchmarkReport("outage", settings)
        running.local.store.set_quota(tenant=TENANT, requests_per_minute=1_000_000, tokens_per_day=1_000_000_000)
        load = _Load(running, log)
        report.rows = asyncio.run(load.run(postgres, streams, seconds))
        requests, tokens = _ledger(running, load.asked * NEW_TOKENS)
    report.facts |= {"asked": load.asked, "requests_in_ledger": requests, "tokens_in_ledger": tokens}
    for row in report.rows:
        for what in ("failed", "wrong"):
            report.targets.append(Target(f"{row['case']}: {what}", 0, exactly(row[what]), at_most=True))
    lost = Target("tokens of answers that are not in the ledger", 0, exactly(load.asked * NEW_TOKENS - tokens), True)
    report.targets.append(lost)
    return report


def _ledger(running: RunningServer, expected: int) -> tuple[int, int]:
    """Requests and tokens of answers in the ledger, once the tokens are as many as expected or the time is over.
    Requests alone would tell too soon: one that a client had to repeat is two."""
    until = time.monotonic() + GUARD_S
    while True:
        (used,) = running.local.store.usage(TENANT, by=[])
        if used.completion_tokens >= expected or time.monotonic() > until:
            return used.requests, used.completion_tokens
        time.sleep(LOOK_S)


class _Load:
    """Streams that go on without end, each of a client with connections and retries of its own."""

    def __init__(self, running: RunningServer, log: Log) -> None:
        self._url, self._log = running.local.url, log
        self._prompts = prompts(MODEL_SIZES[running.server.size], PROMPTS, PROMPT_TOKENS, seed=0)
        self._keys = [running.local.key() for _ in range(KEYS)]
        self._wanted: list[str] = []
        self._now, self._stop = _Seen(), False
        self.asked = 0  # and answered whole

    async def run(self, postgres: PostgresServer, streams: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
        """The database is there, away, and there again; a row of each."""
        clients = [self._client(number) for number in range(streams)]
        self._wanted = [await self._stream(clients[0], MODEL, prompt) for prompt in range(PROMPTS)]
        asking = [asyncio.create_task(self._keep_asking(client, number)) for number, client in enumerate(clients)]
        rows = []
        turns: dict[str, Callable[[], None]] = {AWAY: postgres.kill, AFTER: postgres.start}
        try:
            for case, span in seconds.items():
                if case in turns:
                    await asyncio.to_thread(turns[case])
                self._now = seen = _Seen()
                self._log(f"  {case}: {streams} streams for {span:g} s")
                await asyncio.to_thread(self._watch, seen, time.monotonic() + span)
                if case == AFTER:
                    await asyncio.to_thread(self._until_ready)
                rows.append((seen, case, span))
        finally:
            self._stop = True
            await asyncio.gather(*asking)
            await asyncio.gather(*(client.close() for client in clients))
        return [seen.row(case, span) for seen, case, span in rows]

    def _client(self, number: int) -> openai.AsyncOpenAI:
        import openai

        return openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key=self._keys[number % KEYS], timeout=GUARD_S)

    async def _keep_asking(self, client: openai.AsyncOpenAI, number: int) -> None:
        import openai

        while not self._stop:
            seen, prompt = self._now, number % PROMPTS
            try:
                text = await self._stream(client, NAMES[number % len(NAMES)], prompt)
                seen.answers += 1
                seen.wrong += text != self._wanted[prompt]
            except (openai.OpenAIError, httpx.HTTPError, PedroError) as error:
                seen.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.1)
            number += 1

    async def _stream(self, client: openai.AsyncOpenAI, model: str, prompt: int) -> str:
        """A whole answer."""
        fields: dict[str, Any] = {"model": model, "prompt": self._prompts[prompt], "max_tokens": NEW_TOKENS}
        fields |= {"temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
        stream: Any = await client.completions.create(**fields)
        parts: list[str] = []
        reason: str | None = None
        async for chunk in stream:
            parts.append(chunk.choices[0].text)
            reason = chunk.choices[0].finish_reason or reason
        if reason != "length":
            raise PedroError(f"the stream ended with {reason!r} after {len(parts)} pieces")
        self.asked += 1
        return "".join(parts)

    def _watch(self, seen: _Seen, until: float) -> None:
        """What a probe hears. On a thread: one that waits behind all streams sends too late to be answered."""
        with httpx.Client(base_url=self._url, timeout=GUARD_S) as anybody:
            while time.monotonic() < until:
                try:
                    seen.ready_says.add(_status(anybody.get("/ready")))
                except httpx.HTTPError as error:  # asked once, where clients ask again
                    seen.failures.append(f"/ready: {error!r}")
                time.sleep(LOOK_S)

    def _until_ready(self) -> None:
        """On a thread: until every gateway has been heard to be ready, as far as asking so often tells."""
        with httpx.Client(base_url=self._url, timeout=GUARD_S) as anybody:
            until, good = time.monotonic() + GUARD_S, 0
            while good < 4 * GATEWAYS:
                good = good + 1 if _status(anybody.get("/ready")) == "ready" else 0
                if time.monotonic() > until:
                    raise PedroError(f"the server is not ready {GUARD_S:g} s after the database is back")
                time.sleep(0.1)


def _status(answer: httpx.Response) -> str:
    return str(answer.json()["status"])
