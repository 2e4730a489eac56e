"""A whole platform for the browser: a home with everything in it, `pedro serve` on it, and the dashboard in front.

All of it is started as its users start it, by the command line, and ended by `pedro down`.
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

import yaml
from dashboard_home import copy_of_home
from dashboard_results import add_comparison, add_jobs, add_sweep

from pedro.config import Settings
from pedro.data.demo import demo_tenant

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = "acme.voice"
STEPS = (10, 80)  # of its two versions


@dataclass
class Stack:
    """Where the dashboard and the gateway answer, and the key to the latter."""

    port: int
    gateway: str
    admin: str
    home: Path


@contextlib.contextmanager
def stack(folder: Path, home: Path | None = None) -> Iterator[Stack]:
    """Start it all on `home`, or on a home made in `folder`, where two versions of an adapter are really trained."""
    given = home is not None
    home = home or make_home(folder)
    env = environment(home)
    try:
        if not given:
            train(folder, env)
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
        deadline = time.monotonic() + 120
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
        server.wait(timeout=30)


def make_home(folder: Path) -> Path:
    """The demo's home with made-up numbers, jobs, a sweep and two comparisons."""
    home = copy_of_home(folder / "home")
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    add_jobs(settings)
    add_sweep(settings)
    add_comparison(home / "comparisons")
    add_comparison(home / "comparisons", "tiny_figure3", (5000, 20000, 80000))
    return home


def train(folder: Path, env: dict[str, str]) -> None:
    """Two jobs of the packaged voice commands, the second one trained longer."""
    data = demo_tenant("acme")
    spec = {
        "tenant": "acme",
        "adapter": ADAPTER.partition(".")[2],
        "data": {"train": str(data.train), "test": str(first_rows(data.test, folder / "test.jsonl", 60))},
        "method": {"name": "pedro", "r": 12},
        "training": {"epochs": 10, "lr": 1e-2, "batch_size": 16, "eval_every": 20, "eval_rows": 60, "max_length": 64},
    }
    (folder / "voice.yaml").write_text(yaml.safe_dump(spec))
    for steps in STEPS:
        command(env, "submit", str(folder / "voice.yaml"), f"training.max_steps={steps}", "--wait", "--json")


def first_rows(source: Path, target: Path, count: int) -> Path:
    target.write_text("\n".join(source.read_text().splitlines()[:count]) + "\n")
    return target


def command(env: dict[str, str], *words: str) -> Any:
    """What `pedro …` prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "pedro.cli", *words], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"pedro {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith(("{", "["))))


def environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's own platform."""
    foreign = ("MLFLOW_", "STREAMLIT_", "PEDRO_", "RAY_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**kept, "PEDRO_HOME": str(home), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
