"""Engine replicas of one thread each on this machine, behind the project's own router: how they add up, who holds what.

The replicas are processes; router and callers are this one, which takes its share of the cores, too. Two and four
replicas have two and four times the callers of one. Then more adapters than one replica has room for are asked for,
placed by the router or at random. All take turns.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.demo_server import backbone_with_words
from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.entered_adapters import enter
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, bench_folder, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.replica_connection import SocketConnection
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.tenants import adapter_bytes
from pedro.backbone import resolve_backbone
from pedro.config import Settings
from pedro.engine.kernel_threads import granted_cores
from pedro.gateway.backend import GenerateCall
from pedro.serving.protocol import ListResidents, LoadAdapter, UnloadAdapter
from pedro.serving.router import Placement, ReplicaSet, choose

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from pedro.refs import ModelRef
    from pedro.registry import Registry

REPLICAS = (1, 2, 4)
SLOTS = 16
CALLERS = (1, 4, SLOTS)  # of one replica, for what a simulation must know
ROOM, ADAPTERS, HOT = 48, 96, 32  # adapters that a replica has room for, of all, and of those that all have room for
SECONDS, RAMP_S = 6.0, 1.5
LEAST = 0.95
BY_ADAPTER, AT_RANDOM = "by adapter", "at random"
DRAWS = ("uniform", "zipf")
COLUMNS = (
    *("case", "replicas", "callers", "placement", "draw", "tok_s", "calls_s", "ratio", "ratio_interval"),
    *("of_cores", "hit_share", "loads", "resident", "router_us"),
)


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long."""

    size: ModelSize
    replicas: tuple[int, ...]
    rounds: int
    seconds: float
    ramp_s: float
    prompt: int
    new: int


def run(options: Options, log: Log) -> BenchmarkReport:
    """All of it; `--quick` has two replicas."""
    size = MODEL_SIZES[(options.models or ("S",))[0]]
    if options.quick:
        plan = Plan(size, (1, 2), options.rounds or 1, 1.0, 0.3, 24, 8)
    else:
        plan = Plan(size, REPLICAS, options.rounds or 7, SECONDS, RAMP_S, PROMPT_TOKENS, NEW_TOKENS)
    home, sockets = bench_folder() / "scaleout", Path(tempfile.mkdtemp(prefix="pedro-"))
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        refs = _registered(size, home)
        directory = adapter_directories(size, "pedro", 1)[0]
        held = adapter_bytes(size, str(directory), options)
        config = {
            "backbone": str(backbone_with_words(size)),
            "served_name": size.name,
            "threads": 1,
            "max_batch": SLOTS,
            "adapter_budget_mb": (ROOM + 0.5) * held / 2**20,
            "prefix_cache_mb": 0,
        }
        with EnginePool(log) as pool:
            names = [f"replica-{number}" for number in range(max(plan.replicas))]
            for name in names:
                setup = {"home": str(home), "config": config, "name": name, "socket": str(sockets / name)}
                pool.start(name, "replica", setup, OMP_NUM_THREADS="1")
            ready = pool.wait()
            report = _new_report(plan, held)
            report.skipped |= pool.skipped
            if len(ready) == len(names):
                asyncio.run(_Bench(plan, pool, sockets, refs, log).measure(report))
            return report
    finally:
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(sockets, ignore_errors=True)


def _registered(size: ModelSize, home: Path) -> list[ModelRef]:
    from pedro.registry import Registry

    registry: Registry = Registry.open(Settings.from_env({"PEDRO_HOME": str(home)}))
    backbone = resolve_backbone(str(backbone_with_words(size)))
    return list(enter(registry, size, backbone, ADAPTERS, range(ADAPTERS)).values())


def _new_report(plan: Plan, held: int) -> BenchmarkReport:
    settings: dict[str, Any] = {
        "model": plan.size.name,
        "slots": SLOTS,
        "threads": 1,
        "rounds": plan.rounds,
        "seconds": plan.seconds,
    }
    settings |= {"prompt": plan.prompt, "new": plan.new, "adapters": ADAPTERS, "room": ROOM, "adapter_bytes": held}
    return BenchmarkReport("scaleout", {**settings, "granted_cores": granted_cores()})


@dataclass
class _Segment:
    """What came in the time that counts."""

    seconds: float
    tokens: int
    calls: int
    used: Mapping[str, float]  # of this process and of all replicas

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds


