"""Names, aliases and versions at scale: how soon a moved alias is served by every gateway, and what following costs.

PostgreSQL runs from a wheel's binaries, MLflow as a server that hears of each move over HTTP, and four gateways each
in a process of its own, as far as they follow the store (`workers/catalogue.py`): no engine takes part.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.mlflow_server import mlflow_server
from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import percentile
from jobs.benchmarks.workers.catalogue import BACKBONE
from pedro.config import Settings
from pedro.refs import ModelRef
from pedro.registry import Registry, Version, utc
from pedro.store import Inherited

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

COLUMNS = (
    *("names", "entered_s", "learn_s", "moves", "move_ms", "served_p50_s", "served_p99_s"),
    *("idle_share", "questions", "mib", "known"),
)
NAMES, QUICK = (1_000, 10_000, 100_000), (1_000,)
GATEWAYS, TENANTS, IN_MLFLOW, IDLE_S = 4, 100, 20, 30.0
SERVED_S, IDLE_SHARE, QUESTIONS = 2.0, 0.01, 1.0


def control_plane_report(options: Options, log: Log) -> BenchmarkReport:
    """Fill a database with names, have three gateways know them, idle, then move aliases."""
    from jobs.benchmarks.postgres_server import running_server

    moves = options.rounds or (30 if options.quick else 200)
    report = BenchmarkReport("control_plane", {"gateways": GATEWAYS, "moves": moves, "idle_s": IDLE_S})
    home = bench_folder() / "control_plane"
    shutil.rmtree(home, ignore_errors=True)
    try:
        home.mkdir(parents=True)
        log("starting MLflow's server")
        with running_server() as postgres, mlflow_server(home) as mlflow:
            for count in QUICK if options.quick else NAMES:
                database = postgres.ready_database()
                env = {"PEDRO_HOME": str(home), "PEDRO_DATABASE_URL": database, "MLFLOW_TRACKING_URI": mlflow.url}
                report.rows.append(_measure(env, count, moves, log))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    for row in report.rows:
        label = f"{row['names']:,} names: "
        report.targets += [
            Target(f"{label}s until served everywhere, p99", SERVED_S, exactly(row["served_p99_s"]), at_most=True),
            Target(f"{label}share of a core, idle", IDLE_SHARE, exactly(row["idle_share"]), at_most=True),
            Target(
                f"{label}questions a gateway and interval, idle", QUESTIONS, exactly(row["questions"]), at_most=True
            ),
        ]
    return report


def _measure(env: dict[str, str], count: int, moves: int, log: Log) -> dict[str, Any]:
    registry = Registry.open(Settings.from_env(env))
    names = [f"tenant{number % TENANTS:02d}.of-{count}-{number // TENANTS}" for number in range(count)]
    log(f"{count:,} names: entering them")
    registry.take_over()  # of none: from now on nobody looks in MLflow
    scratch = Path(env["PEDRO_HOME"]) / f"made-{count}"
    _register(registry, names[:IN_MLFLOW], scratch)
    began = time.perf_counter()
    registry.store.take_over(_inherited(name) for name in names[IN_MLFLOW:])
    entered_s = time.perf_counter() - began
    with ExitStack() as running:
        gateways = [running.enter_context(_gateway(env)) for _ in range(GATEWAYS)]
        known = names[: max(count // 2, IN_MLFLOW)]
        log(f"{count:,} names: {GATEWAYS} gateways learn {len(known):,} of them, then idle")
        warmed = _ask(gateways, {"do": "warm", "names": known})
        idled = _ask(gateways, {"do": "idle", "seconds": IDLE_S})
        targets = [(names[number % IN_MLFLOW], 2 - number // IN_MLFLOW % 2) for number in range(moves)]
        log(f"{count:,} names: {moves} moves")
        for gateway in gateways:
            _tell(gateway, {"do": "moves", "targets": targets})
        moved, took = [], []
        for name, version in targets:
            moved.append(time.time())
            registry.promote(name, version)
            took.append((time.time() - moved[-1]) * 1000)
            for gateway in gateways:
                _read(gateway)
        heard = [_read(gateway)["heard"] for gateway in gateways]
    served = [max(moments) - began for began, *moments in zip(moved, *heard, strict=True)]
    return {
        "names": count,
        "entered_s": round(entered_s, 1),
        "moves": moves,
        "move_ms": round(median(took), 1),
        "served_p50_s": round(median(served), 3),
        "served_p99_s": round(percentile(served, 0.99), 3),
        "idle_share": round(max(one["share_of_a_core"] for one in idled), 4),
        "questions": round(max(one["questions"] for one in idled), 3),
        "mib": round(max(one["mib"] for one in warmed), 1),
        "known": len(known),
        "rss_mib": round(max(one["rss_mib"] for one in warmed)),
        "learn_s": round(max(one["seconds"] for one in warmed), 1),
        "unmirrored": len(registry.mirror()),
    }


def _inherited(name: str) -> Inherited:
    ref = ModelRef.parse(name)
    versions = tuple(
        Version(
            ref.tenant, ref.adapter, number, f"sha256:{number}", "b", BACKBONE, "pedro", 1, {}, {}, "", "run", utc(0)
        )
        for number in (1, 2)
    )
    return Inherited(name, 0.0, {"champion": 1}, versions)


def _register(registry: Registry, names: list[str], scratch: Path) -> None:
    """The names that will be moved, with two versions each whose weights are one zero."""
    from safetensors.torch import save_file
    from torch import zeros

    from pedro.adapter_directory import WEIGHTS, write_manifest

    for number in (1, 2):
        directory = scratch / str(number)
        directory.mkdir(parents=True)
        save_file({f"version {number}": zeros(1)}, directory / WEIGHTS)
        (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "PEDRO"}))
        write_manifest(directory, {"backbone": {"id": "b", "digest": BACKBONE}, "method": {"name": "pedro"}})
        for name in names:
            run = registry.start_run(experiment="control plane", name=name, params={}, tags={})
            ref = ModelRef.parse(name)
            registry.register(run, directory, ref.tenant, ref.adapter)
    for name in names:
        registry.promote(name, 1)


@contextmanager
def _gateway(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.benchmarks.workers.catalogue"],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _ask(gateways: list[subprocess.Popen[str]], command: dict[str, Any]) -> list[dict[str, Any]]:
    for gateway in gateways:
        _tell(gateway, command)
    return [_read(gateway) for gateway in gateways]


def _tell(gateway: subprocess.Popen[str], command: dict[str, Any]) -> None:
    assert gateway.stdin is not None, "it was started with a pipe"
    gateway.stdin.write(json.dumps(command) + "\n")
    gateway.stdin.flush()


def _read(gateway: subprocess.Popen[str]) -> dict[str, Any]:
    assert gateway.stdout is not None, "it was started with a pipe"
    line = gateway.stdout.readline()
    if not line:
        raise RuntimeError("a gateway ended; see its error above")
    answer: dict[str, Any] = json.loads(line)
    return answer
