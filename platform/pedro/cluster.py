"""Finds the Ray cluster to work on, or starts the one local head of this PEDRO_HOME, for jobs and servers alike.

With `RAY_ADDRESS` set the cluster is somebody else's and is only connected to. Without it, one detached head per
PEDRO_HOME is started on loopback with token authentication, reused by every command, and ended by `pedro down`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pedro.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import psutil

    from pedro.config import Settings

Answer = TypeVar("Answer")

START_TIMEOUT_S = 180  # 10 on an idle machine
PROBE_TIMEOUT_S = 5
CONNECT_TIMEOUT_S = 60  # 3 on an idle machine
LEAN_HEAD = {
    "RAY_START_HOOK": "pedro.cluster.without_client_server",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # by default a head that ends waits for what it runs, which ends too
    # Serve's processes talk by gRPC: what streams costs them a fraction of what it does as results of Ray's actors
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "-1",  # 4 MiB by default, which a whole answer may exceed
    # and each has one event loop, where Serve has up to three, between whose threads every event would go
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
OBJECT_STORE_BYTES = 256 << 20  # the platform passes paths between processes, not tensors


@dataclass(frozen=True)
class Head:
    """The local head of one PEDRO_HOME. `started` guards against another process having taken its pid."""

    address: str
    dashboard_url: str
    pid: int
    started: float


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that answers."""

    address: str
    dashboard_url: str
    nodes: int
    local: bool


def connect(settings: Settings, log: Callable[[str], None] = lambda _line: None, *, attach: bool = False) -> Cluster:
    """The cluster of `settings`, reachable; the local head is started if there is none.

    `attach` makes this process a Ray driver, which serving needs and jobs do not.

    Raises UnavailableError if nothing answers, ConfigError if the cluster spans hosts but storage does not.
    """
    external = settings.ray_address
    if external is None:
        prepare_environment(settings)
        head = _ensure_head(settings, log)
        if not attach:
            return Cluster(head.address, head.dashboard_url, nodes=1, local=True)
        address = head.address
    else:
        address = external
    import ray

    if not ray.is_initialized():
        _probe(address)
        try:
            init = partial(ray.init, namespace="pedro", log_to_driver=False, logging_level=logging.ERROR)
            within(CONNECT_TIMEOUT_S, partial(init, address=address))  # what listens may be no Ray at all
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise _no_cluster(address, type(error).__name__) from error
    nodes = [node for node in ray.nodes() if node["Alive"]]
    check_storage(settings, hosts=len({node["NodeManagerHostname"] for node in nodes}))
    return Cluster(address, _dashboard_url(), len(nodes), local=external is None)


def _no_cluster(address: str, reason: str) -> UnavailableError:
    return UnavailableError(
        f"RAY_ADDRESS: no Ray cluster answers at {address} ({reason}); check the address and, where the cluster wants "
        "a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
        param="RAY_ADDRESS",
    )


def _probe(address: str) -> None:
    """See that something listens: Ray itself tries for a quarter of an hour before it gives an address up."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(
            f"RAY_ADDRESS: expected host:port of a cluster's head (6379 by default), ray://host:port or auto, "
            f"got {address!r}",
            param="RAY_ADDRESS",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error) or type(error).__name__) from error


def within(limit_s: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises; TimeoutError if that takes too long, and the call is left to itself."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return answers[0]


def check_storage(settings: Settings, hosts: int) -> None:
    """Raise ConfigError if the cluster has several hosts and some of the settings only work on one."""
    if hosts > 1 and settings.single_host():
        raise ConfigError(
            f"the cluster has {hosts} hosts, but these live on one host's disk: {', '.join(settings.single_host())}; "
            "point MLFLOW_TRACKING_URI at an MLflow server, PEDRO_DATABASE_URL at PostgreSQL and PEDRO_STORAGE at "
            "storage that every host reaches (s3://…, gs://…)",
            param="RAY_ADDRESS",
        )


def find_head(settings: Settings) -> Head | None:
    """The local head of this home, if it runs."""
    import psutil

    try:
        head = Head(**json.loads(_record(settings).read_text()))
        process = psutil.Process(head.pid)
        alive = abs(process.create_time() - head.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None
    return head if alive else None


def stop_head(settings: Settings) -> bool:
    """End the local head and every process it started, or those that a killed one left; False if none ran."""
    head = find_head(settings)
    if head is None:
        return end_orphans(settings)
    _end(head.pid)
    _record(settings).unlink(missing_ok=True)
    return True


def end_orphans(settings: Settings) -> bool:
    """Kill what a local head that is gone has left, which may hold the server's port; False if there is nothing."""
    import psutil

    if find_head(settings) is not None:
        return False
    try:
        pid = int(json.loads(_record(settings).read_text())["pid"])
    except (OSError, ValueError, TypeError, KeyError):
        return False
    orphans = []
    for process in _session(pid):
        with suppress(psutil.Error, OSError):
            if process.environ().get("PEDRO_HOME") == str(settings.home):
                orphans.append(process)
    _kill(orphans)
    return bool(orphans)


