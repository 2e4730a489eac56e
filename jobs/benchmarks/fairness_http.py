"""The same floods as `fairness` over HTTP, from clients in processes of their own. The server is somebody else's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.fairness import FLOODS, THINK_S, WARM_S, Flood, Seen, add_rows, line
from jobs.benchmarks.model_sizes import NEW_TOKENS, PROMPT_TOKENS

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.http_overhead import Server
    from jobs.benchmarks.report import BenchmarkReport

ALONE_S, FLOOD_S = 9.0, 12.0  # of a round
LIMIT = 1.5


def add(report: BenchmarkReport, options: Options, server: Server, flood_key: str, log: Log) -> None:
    """Cases over HTTP, added to the report of the engine's: alone, and beside 64 streams and n = 32."""
    rounds = options.rounds or (1 if options.quick else 3)
    floods = [flood.smaller() if options.quick else flood for flood in FLOODS[:2]]
    seen = {"alone": Seen(), **{flood.name: Seen() for flood in floods}}
    setup = {"size": server.size, "url": server.url}
    with EnginePool(log) as pool:
        pool.start("quiet", "tenant", {**setup, "key": server.key, "model": server.model})
        pool.start("flood", "tenant", {**setup, "key": flood_key, "model": server.size})
        if len(pool.wait()) == 2:
            _segment(pool, None, 2.0, 0)
            for number in range(1, rounds + 1):
                for flood in (None, *floods):
                    seconds = 3.0 if options.quick else FLOOD_S if flood else ALONE_S
                    made = _segment(pool, flood, seconds, number)
                    name = flood.name if flood else "alone"
                    seen[name].add(made)
                    log(f"  HTTP, round {number} of {rounds}, {name}: {line(made)}")
        report.skipped |= pool.skipped
    if all(case.first_ms for case in seen.values()):
        add_rows(report, "http", seen, {}, LIMIT)


def _segment(pool: EnginePool, flood: Flood | None, seconds: float, seed: int) -> Seen:
    seen = Seen()
    order: dict[str, Any] = {"seconds": seconds, "streams": 1, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "n": 1}
    order |= {"think_s": THINK_S, "seed": seed}
    if flood is not None:
        load = {"streams": flood.streams, "prompt": flood.prompt, "new": flood.new, "n": flood.n, "think_s": 0}
        pool.send("flood", {**order, **load, "seconds": seconds + WARM_S + 2})
        time.sleep(WARM_S)
    for asked, moments in pool.run("quiet", order)["answers"]:
        seen.answered(asked, moments)
    if flood is not None:
        seen.tokens = pool.receive("flood")["tokens"]
    seen.seconds = seconds + WARM_S + 2
    return seen
