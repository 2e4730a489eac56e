"""An hour's churn in ten minutes: what grows that should not, in processes, tables and folders.

Adapters are loaded, evicted, pinned and moved; answers are streamed and left in the middle; files, batches, jobs, keys
and webhooks come and go. From half of the time to its end, no process may gain 5 % of memory, nor descriptors, nor
threads; once all is deleted again, no file and no row of what is deleted may be left.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from jobs.benchmarks.local_server import TENANT, LocalServer, local_server, register_version
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.soak_churn import Churn

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.registry import Registry

COLUMNS = (
    *("process", "mb_at_half", "mb_at_end", "growth"),
    *("fds_at_half", "fds_at_end", "threads_at_half", "threads_at_end"),
)
SECONDS, QUICK_S = 600.0, 30.0
ADAPTERS, RESIDENT = 12, 5  # so many names with two versions each; so many versions have room
PREFIX_MB = 16  # full long before half of the time
LOOK_S = 2.0
GROWTH, GROWTH_MB, MORE = 1.05, 4.0, 4  # MB that an allocator may gather in a small process; descriptors, threads
NAMES = {  # of a process, by what stands in its command line
    "ServeReplica:pedro:engine": "engine",
    "ServeReplica:pedro:gateway": "gateway",
    "ServeController": "Serve's controller",
    "ProxyActor": "Serve's proxy",
    "gcs_server": "Ray's GCS",
    "raylet/raylet": "raylet",
    "dashboard/dashboard.py": "Ray's dashboard",
    "dashboard/agent.py": "Ray's agent",
    "runtime_env/agent": "Ray's environments",
    "log_monitor.py": "Ray's log monitor",
    "monitor.py": "Ray's monitor",
}
OWN = ("engine", "gateway")
EMPTIED = ("files", "batch_answers", "webhook_endpoints", "webhook_deliveries")


@dataclass
class _Seen:
    """What one process held, each time that it was looked at."""

    name: str
    mb: list[float] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def add(self, process: psutil.Process) -> None:
        self.mb.append(process.memory_full_info().uss / 2**20)
        self.fds.append(process.num_fds())
        self.threads.append(process.num_threads())


def soak_report(options: Options, log: Log) -> BenchmarkReport:
    """Churn, and what processes, tables and folders held meanwhile and afterwards."""
    from jobs.benchmarks.demo_server import adapted, backbone_with_words
    from jobs.benchmarks.random_adapters import WEIGHTS, adapter_directories
    from pedro.backbone import resolve_backbone
    from pedro.serving.config import ServeConfig

    size = MODEL_SIZES[(options.models or ("S",))[0]]
    seconds = QUICK_S if options.quick else SECONDS
    backbone = resolve_backbone(str(backbone_with_words(size)))
    sources = adapter_directories(size, "pedro", 2 * ADAPTERS)
    names = [f"soak{number}" for number in range(ADAPTERS)]

    def register(registry: Registry, home: Path) -> None:
        log(f"registering two versions of {ADAPTERS} adapters on {size.name}")
        for number, source in enumerate(sources):
            name, directory = names[number // 2], adapted(source, backbone, home)
            version = register_version(registry, directory, name)
            if version == 1:
                registry.promote(f"{TENANT}.{name}", version)

    config = ServeConfig(
        backbone=str(backbone.directory),
        served_name=size.name,
        threads=options.threads,
        adapter_budget_mb=RESIDENT * (sources[0] / WEIGHTS).stat().st_size / 2**20,
        prefix_cache_mb=PREFIX_MB,
    )
    settings = {"model": size.name, "seconds": seconds, "adapters": ADAPTERS, "resident": RESIDENT}
    report = BenchmarkReport("soak", settings)
    with local_server(config, register, log) as local:
        local.store.set_quota(tenant=TENANT, requests_per_minute=10_000_000, tokens_per_day=10_000_000_000)
        before = _held(local)
        churn = Churn(local, [f"{TENANT}.{name}" for name in names], size.name, prompts(size, 64, 24, seed=0))
        seen = asyncio.run(_soak(local, churn, seconds, log))
        after = _held(local)
    _report(report, seen, before, after, churn)
    return report


async def _soak(local: LocalServer, churn: Churn, seconds: float, log: Log) -> dict[int, _Seen]:
    """Keep it up for so long, looking every few seconds; then have everything deleted."""
    seen = {process.pid: _Seen(_name(process)) for process in _processes(local.settings.home)}
    began = time.monotonic()
    async with churn.running():
        while (spent := time.monotonic() - began) < seconds:
            await asyncio.sleep(LOOK_S)
            for pid, one in seen.items():
                with suppress(psutil.Error):
                    await asyncio.to_thread(one.add, psutil.Process(pid))
            if int(spent / 60) != int((spent - LOOK_S) / 60):
                own = ", ".join(
                    f"{one.name} {one.mb[-1]:.1f} MB" for one in seen.values() if one.name in OWN and one.mb
                )
                log(f"  {spent:4.0f} s: {sum(churn.done.values()):,} requests, {own}")
    await churn.delete_all()
    looks = max(len(one.mb) for one in seen.values())
    return {pid: one for pid, one in seen.items() if len(one.mb) == looks}  # Ray's idle workers come and go


def _processes(home: Path) -> list[psutil.Process]:
    """Those that the server of this home consists of."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PEDRO_HOME") == str(home) and _name(process):
                found.append(process)
    return found


