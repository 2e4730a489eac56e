"""Where the processor time of streams over HTTP goes: by process, per request and per token, and in the gateway's own
code. The server is somebody else's.

Answers of two lengths tell what a request costs by itself and what each further token adds. Processor time is the
system's count for each process, so that a busy machine changes it little; times that clients see, it changes a lot.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.home_processes import of_home
from jobs.benchmarks.model_sizes import NEW_TOKENS

if TYPE_CHECKING:
    from jobs.benchmarks.http_overhead import Server
    from jobs.benchmarks.report import BenchmarkReport

STAGES = {"proxy": "ProxyActor", "gateway": "ServeReplica:pedro:gateway", "engine": "ServeReplica:pedro:engine"}
RAY, CLIENT = "ray", "client"  # the home's other processes, which cost some when nothing is asked, too; who asks
PLATFORM = ("proxy", "gateway")
MODEL = "tiny"  # of `add_small`
STREAMS, ANSWERS, PROMPT = (32, 64, 256), (33, 256), 64
ROUNDS = 2
QUICK_ANSWERS, QUICK_ROUNDS = (9, 33), 1
AFTER_S = 0.2  # what is done once an answer has gone out, such as a line in a log, is part of it
REQUESTS = 400  # of the gateway's own code
COLUMNS = (
    *("case", "answer_tokens", "events", "ttft_p99_ms", "token_ms", "token_p99_ms"),
    *(f"{stage}_us" for stage in (*STAGES, RAY, CLIENT)),
    *("request_us", "fixed_us", "token_us", "event_us"),
)
Seconds = Mapping[str, float]


class ProcessorTime:
    """The processor time that the processes of a home have taken so far, by stage. They are looked for once."""

    def __init__(self, home: Path) -> None:
        self._of_stage = {stage: of_home(home, title) for stage, title in STAGES.items()}
        staged = {process.pid for processes in self._of_stage.values() for process in processes}
        self._of_stage[RAY] = [process for process in of_home(home, "") if process.pid not in staged]

    def read(self) -> dict[str, float]:
        """Seconds by stage."""
        return {stage: sum(map(_seconds, processes)) for stage, processes in self._of_stage.items()}


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
        self._figures: list[Mapping[str, float]] = []

    def add(self, before: Seconds, after: Seconds, figures: Mapping[str, float]) -> None:
        """A run, with the processor time read before it and after it."""
        self.requests += self.streams
        self.events += figures["events"]
        self.seconds.update({stage: after[stage] - before[stage] for stage in after})
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
    for streams in sorted({run.streams for run in spent}):
        short, long = sorted((run for run in spent if run.streams == streams), key=lambda run: run.answer_tokens)
        tokens = long.answer_tokens - short.answer_tokens
        events = long.events / long.requests - short.events / short.requests
        for stage in (*STAGES, CLIENT):
            more_us = long.request_us(stage) - short.request_us(stage)
            row: dict[str, Any] = {"case": f"a request's {stage}", "model": model, "batch": streams}
            row["fixed_us"] = round(short.request_us(stage) - short.answer_tokens * more_us / tokens)
            row["token_us"] = round(more_us / tokens, 1)
            if events > 0:
                row["event_us"] = round(more_us / events)
            rows.append(row)
    return rows


def add(
    report: BenchmarkReport,
    pool: EnginePool,
    model: str,
    home: Path,
    quick: bool,
    log: Log,
    streams: Sequence[int] = STREAMS,
) -> None:
    """Rows of every number of streams and length of answers, and of what each part costs, from the client `http` of the
    pool, which asks the server of `home`."""
    answers, rounds = (QUICK_ANSWERS, QUICK_ROUNDS) if quick else (ANSWERS, ROUNDS)
    spent = [Spent(count, length) for count in streams for length in answers]
    time_of = ProcessorTime(home)
    _run(pool, Spent(streams[0], answers[0]), time_of, 0)  # warms up
    for number in range(1, 1 + rounds):
        for cell in spent:
            _run(pool, cell, time_of, number)
    for cell in spent:
        report.rows.append(row := cell.row(model))
        used = ", ".join(f"{stage} {row[f'{stage}_us']:.0f}" for stage in cell.seconds)
        log(f"  {model}: {cell.streams} streams of {cell.answer_tokens} tokens, processor µs a token: {used}")
    report.rows += split_rows(model, spent)


def add_small(report: BenchmarkReport, server: Server, home: Path, log: Log) -> None:
    """The same with a backbone so small that the platform is what takes the time, at several numbers of streams; and
    the gateway's own code."""
    from jobs.benchmarks.gateway_cost import own_code

    with EnginePool(log) as pool:
        pool.start("http", "http", {"size": server.size, "url": server.url, "key": server.key, "model": server.model})
        if pool.wait():
            add(report, pool, server.size, home, False, log)
        report.skipped |= pool.skipped
    with tempfile.TemporaryDirectory() as folder:
        own = own_code(Path(folder), REQUESTS, NEW_TOKENS)
    report.rows.append({"case": "the gateway's own code", "answer_tokens": NEW_TOKENS, **own})


def _run(pool: EnginePool, cell: Spent, time_of: ProcessorTime, seed: int) -> None:
    before = time_of.read()
    figures = pool.run("http", {"batch": cell.streams, "prompt": PROMPT, "new": cell.answer_tokens, "seed": seed})
    time.sleep(AFTER_S)
    cell.add(before, time_of.read(), figures)