def free_port(low: int = 20000, high: int = 32000) -> int:
    """A loopback TCP port that nothing listens on, outside Ray's worker ports and the system's ephemeral range."""
    for _ in range(200):
        port = low + secrets.randbelow(high - low)
        if port_is_free(port):
            return port
    raise UnavailableError(f"no free TCP port found between {low} and {high}; close some servers")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def url_of(host: str, port: int) -> str:
    """Where a server on `host:port` answers."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def port_is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server could listen on `host:port` now; with port 0, whether that is an address of this machine."""
    try:
        with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _record(settings: Settings) -> Path:
    return settings.home / "ray" / "head.json"


def prepare_environment(settings: Settings) -> None:
    """Set what a home's head and every client of it must agree on. Ray reads it when it is first used in a process."""
    token = settings.home / "ray" / "token"
    if not token.is_file():
        token.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for "bind to loopback only"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Serve and Train are many small actors; Ray's limit of one start a core only delays them and warns about it
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # Threads that wait spin for long by default, which starves whoever shares the cores: gateway, proxy, clients
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # What Serve's proxy calls as it starts: bounds on connections, for which Serve has no settings
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "pedro.gateway.connections:bound_connections")
    # A proxy that died is back after three of these periods, which are 10 s by default
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
    os.environ.update(settings.env())


def _ensure_head(settings: Settings, log: Callable[[str], None]) -> Head:
    from filelock import FileLock

    folder = _record(settings).parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        head = find_head(settings)
        if head is not None:
            return head
        end_orphans(settings)  # which write into the folder of the next one
        log("starting a local Ray head (about 10 s, once; `pedro down` ends it)")
        head = _start_head(folder)
        scratch = folder / "head.json.new"
        scratch.write_text(json.dumps(asdict(head)))
        scratch.rename(folder / "head.json")
        return head


def _start_head(folder: Path) -> Head:
    """A head that answers. On a busy host parts of Ray give up on each other while they start: hence two tries."""
    deadline = time.monotonic() + START_TIMEOUT_S
    head = _try_head(folder, deadline) or _try_head(folder, deadline)
    if head is None:
        raise UnavailableError(
            f"the local Ray head did not start; its log is {folder / 'head.log'}; `pedro doctor` checks the host"
        )
    return head


def _try_head(folder: Path, deadline: float) -> Head | None:
    """Start a head; None, with nothing left running, if it ends or does not answer by `deadline`."""
    import psutil

    session = _session_folder(folder)
    shutil.rmtree(session, ignore_errors=True)  # the logs of the head before this one
    gcs, dashboard, agent, client = (free_port() for _ in range(4))
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={session}", "--include-dashboard=true"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--log-color=false"]
    command += [f"--num-cpus={os.cpu_count() or 1}", "--no-monitor"]  # which adds nodes in a cloud
    env = {**LEAN_HEAD, **os.environ}
    log = folder / "head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )
    # Ray says "started" before its jobs API answers
    while not (b"Ray runtime started" in log.read_bytes() and _answers(dashboard)):
        if process.poll() is not None or time.monotonic() > deadline:
            _end(process.pid)
            return None
        time.sleep(0.1)
    return Head(
        address=f"127.0.0.1:{gcs}",
        dashboard_url=f"http://127.0.0.1:{dashboard}",
        pid=process.pid,
        started=psutil.Process(process.pid).create_time(),
    )


def without_client_server(parameters: Any, _head: bool) -> None:
    """What `ray start` calls (RAY_START_HOOK) before it starts a head: none of ours is asked by `ray://`, for which Ray
    has a server of its own, and no option to leave it out."""
    parameters.ray_client_server_port = None


def _end(pid: int) -> None:
    """End a head and all that it started, which is whatever shares its session."""
    import psutil

    family = _session(pid)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).terminate()
    _, alive = psutil.wait_procs(family, timeout=20)
    _kill(alive)


def _session(pid: int) -> list[psutil.Process]:
    """The processes of the session that `pid` leads, or led."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == pid:
                found.append(process)
    return found


def _kill(processes: list[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _session_folder(folder: Path) -> Path:
    """Where Ray keeps its sockets and logs: one folder a home, or a job would take another home's head for its own.

    The path is short because the names of sockets may not exceed some 100 characters.
    """
    return Path("/tmp") / f"pedro-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"  # noqa: S108


def _dashboard_url() -> str:
    """The address of the jobs API of the cluster that this process is connected to."""
    if os.environ.get("RAY_API_SERVER_ADDRESS"):
        return os.environ["RAY_API_SERVER_ADDRESS"]
    import ray

    context: Any = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)
    url = context.dashboard_url
    return url if "://" in url else f"http://{url}"
