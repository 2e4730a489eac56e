"""MLflow's own server with its `basic-auth` app, for the tests: an admin, a database and artifacts in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from pedro.cluster import free_port

STARTS_S = 180
ADMIN = ("admin", "word-of-the-admin")


@dataclass(frozen=True)
class MlflowServer:
    """A server that asks for a password."""

    url: str
    folder: Path

    @property
    def database(self) -> str:
        """What `mlflow server` has as its backend store."""
        return f"sqlite:///{self.folder}/server.db"

    def make_user(self, name: str, password: str) -> None:
        """A user with no more rights than everybody has."""
        body = {"username": name, "password": password}
        httpx.post(f"{self.url}/api/2.0/mlflow/users/create", json=body, auth=ADMIN, timeout=60).raise_for_status()

    def found(self, text: str) -> list[str]:
        """In which of its files a text stands, names included."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path.name != "log"]
        return [str(path) for path in files if text in str(path) or text.encode() in path.read_bytes()]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """The server for the time of the block."""
    folder.mkdir(parents=True)
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = sqlite:///{folder}/auth.db\n"
        f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 600\n"  # a password costs tenths of a second to check, and each request has one
    )
    port = free_port()
    server = MlflowServer(f"http://127.0.0.1:{port}", folder)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test"}
    env |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-m", "mlflow", "server", "--app-name=basic-auth", "--host=127.0.0.1", f"--port={port}"]
    command += ["--workers=1", f"--backend-store-uri={server.database}", "--serve-artifacts"]
    command += [f"--artifacts-destination={folder}/artifacts"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        until = time.monotonic() + STARTS_S
        while not _answers(server.url):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # it has workers of its own
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
