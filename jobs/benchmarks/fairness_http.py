"""The same floods as `fairness` over HTTP, from clients in processes of their own. The server is somebody else's."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.fairness import FLOODS, THINK_S, Flood, Seen, add_rows, line
from jobs.benchmarks.model_sizes import NEW_TOKENS, PROMPT_TOKENS

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.http_overhead import Server
    from jobs.benchmarks.report import BenchmarkReport

ALONE_S, FLOOD_S = 9.0, 12.0  # of a round
OPENING_S = 3.0  # proxy and clients work off all requests of a flood that begins at once; shown apart, without an aim
LIMIT = 1.5


def add(report: BenchmarkReport, options: Options, server: Server, flood_key: str, log: Log) -> None:
    """Cases over HTTP, added to the report of the engine's: alone, and beside 64 streams and n = 32."""
    rounds = options.rounds or (1 if options.quick else 3)
    floods = [flood.smaller() if options.quick else flood for flood in FLOODS[:2]]
    seen = {"alone": Seen(), **{flood.name: Seen() for flood in floods}}
    opening: defaultdict[str, Seen] = defaultdict(Seen)
    setup = {"size": server.size, "url": server.url}
    with EnginePool(log) as pool:
        pool.start("quiet", "tenant", {**setup, "key": server.key, "model": server.model})
        pool.start("flood", "tenant", {**setup, "key": flood_key, "model": server.size})
        if len(pool.wait()) == 2:
            _segment(pool, None, 2.0, 0)
            for number in range(1, rounds + 1):
                for flood in (None, *floods):
                    seconds = 3.0 if options.quick else FLOOD_S if flood else ALONE_S
                    early, made = _segment(pool, flood, seconds, number)
                    name = flood.name if flood else "alone"
                    seen[name].add(made)
                    opening[f"{name}, its first {OPENING_S:g} s"].add(early)
                    log(f"  HTTP, round {number} of {rounds}, {name}: {line(made)}")
        report.skipped |= pool.skipped
    if all(case.first_ms for case in seen.values()):
        add_rows(report, "http", seen, {}, LIMIT)
        began = {name: case for name, case in opening.items() if case.first_ms}
        add_rows(report, "http", {"alone": seen["alone"], **began}, {}, None)


def _segment(pool: EnginePool, flood: Flood | None, seconds: float, seed: int) -> tuple[Seen, Seen]:
    """What the quiet tenant saw while the flood began, and in the `seconds` after."""
    early, seen = Seen(), Seen()
    order: dict[str, Any] = {"seconds": seconds, "streams": 1, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "n": 1}
    order |= {"think_s": THINK_S, "seed": seed}
    steady = time.perf_counter()
    if flood is not None:
        steady += OPENING_S
        load = {"streams": flood.streams, "prompt": flood.prompt, "new": flood.new, "n": flood.n, "think_s": 0}
        pool.send("flood", {**order, **load, "seconds": OPENING_S + seconds + 2})
        order["seconds"] = OPENING_S + seconds
    for asked, moments in pool.run("quiet", order)["answers"]:
        (seen if asked >= steady else early).answered(asked, moments)
    if flood is not None:
        seen.tokens = pool.receive("flood")["tokens"]
    seen.seconds = OPENING_S + seconds + 2
    return early, seen
