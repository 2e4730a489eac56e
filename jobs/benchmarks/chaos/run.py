"""One chaos run from end to end: a home is filled and served, clients ask, faults come in their order, jobs train.

The report has a row for each kind of fault (what was asked from then until all was there again), one of all requests
and one of all jobs; memory by the minute; and what stands against each promise.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.chaos.clients import CALM, MAX_RETRIES, Clients, Seen
from jobs.benchmarks.chaos.clock import make_clock
from jobs.benchmarks.chaos.faults import (
    DATABASE,
    ENGINE,
    GATEWAY,
    HEAD,
    NOT_LOADED,
    PROXY,
    WHOLE_SERVER,
    Faults,
    schedule,
)
from jobs.benchmarks.chaos.server import ServedHome, ServerSize, wait_until
from jobs.benchmarks.chaos.world import Scale, World, break_, clear, make_world, register
from jobs.benchmarks.job_rounds import CHECKPOINT, CONTROLLER, DRIVER, UNDISTURBED, WORKER, JobRounds
from jobs.benchmarks.mlflow_server import mlflow_server
from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.errors import NotFoundError, PedroError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

COLUMNS = (
    *("case", "times", "sent", "answered", "cancelled", "told_broken", "retried", "repeated", "failed", "wrong"),
    *("longest_gap_s", "whole_again_s", "jobs", "succeeded", "once", "as_undisturbed", "starts", "fell_back"),
)
FULL = Scale(64, tenants=200, adapters=500, resident=20, gateways=3, think_s=5.0)
QUICK = Scale(
    clients=8,
    tenants=5,
    adapters=14,
    resident=5,
    gateways=2,
    moving=2,
    versions=3,
    canaries=1,
    registered=3,
    calm_s=1.0,
    think_s=0.2,
)
QUICK_FAULTS = (DATABASE, ENGINE, GATEWAY, PROXY, HEAD)
ROUNDS, JOBS, KILLS = 1, 2, (WORKER, DRIVER, CONTROLLER, CHECKPOINT)
JOB_ROUNDS = 10
CALM_S, WHOLE_S, SERVER_BACK_S, SAMPLE_S, SEED = 20.0, 240.0, 60.0, 30.0, 0
MANY = 1_000_000_000


@dataclass
class _Fault:
    """What one fault came to."""

    name: str
    seen: Seen
    whole_again_s: float


def load_report(options: Options, log: Log) -> BenchmarkReport:
    """The whole run. `--batches` is the number of clients, `--rounds` how often each fault comes."""
    from jobs.benchmarks.postgres_server import running_server

    if importlib.util.find_spec("openai") is None:
        raise NotFoundError("openai is not installed, whose client asks; pip install '.[dev]'")
    scale = QUICK if options.quick else FULL
    if options.batches:
        scale = replace(scale, clients=options.batches[0])
    rounds = options.rounds or ROUNDS
    size = (options.models or ("S",))[0]
    settings = {"model": size, "seed": SEED, "max_retries": MAX_RETRIES, "rounds": rounds, **vars(scale)}
    report = BenchmarkReport("chaos", settings)
    home = bench_folder() / "chaos"
    with ExitStack() as stack:
        clear(home)
        postgres = stack.enter_context(running_server())
        env = {"PEDRO_HOME": str(home / "home"), "PEDRO_DATABASE_URL": postgres.ready_database()}
        (home / "home").mkdir()
        mlflow = clock = None
        if not options.quick:
            mlflow = stack.enter_context(mlflow_server(home))
            env["MLFLOW_TRACKING_URI"] = mlflow.url
            clock = make_clock(home)
        log(f"{scale.adapters} adapters of {scale.tenants} tenants on {size}: made, and asked in this process")
        world = make_world(size, scale, home)
        server_size = ServerSize(world.backbone.directory, scale.gateways, options.threads, world.resident_mb)
        served = ServedHome(env, server_size, clock.env if clock else {})
        stack.callback(clear, home)
        stack.callback(served.end)
        run = _Run(world, served, scale, log)
        run.fill()
        log(f"serving them, room for {scale.resident} ({world.resident_mb:.2f} MB)")
        served.start()
        rng = random.Random(SEED)  # noqa: S311
        faults = Faults(served, rng, postgres, mlflow, clock.set if clock else None)
        names = [name for name in faults.known if not options.quick or name in QUICK_FAULTS]
        order = schedule(names, rounds, SEED)
        training = None if options.quick else _Training(JobRounds(served.settings, run.store, postgres, log), log)
        if training is not None:
            training.first()
        asyncio.run(run.go(faults, order, training))
        rows = run.rows()
        report.rows = rows + ([training.row()] if training else [])
        report.facts |= run.facts()
        report.targets = run.targets() + (training.targets() if training else [])
        if training is not None:
            report.facts["job_rounds"] = training.rows
    return report


class _Run:
    """The home, whoever asks it, and what was seen."""

    def __init__(self, world: World, served: ServedHome, scale: Scale, log: Log) -> None:
        from pedro.store import Store

        self._world, self._served, self._scale, self._log = world, served, scale, log
        self.store = Store(served.settings.database_url)
        self._clients: Clients | None = None
        self._faults: list[_Fault] = []
        self._broke: list[str] = []
        self._memory: list[dict[str, float]] = []
        self._seconds = 0.0

    def fill(self) -> None:
        """Register all, then damage what is to be broken."""
        from pedro.registry import Registry

        registry = Registry.open(self._served.settings)
        registry.take_over()  # of none: a server's database is served only once that was looked for
        began = time.monotonic()
        register(self._world, registry, self._scale)
        self._log(f"  registered in {time.monotonic() - began:.0f} s")
        break_(self._world, (self._served.home, self._served.home.parent / "artifacts"), registry)

    async def go(self, faults: Faults, order: Sequence[str], training: _Training | None) -> None:
        """Ask for a while, then have each fault come, and wait until all that serves is there again."""
        keys = {}
        for tenant in self._world.tenants:
            keys[tenant] = self.store.create_key(tenant, ("infer",), "chaos")[1]
            self.store.set_quota(tenant=tenant, requests_per_minute=MANY // 1000, tokens_per_day=MANY)
        admin = self.store.create_key("operator", ("admin",), "chaos")[1]
        clients = Clients(
            self._world,
            self._served.url,
            keys,
            admin,
            seed=SEED,
            count=self._scale.clients,
            think_s=self._scale.think_s,
        )
        self._clients = clients
        began = time.monotonic()
        asking = asyncio.create_task(clients.run())
        sampling = asyncio.create_task(self._sample(began))
        thread = training.start() if training else None
        try:
            await asyncio.sleep(CALM_S / (4 if training is None else 1))
            for number, name in enumerate(order, start=1):
                await self._one(faults, name, f"{number} of {len(order)}", asking)
            clients.begin(CALM)
            if training is not None and thread is not None:
                self._log("the faults are over; waiting for the jobs")
                training.enough.set()
                await asyncio.to_thread(thread.join)
        finally:
            clients.stop()
            sampling.cancel()
            self._seconds = time.monotonic() - began
            await asyncio.gather(asking, sampling, return_exceptions=True)
        if asking.done() and (broke := asking.exception()) is not None:
            raise broke

    async def _one(self, faults: Faults, name: str, which: str, asking: asyncio.Task[None]) -> None:
        assert self._clients is not None, "it was made before"
        if asking.done():
            asking.result()
        lenient, began = name in NOT_LOADED, time.monotonic()
        seen = self._clients.begin(name, lenient)
        try:
            await asyncio.to_thread(faults.known[name])
            await asyncio.to_thread(wait_until, self._served.whole, WHOLE_S, f"the server is whole again after: {name}")
        except (AssertionError, OSError, RuntimeError, PedroError) as error:  # the others still come
            self._broke.append(f"{name}: {error!s:.300}")
            self._log(f"  {self._broke[-1]}")
        took = time.monotonic() - began
        calm = self._clients.begin(CALM, lenient)
        until = time.monotonic() + WHOLE_S
        while (seen.open or not calm.answered) and time.monotonic() < until:
            await asyncio.sleep(0.1)  # a client's few tries are for one fault
        await asyncio.sleep(self._scale.calm_s)
        self._faults.append(_Fault(name, seen, took))
        wrong, failed = sum(seen.wrong.values()), len(seen.failures)
        told = f"whole after {took:.1f} s, {seen.answered} answered, {failed} failed, {wrong} wrong"
        self._log(f"  {which}: {name}: {told}")
        for line in (*seen.failures[:3], *filter(None, [seen.first_wrong])):
            self._log(f"      {line}")

    async def _sample(self, began: float) -> None:
        while True:
            sizes = await asyncio.to_thread(self._served.memory_mb)
            self._memory.append({"minute": round((time.monotonic() - began) / 60, 2), **sizes})
            await asyncio.sleep(SAMPLE_S)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each case in the order in which they came first, then one of all."""
        assert self._clients is not None, "it was made before"
        cases = list(dict.fromkeys(seen.case for seen in self._clients.seen))
        rows = []
        for case in cases:
            row = _row(case, [seen for seen in self._clients.seen if seen.case == case])
            took = [fault.whole_again_s for fault in self._faults if fault.name == case]
            if took:
                row |= {"times": len(took), "whole_again_s": round(max(took), 1)}
            rows.append(row)
        total = _row("all", self._clients.seen) | {"times": len(self._faults)}
        return [*rows, total]

    def facts(self) -> dict[str, Any]:
        assert self._clients is not None, "it was made before"
        clients = self._clients
        kinds: Counter[str] = Counter()
        for seen in clients.seen:
            kinds += seen.wrong
        moves = sum(len(moves) - 1 for moves in clients.moves.values())
        counts = [clients.by_client[number] for number in range(self._scale.clients)]
        return {
            "load_seconds": round(self._seconds, 1),
            "wrong_by_kind": dict(kinds),
            "not_whole_again": self._broke,
            "alias_moves": moves,
            "alias_moves_not_made": clients.moves_failed,
            "told_apart": round(self._world.told_apart(), 4),
            "fairness": {"least_of_a_client": min(counts), "median": median(counts), "most": max(counts)},
            "memory_mb": _minutes(self._memory),
        }

    def targets(self) -> list[Target]:
        assert self._clients is not None, "it was made before"
        everything = self._clients.seen
        failed = sum(len(seen.failures) for seen in everything)
        wrong = sum(sum(seen.wrong.values()) for seen in everything)
        targets = [
            Target("requests failed that named no broken adapter", 0, exactly(failed), at_most=True),
            Target("answers of another version, tenant or the bare model", 0, exactly(wrong), at_most=True),
            Target("faults after which the server was not whole again", 0, exactly(len(self._broke)), at_most=True),
            Target("requests that were told of their broken adapter", 1, exactly(sum(s.broken for s in everything))),
        ]
        again = [fault.whole_again_s for fault in self._faults if fault.name in WHOLE_SERVER]
        if again and self._scale is not QUICK:  # which runs beside other tests
            name = "s until the server is whole again after its head or raylet died"
            targets.append(Target(name, SERVER_BACK_S, exactly(round(max(again), 1)), at_most=True))
        return targets


