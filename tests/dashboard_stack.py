"""A whole platform for the browser: a home with everything in it, `pedro serve` on it, and the dashboard in front.

Server and dashboard are started as their users start them, by the command line, and ended by `pedro down`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashboard_home import copy_of_home
from dashboard_results import add_comparison, add_jobs, add_rows, add_sweep
from serving_adapters import make_adapter

from pedro.config import Settings
from pedro.registry import Registry
from pedro.store import Store

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "acme.voice"


@dataclass
class Stack:
    """Where the dashboard and the gateway answer, and the key to the latter."""

    port: int
    gateway: str
    admin: str
    home: Path


@contextlib.contextmanager
def stack(folder: Path, home: Path | None = None) -> Iterator[Stack]:
    """Start it all on `home`, or on a home made in `folder`."""
    home = home or make_home(folder)
    env = environment(home)
    try:
        served = command(env, "serve", "--port", "0", "--detach", "--json")
        key = command(env, "keys", "create", "ops", "--scope", "admin", "--json")
        with dashboard(env) as port:
            yield Stack(port, served["url"], key["secret"], home)
    finally:
        command(env, "down", "--json", "--yes")


@contextlib.contextmanager
def dashboard(env: dict[str, str]) -> Iterator[int]:
    """`pedro dashboard` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "pedro.cli", "dashboard", f"--port={port}"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert server.poll() is None, f"the dashboard ended with {server.returncode}"
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            assert time.monotonic() < deadline, "the dashboard did not come up in time"
            time.sleep(0.2)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=120)


def make_home(folder: Path) -> Path:
    """The demo's home with made-up numbers, jobs, a sweep, two comparisons, and an adapter that can be served."""
    home = copy_of_home(folder / "home")
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    add_jobs(settings)
    add_sweep(settings)
    add_adapter(settings, folder)
    add_rows(add_comparison(home / "comparisons"))
    add_comparison(home / "comparisons", "tiny_figure3", (5000, 20000, 80000))
    return home


def add_adapter(settings: Settings, folder: Path) -> None:
    """Two versions that a server can load, the second one the champion, and the job that made it."""
    registry, store = Registry.open(settings), Store(settings.database_url)
    tenant, _, adapter = ADAPTER.partition(".")
    job = store.create_job(tenant, adapter, {"method": {"name": "pedro"}}, "ftjob-voice")
    for version in (1, 2):
        make_adapter(folder / f"made-{version}", seed=version)
        run = registry.start_run(experiment=ADAPTER, name=job.id, params={}, tags={"job": job.id})
        for step in range(10, 101, 10):
            registry.log_metrics(run, step, {"train/loss": 2 / step, "dev/loss": 2.2 / step})
        registry.register(run, folder / f"made-{version}", tenant, adapter)
        registry.finish_run(run)
        registry.promote(ADAPTER, version)
    store.update_job(job.id, status="running", submission_id=job.id)
    store.update_job(job.id, status="succeeded", result={"model": f"{ADAPTER}:2", "metrics": {"accuracy": 0.5}})
    store.close()


def command(env: dict[str, str], *words: str) -> Any:
    """What `pedro …` prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "pedro.cli", *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, f"pedro {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith(("{", "["))))


def environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's own platform."""
    foreign = ("MLFLOW_", "STREAMLIT_", "PEDRO_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PEDRO_HOME": str(home), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