@dataclass
class _Seen:
    segments: list[_Segment] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Medians of all rounds."""
        calls = [segment.calls / segment.seconds for segment in self.segments]
        router = [1e6 * one.used["router_s"] / max(1, one.calls) for one in self.segments]
        rates = [segment.tok_s for segment in self.segments]
        return {
            "tok_s": round(median(rates), 2),
            "calls_s": round(median(calls), 3),
            "router_us": round(median(router)),
        }


class _Bench:
    def __init__(self, plan: Plan, pool: EnginePool, sockets: Path, refs: Sequence[ModelRef], log: Log) -> None:
        self._plan, self._pool, self._sockets, self._refs, self._log = plan, pool, sockets, refs, log
        self._names = [f"replica-{number}" for number in range(max(plan.replicas))]
        self._calls = itertools.count()
        self._rng = random.Random(0)  # noqa: S311

    async def measure(self, report: BenchmarkReport) -> None:
        """Rounds of every case, each in turn the first; then what a load takes by itself."""
        plan = self._plan
        together: dict[tuple[int, int], _Seen] = {(1, callers): _Seen() for callers in CALLERS}
        together |= {(count, SLOTS * count): _Seen() for count in plan.replicas}
        placed = {(draw, placement): _Seen() for draw in DRAWS for placement in (BY_ADAPTER, AT_RANDOM)}
        held: dict[tuple[str, str], list[float]] = {case: [] for case in placed}
        for number in range(plan.rounds):
            for count, callers in list(together)[:: -1 if number % 2 else 1]:
                async with self._router(count, choose) as replicas:
                    together[count, callers].segments.append(await self._segment(replicas, callers, self._hot()))
            for draw, placement in list(placed)[:: -1 if number % 2 else 1]:
                async with self._router(2, choose if placement == BY_ADAPTER else self._anywhere) as replicas:
                    segment, resident = await self._residency(replicas, draw)
                placed[draw, placement].segments.append(segment)
                held[draw, placement].append(resident)
            rates = ", ".join(f"{n}×{c // n}: {one.segments[-1].tok_s:.0f}" for (n, c), one in together.items())
            self._log(f"  round {number + 1} of {plan.rounds}: tok/s {rates}")
        _add_speeds(report, together)
        _add_residency(report, placed, held)
        report.rows.append(await self._load_row())

    @asynccontextmanager
    async def _router(self, count: int, place: Placement) -> AsyncIterator[ReplicaSet]:
        replicas = ReplicaSet(lambda name: SocketConnection(self._sockets / name), place=place)
        replicas.update(self._names[:count])
        async with asyncio.timeout(60):
            while sum(client.ready for client in replicas._clients.values()) < count:
                await asyncio.sleep(0.01)
        try:
            yield replicas
        finally:
            await replicas.close()

    def _anywhere(self, _ref: ModelRef | None, loads: Mapping[str, int]) -> str:
        return self._rng.choice(list(loads))

    def _hot(self) -> list[ModelRef]:
        """A long row of calls for adapters that every replica has room for."""
        return self._rng.choices(self._refs[:HOT], k=4096)

    async def _residency(self, replicas: ReplicaSet, draw: str) -> tuple[_Segment, float]:
        """Calls for more adapters than one replica holds, once each placement has its own in place."""
        weights = [1 / k for k in range(1, ADAPTERS + 1)] if draw == "zipf" else None
        drawn = self._rng.choices(self._refs, weights, k=4096)
        short = iter(drawn[: 2 * ADAPTERS])
        await asyncio.gather(*(self._caller(replicas, short, 8, 1, _Counter()) for _ in range(2 * SLOTS)))
        segment = await self._segment(replicas, 2 * SLOTS, drawn[2 * ADAPTERS :])
        found = await replicas.ask_all(ListResidents())
        return segment, float(len({(one.name, one.version) for some in found for one in some}))

    async def _segment(self, replicas: ReplicaSet, callers: int, drawn: Sequence[ModelRef]) -> _Segment:
        """So many callers ask one call after the other; what counts begins after a while, and ends before they do."""
        plan, counter, asked = self._plan, _Counter(), iter(drawn)
        tasks = [
            asyncio.create_task(self._caller(replicas, asked, plan.prompt, plan.new, counter)) for _ in range(callers)
        ]
        await asyncio.sleep(plan.ramp_s)
        before = self._used()
        await asyncio.sleep(0.05)  # asking kept this loop from what had come
        began, tokens, calls = time.perf_counter(), counter.tokens, counter.calls
        await asyncio.sleep(plan.seconds)
        seconds, got, made = time.perf_counter() - began, counter.tokens - tokens, counter.calls - calls
        used = {name: after - before[name] for name, after in self._used().items()}
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return _Segment(seconds, got, made, used)

    async def _caller(
        self, replicas: ReplicaSet, asked: Iterator[ModelRef], prompt: int, new: int, counter: _Counter
    ) -> None:
        for ref in asked:
            (ids,) = prompts(self._plan.size, 1, prompt, seed=next(self._calls))
            params = {"max_tokens": new, "temperature": 0.0, "ignore_eos": True}
            call = GenerateCall(f"c{next(self._calls)}", ref.tenant, ref.name, prompt=tuple(ids), params=params)
            async with aclosing(replicas.generate(call, ref)) as batches:
                async for batch in batches:
                    counter.tokens += sum(len(delta.token_ids) for delta in batch)
            counter.calls += 1

    def _used(self) -> dict[str, float]:
        """Processor time of the router and of the replicas, and the replicas' loads, since they started."""
        figures = [self._pool.run(name, {}) for name in self._names]
        return {
            "router_s": time.process_time(),
            "replicas_s": sum(one["cpu_s"] for one in figures),
            "loads": sum(one["loads"] for one in figures),
        }

    async def _load_row(self) -> dict[str, Any]:
        """What it takes an idle replica to have an adapter whose files its host has: seconds, and processor time."""
        connection, name = SocketConnection(self._sockets / self._names[0]), self._names[0]
        refs = self._refs[:ROOM]
        for ref in refs:
            await connection.ask(UnloadAdapter(ref))
        before, seconds = self._pool.run(name, {})["cpu_s"], []
        for ref in refs:
            began = time.perf_counter()
            await connection.ask(LoadAdapter(ref))
            seconds.append(time.perf_counter() - began)
        cpu = (self._pool.run(name, {})["cpu_s"] - before) / len(refs)
        return {"case": "load", "adapters": len(refs), "load_ms": _ms(median(seconds)), "load_cpu_ms": _ms(cpu)}