def _row(case: str, parts: Sequence[Seen]) -> dict[str, Any]:
    wrong, failures = [sum(part.wrong.values()) for part in parts], [f for part in parts for f in part.failures]
    row: dict[str, Any] = {"case": case}
    for key in ("sent", "answered", "cancelled", "retried", "repeated"):
        row[key] = sum(getattr(part, key) for part in parts)
    row |= {"told_broken": sum(part.broken for part in parts), "failed": len(failures), "wrong": sum(wrong)}
    row["longest_gap_s"] = round(max(part.longest_gap_s for part in parts), 1)
    first_wrong = next((part.first_wrong for part in parts if part.first_wrong), None)
    told = {"first_failure": failures[0] if failures else None, "first_wrong": first_wrong}
    return row | {key: text for key, text in told.items() if text}


def _minutes(samples: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The last sample of each minute."""
    by_minute = {int(sample["minute"]): dict(sample) for sample in samples}
    return [by_minute[minute] for minute in sorted(by_minute)]


class _Training:
    """Rounds of small jobs beside the load, each disturbed as a seed has it."""

    def __init__(self, rounds: JobRounds, log: Log) -> None:
        self._rounds, self._log = rounds, log
        self._rng = random.Random(SEED)  # noqa: S311
        self.enough = threading.Event()
        self.rows: list[dict[str, Any]] = []
        self._broke: list[str] = []

    def first(self) -> None:
        """What the jobs end as when nothing disturbs them."""
        self.rows.append(self._rounds.run("calm", UNDISTURBED, JOBS, ()))

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            for number in range(1, JOB_ROUNDS + 1):
                if self.enough.is_set():
                    return
                kills = self._rng.sample(KILLS, 2)
                self.rows.append(self._rounds.run(f"k{number}", f"round {number}", JOBS, kills, all_of_them=False))
        except Exception as error:  # noqa: BLE001 - whatever it is, the report tells it
            self._log(f"the jobs broke: {error!r}")
            self._broke.append(f"{error!r:.500}")

    def row(self) -> dict[str, Any]:
        """All rounds together."""
        row: dict[str, Any] = {"case": "jobs", "times": sum(len(one.get("disturbed", ())) for one in self.rows)}
        for key in ("jobs", "succeeded", "once", "as_undisturbed", "starts", "fell_back"):
            row[key] = sum(one[key] for one in self.rows)
        return row | ({"first_failure": self._broke[0]} if self._broke else {})

    def targets(self) -> list[Target]:
        row = self.row()
        names = {"succeeded": "jobs that succeeded", "once": "jobs whose adapter was registered once"}
        names["as_undisturbed"] = "jobs that ended with the digest of the undisturbed run"
        targets = [Target(name, row["jobs"], exactly(row[key])) for key, name in names.items()]
        return [*targets, Target("rounds of jobs that were lost", 0, exactly(len(self._broke)), at_most=True)]
