"""Where the processor time of streams over HTTP goes: by process, per request and per token, and in the gateway's own
code. The server is somebody else's.

Answers of two lengths tell what a request costs by itself and what each further token adds. Processor time is the
system's count for each process, so that a busy machine changes it little; times that clients see, it changes a lot.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.home_processes import of_home
from jobs.benchmarks.model_sizes import NEW_TOKENS

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import EnginePool, Log
    from jobs.benchmarks.report import BenchmarkReport

STAGES = {"proxy": "ProxyActor", "gateway": "ServeReplica:pedro:gateway", "engine": "ServeReplica:pedro:engine"}
RAY, CLIENT = "ray", "client"  # the home's other processes, which cost some when nothing is asked, too; who asks
PLATFORM = ("proxy", "gateway")
CELLS = ((32, 33), (32, 256), (64, 33), (64, 256), (256, 33))  # streams and tokens of each one's answer
QUICK_CELLS = ((8, 9), (8, 33))
PROMPT = 64
AFTER_S = 0.2
REQUESTS = 400  # of the gateway's own code
COLUMNS = (
    *("case", "answer_tokens", "events", "ttft_p99_ms", "token_ms", "token_p99_ms"),
    *(f"{stage}_us" for stage in (*STAGES, RAY, CLIENT)),
    *("request_us", "fixed_us", "token_us", "event_us"),
)


class ProcessorTime:
    """The processor time that the processes of a home have taken so far, by stage. They are looked for once."""

    def __init__(self, home: Path) -> None:
        self._of_stage = {stage: of_home(home, title) for stage, title in STAGES.items()}
        staged = {process.pid for processes in self._of_stage.values() for process in processes}
        self._of_stage[RAY] = [process for process in of_home(home, "") if process.pid not in staged]

    def read(self) -> Counter[str]:
        """Seconds by stage."""
        return Counter({stage: sum(map(_seconds, processes)) for stage, processes in self._of_stage.items()})

    async def since(self, before: Counter[str]) -> dict[str, float]:
        """Seconds by stage since then, with what is done once the last answer has gone out, such as a line in a log."""
        await asyncio.sleep(AFTER_S)
        return {stage: seconds - before[stage] for stage, seconds in self.read().items()}


def _seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


class Spent:
    """What runs of the same kind have taken, by stage, and what they made."""

    def __init__(self, streams: int, answer_tokens: int) -> None:
        self.streams, self.answer_tokens = streams, answer_tokens
        self.requests = 0
        self.events = 0.0
        self.seconds: Counter[str] = Counter()
        self._figures: list[Mapping[str, Any]] = []

    def add(self, figures: Mapping[str, Any]) -> None:
        """A run, with the processor time that the client read before it and after it."""
        self.requests += self.streams
        self.events += figures["events"]
        self.seconds.update(figures["seconds"])
        self.seconds[CLIENT] += figures["cpu_s"]
        self._figures.append(figures)

    def request_us(self, stage: str) -> float:
        """Of one request with its answer."""
        return 1e6 * self.seconds[stage] / self.requests

    def row(self, model: str) -> dict[str, Any]:
        """Microseconds per token by stage, and per request of proxy and gateway; medians of what clients saw."""
        row: dict[str, Any] = {"case": "streams", "model": model, "batch": self.streams}
        row |= {"answer_tokens": self.answer_tokens, "events": round(self.events / self.requests, 1)}
        for name in ("tok_s", "ttft_ms", "ttft_p99_ms", "token_ms", "token_p99_ms"):
            row[name] = round(median(figures[name] for figures in self._figures), 2)
        row |= {f"{stage}_us": round(self.request_us(stage) / self.answer_tokens, 1) for stage in self.seconds}
        return row | {"request_us": round(sum(map(self.request_us, PLATFORM)))}


def split_rows(model: str, spent: Sequence[Spent]) -> list[dict[str, Any]]:
    """By stage: what is fixed in the cost of a request, what each token adds, and what each event."""
    rows = []
    pairs = [(a, b) for a in spent for b in spent if a.streams == b.streams and a.answer_tokens < b.answer_tokens]
    for short, long in pairs:
        tokens = long.answer_tokens - short.answer_tokens
        events = long.events / long.requests - short.events / short.requests
        for stage in (*STAGES, CLIENT):
            more_us = long.request_us(stage) - short.request_us(stage)
            row: dict[str, Any] = {"case": f"a request's {stage}", "model": model, "batch": short.streams}
            row["fixed_us"] = round(short.request_us(stage) - short.answer_tokens * more_us / tokens)
            row["token_us"] = round(more_us / tokens, 1)
            if events > 0:
                row["event_us"] = round(more_us / events)
            rows.append(row)
    return rows


def add(report: BenchmarkReport, pool: EnginePool, model: str, home: Path, quick: bool, log: Log) -> None:
    """Rows of several numbers of streams and lengths of answers, of what each part costs, and of the gateway's own
    code. The client `http` of the pool asks the server of `home`."""
    from jobs.benchmarks.gateway_cost import own_code

    spent = [Spent(count, length) for count, length in (QUICK_CELLS if quick else CELLS)]
    _run(pool, Spent(8, 9), home, 0)  # warms up
    for number, cell in enumerate(spent, 1):
        _run(pool, cell, home, number)
        report.rows.append(row := cell.row(model))
        used = ", ".join(f"{stage} {row[f'{stage}_us']:.0f}" for stage in cell.seconds)
        log(f"  {model}: {cell.streams} streams of {cell.answer_tokens} tokens, processor µs a token: {used}")
    report.rows += split_rows(model, spent)
    with tempfile.TemporaryDirectory() as folder:
        own = own_code(Path(folder), REQUESTS, NEW_TOKENS)
    report.rows.append({"case": "the gateway's own code", "answer_tokens": NEW_TOKENS, **own})


def _run(pool: EnginePool, cell: Spent, home: Path, seed: int) -> None:
    order = {"batch": cell.streams, "prompt": PROMPT, "new": cell.answer_tokens, "seed": seed, "home": str(home)}
    cell.add(pool.run("http", order))