def _name(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return next((name for part, name in NAMES.items() if part in line), "")


def _held(local: LocalServer) -> dict[str, int]:
    """Rows of each table of the database, files of each folder of the home."""
    home = local.settings.home
    held = {f"{folder.name}/": sum(1 for each in folder.rglob("*") if each.is_file()) for folder in _folders(home)}
    with closing(sqlite3.connect(f"file:{home / 'pedro.db'}?mode=ro", uri=True)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            held[table] = database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]  # noqa: S608
    return held


def _folders(home: Path) -> list[Path]:
    return sorted(each for each in home.iterdir() if each.is_dir())


def _report(
    report: BenchmarkReport,
    seen: Mapping[int, _Seen],
    before: Mapping[str, int],
    after: Mapping[str, int],
    churn: Churn,
) -> None:
    for one in sorted(seen.values(), key=lambda one: -one.mb[-1]):
        row: dict[str, Any] = {"process": one.name}
        for name, values in (("mb", one.mb), ("fds", one.fds), ("threads", one.threads)):
            width = max(1, len(values) // 10)
            middle = values[len(values) // 2 - width // 2 :][:width]
            half, end = float(median(middle)), float(median(values[-width:]))
            row |= {f"{name}_at_half": round(half, 1), f"{name}_at_end": round(end, 1)}
        row["growth"] = round(row["mb_at_end"] / row["mb_at_half"], 4)
        report.rows.append(row)
        allowed = max(GROWTH, 1 + GROWTH_MB / row["mb_at_half"])
        report.targets.append(
            Target(f"{one.name}: memory at the end to that at half", round(allowed, 4), exactly(row["growth"]), True)
        )
        for what in ("fds", "threads"):
            gained = row[f"{what}_at_end"] - row[f"{what}_at_half"]
            report.targets.append(Target(f"{one.name}: {what} gained", MORE, exactly(gained), at_most=True))
    for table in EMPTIED:
        left = after.get(table, 0) - before.get(table, 0)
        report.targets.append(Target(f"rows left in {table}", 0, exactly(left), at_most=True))
    left = after.get("storage/", 0) - before.get("storage/", 0)
    report.targets.append(Target("files left in the storage", 0, exactly(left), at_most=True))
    report.targets.append(Target("requests that failed", 0, exactly(len(churn.failures)), at_most=True))
    report.facts |= {
        "requests": dict(sorted(churn.done.items())),
        "failures": churn.failures[:5],
        "held": {name: [before.get(name, 0), count] for name, count in sorted(after.items()) if count},
    }
