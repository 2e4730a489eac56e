"""MLflow's own server for the time of a benchmark: sqlite and artifacts in a folder, no password, on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pedro.cluster import free_port

STARTS_S = 180
ENDS_S = 30


class MlflowServer:
    """A server of what lies in `folder`; killed and started again it has what it had, at the same address."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", folder / "mlflow.log"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
        self._command += [f"--backend-store-uri=sqlite:///{folder}/server.db"]
        self._command += [f"--default-artifact-root={folder}/artifacts"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log, env=env, start_new_session=True)
        self._process = process
        until = time.monotonic() + STARTS_S
        while not _answers(f"{self.url}/health"):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"MLflow's server did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """As if its machine had failed, with its workers."""
        self._end(signal.SIGKILL)

    def end(self) -> None:
        """Let it go."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, number)
        try:
            self._process.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(ENDS_S)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A server for the time of the block; the folder is there already."""
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.end()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - loopback
            return True
    except OSError:
        return False
