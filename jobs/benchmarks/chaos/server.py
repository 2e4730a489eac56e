"""A real `pedro serve` of a home on PostgreSQL, in a process of its own, and the processes that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from jobs.benchmarks.home_processes import of_home
from pedro.cluster import find_head
from pedro.config import Settings
from pedro.errors import PedroError

STARTS_S, ENDS_S, LOOK_S = 300.0, 90.0, 0.5
KINDS = {
    "engine": "ServeReplica:pedro:engine",
    "gateway": "ServeReplica:pedro:gateway",
    "proxy": "ProxyActor",
    "Serve's controller": "ServeController",
    "queue's controller": "pedro.training.queue.process",
    "raylet": "/raylet/raylet",
    "GCS": "/gcs/gcs_server",
}
"""What a process of the home is called, and the part of its command line by which it is found."""


@dataclass(frozen=True)
class ServerSize:
    """What is served, and by how many of each."""

    backbone: Path
    gateways: int
    threads: int
    adapter_budget_mb: float


class ServedHome:
    """`pedro serve` in the foreground, which sees to what dies; `env` names its home, database and so on."""

    def __init__(self, env: dict[str, str], size: ServerSize, more: dict[str, str]) -> None:
        """`more` are variables of the server's processes alone."""
        self.settings = Settings.from_env(env)
        self._size, self.home = size, self.settings.home
        self._env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
        self._env |= env | more
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def start(self) -> None:
        """Return when it answers."""
        out = self.home / "serve.out"
        words = ["serve", "--backbone", self._size.backbone, "--port", 0, "--json"]
        words += ["--gateways", self._size.gateways, "--threads", self._size.threads]
        words += ["--adapter-budget-mb", self._size.adapter_budget_mb]
        command = [sys.executable, "-m", "pedro.cli", *map(str, words)]
        with out.open("wb") as stdout, (self.home / "serve.err").open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, env=self._env, start_new_session=True
            )
        until = time.monotonic() + STARTS_S
        while not out.read_text().strip():
            if self._process.poll() is not None or time.monotonic() > until:
                raise PedroError(f"pedro serve did not start: {(self.home / 'serve.err').read_text()[-2000:]}")
            time.sleep(LOOK_S)
        said = json.loads(out.read_text().splitlines()[0])
        if "url" not in said:
            raise PedroError(f"pedro serve did not start: {said}")
        self.url = str(said["url"])

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self) -> None:
        """As Ctrl-C does; whatever is left then goes, too."""
        from pedro.serving.deploy import end
        from pedro.training.queue.process import end_controller

        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_S)
            self._process.kill()
            self._process.wait()
        end_controller(self.settings)
        end(self.settings)

    def processes(self, kind: str) -> list[psutil.Process]:
        """Those of one of KINDS."""
        return of_home(self.home, KINDS[kind])

    def whole(self) -> bool:
        """Whether everything that serves is there and says that it is ready."""
        wanted = {"engine": 1, "gateway": self._size.gateways, "proxy": 1, "Serve's controller": 1}
        wanted |= {"raylet": 1, "GCS": 1, "queue's controller": 1}
        found = self._count()
        if find_head(self.settings) is None or any(found[kind] < count for kind, count in wanted.items()):
            return False
        try:
            for _ in range(2 * self._size.gateways):
                reply = httpx.get(f"{self.url}/ready", timeout=5)
                if reply.status_code != 200 or reply.json()["status"] != "ready":
                    return False
        except (httpx.HTTPError, ValueError, KeyError):
            return False
        return True

    def _count(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for process in of_home(self.home, ""):
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                found.update(kind for kind, title in KINDS.items() if title in line)
        return found

    def memory_mb(self) -> dict[str, float]:
        """MB that belong to processes of a kind alone, the largest of each; and of all together."""
        sizes = {"all": 0.0}
        for process in of_home(self.home, ""):
            with suppress(psutil.Error):
                line, mb = " ".join(process.cmdline()), process.memory_full_info().uss / 2**20
                sizes["all"] += mb
                for kind, title in KINDS.items():
                    if title in line:
                        sizes[kind] = max(mb, sizes.get(kind, 0.0))
        return {kind: round(mb, 1) for kind, mb in sizes.items()}


def wait_until(condition: Callable[[], bool], limit_s: float, what: str) -> float:
    """Seconds until it held. Raises PedroError once the limit has passed."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > limit_s:
            raise PedroError(f"{what}: not within {limit_s:g} s")
        time.sleep(LOOK_S)
    return time.monotonic() - began