@dataclass
class _Counter:
    tokens: int = 0
    calls: int = 0


def _add_speeds(report: BenchmarkReport, together: Mapping[tuple[int, int], _Seen]) -> None:
    """A row for every number of replicas and callers; several replicas beside as many times one."""
    cores = granted_cores()
    one = [segment.tok_s for segment in together[1, SLOTS].segments]
    for (count, callers), seen in together.items():
        row: dict[str, Any] = {"case": "speed", "replicas": count, "callers": callers, **seen.row()}
        row["replicas_cpu"] = round(median(s.used["replicas_s"] / s.seconds for s in seen.segments), 2)
        row["router_cpu"] = round(median(s.used["router_s"] / s.seconds for s in seen.segments), 3)
        if count > 1:
            rates = [segment.tok_s for segment in seen.segments]
            ratio = paired_ratio(rates, [count * rate for rate in one])
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
            row["of_cores"] = round(ratio.value * count / min(count, cores), 4)
            if count <= cores:
                report.targets.append(Target(f"{count} replicas / {count} × one: throughput", LEAST, ratio))
        report.rows.append(row)


def _add_residency(
    report: BenchmarkReport, placed: Mapping[tuple[str, str], _Seen], held: Mapping[tuple[str, str], list[float]]
) -> None:
    """Hits and speed of both placements; the router's beside the other's."""
    shares = {
        case: [max(0.0, 1 - one.used["loads"] / max(1, one.calls)) for one in seen.segments]
        for case, seen in placed.items()
    }
    for (draw, placement), seen in placed.items():
        row: dict[str, Any] = {"case": "residency", "replicas": 2, "placement": placement, "draw": draw, **seen.row()}
        row |= {"callers": 2 * SLOTS, "hit_share": round(fmean(shares[draw, placement]), 4)}
        row["loads"] = round(fmean(one.used["loads"] for one in seen.segments), 1)
        row["resident"] = round(fmean(held[draw, placement]), 1)
        if placement == BY_ADAPTER:
            other = [segment.tok_s for segment in placed[draw, AT_RANDOM].segments]
            ratio = paired_ratio([segment.tok_s for segment in seen.segments], other)
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
            better = paired_ratio(shares[draw, placement], [max(0.01, s) for s in shares[draw, AT_RANDOM]])
            report.targets.append(Target(f"{draw}: share of hits, by adapter / at random", 1.0, better))
        report.rows.append(row)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 2)
