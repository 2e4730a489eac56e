"""The controller as a process: at most one per home. `python -m pedro.training.queue.process [--until-idle]`.

`pedro submit` starts one if there is none; it exits when no job is open. On a cluster, `pedro controller` runs
permanently, and this one only if that does not answer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from pedro import log_lines
from pedro.config import SERVER_RECORD, Settings
from pedro.errors import ConflictError, UnavailableError
from pedro.store import JobStatus, Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pedro.training.queue.launcher import Launcher

TAKEN_WITHIN_S = 120.0  # 2 on an idle machine
OTHERS_FIRST_S = 5.0
"""How long the controller of an external cluster has to take a job."""
RESPAWN_S = 10.0
AWAY_S, RETRY_S = 600.0, 1.0
"""How long a controller that nobody would start again waits at its start for a database that is away."""
END_S = 20.0


def run(
    settings: Settings,
    log: Callable[[str], None],
    *,
    until_idle: bool,
    per_tenant: int | None = None,
    launcher: Launcher | None = None,
) -> None:
    """Run as the home's controller until SIGTERM or SIGINT, or until no job is open; drivers are Ray jobs by default.
    Raises ConflictError if the home has a controller, UnavailableError if the database is away (`until_idle`: still
    after AWAY_S)."""
    from pedro.training.queue.controller import Controller
    from pedro.training.queue.launcher import RayJobs

    if settings.log_format == log_lines.JSON:
        log = log_lines.log_job_line
        log_lines.use(settings.log_format)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _only_one(settings):
        store = _open_store(settings, log, stop, AWAY_S if until_idle else 0.0)
        if store is None:
            return
        with contextlib.suppress(UnavailableError):  # they expire
            _release_of_the_dead(store)
        controller = Controller(
            store,
            launcher or RayJobs(settings, log),
            log,
            per_tenant=per_tenant,
            share_across_tenants=settings.share_across_tenants,
        )
        try:
            controller.run(
                stop,
                may_end=lambda: until_idle and not (settings.home / SERVER_RECORD).is_file(),
                beat=_pid_file(settings).touch,  # its modification time is read by the pod's probe
            )
        finally:
            with contextlib.suppress(UnavailableError):
                controller.close()
            store.close()


def hand_over(job_id: str, settings: Settings, store: Store) -> None:
    """Return when a controller has leased the job, or it is at rest; starts one if none does. Raises
    UnavailableError."""
    started = time.monotonic()
    own = settings.ray_address is None and settings.launcher == "ray"
    patience = 0.0 if own else OTHERS_FIRST_S
    while (waited := time.monotonic() - started) < TAKEN_WITHIN_S:
        job = store.get_job(job_id)
        if job.status.final or job.status == JobStatus.PAUSED:
            return
        here = is_running(settings)
        if (job.lease_until or 0) > time.time() and (here or not own):
            return
        if not here and waited >= patience and settings.launcher == "ray":
            _spawn(settings)
            patience = waited + RESPAWN_S
        time.sleep(0.1)
    raise UnavailableError(
        f"no controller took the job {job_id}, which stays queued; the last one's log is {_log(settings)}"
    )


class ControllerKeeper:
    """Keeps a controller running beside this home's server, which may receive jobs at any time, until the server ends.
    External clusters have their own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._not_before = 0.0

    def ensure(self) -> None:
        """Start one if there is none, unless one was just started."""
        own = self._settings.ray_address is None and self._settings.launcher == "ray"
        if own and time.monotonic() >= self._not_before and not is_running(self._settings):
            _spawn(self._settings)
            self._not_before = time.monotonic() + RESPAWN_S


def end_controller(settings: Settings) -> bool:
    """End this home's controller, without changing its jobs. False if none ran."""
    pid = _pid(settings)
    if pid is None or not is_running(settings):
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while is_running(settings) and _pid(settings) == pid:
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return True


def _open_store(
    settings: Settings, log: Callable[[str], None], stop: threading.Event, patience_s: float
) -> Store | None:
    """The store, once the database answers; None if the process is to stop before."""
    until, told = time.monotonic() + patience_s, ""
    while not stop.is_set():
        try:
            return Store(settings.database_url)
        except UnavailableError as error:
            if time.monotonic() >= until:
                raise
            if error.message != told:
                log(f"waiting: {error.message}")
            told = error.message
        stop.wait(RETRY_S)
    return None


def _release_of_the_dead(store: Store) -> None:
    """Release the leases of this host's killed controllers, without waiting for their expiry."""
    import psutil

    for owner in store.job_lease_owners():
        host, _, rest = owner.partition(":")
        pid = rest.partition(":")[0]
        if host == socket.gethostname() and pid.isdigit() and not psutil.pid_exists(int(pid)):
            store.release_jobs(owner)


def _spawn(settings: Settings) -> None:
    path = _log(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pedro.training.queue.process", "--until-idle"]
    ray = {"RAY_ADDRESS": settings.ray_address} if settings.ray_address else {}
    with path.open("ab") as out:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **settings.env(), **ray},
        )


@contextlib.contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    lock = _lock(settings)
    try:
        lock.acquire(timeout=1)  # processes that check for a controller hold it briefly
    except Timeout:
        raise ConflictError(
            f"a controller of {settings.home} is already running (process {_pid(settings)}); `pedro down` ends it"
        ) from None
    try:
        _pid_file(settings).write_text(str(os.getpid()))
        yield
    finally:
        _pid_file(settings).unlink(missing_ok=True)
        lock.release()


def is_running(settings: Settings) -> bool:
    """Whether this home has a controller."""
    lock = _lock(settings)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def _lock(settings: Settings) -> FileLock:
    folder = settings.home / "ray"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "controller.lock")


def _pid_file(settings: Settings) -> Path:
    return settings.home / "ray" / "controller.pid"


def _pid(settings: Settings) -> int | None:
    try:
        return int(_pid_file(settings).read_text())
    except (OSError, ValueError):
        return None


def _log(settings: Settings) -> Path:
    return settings.home / "logs" / "controller.log"


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the process that `pedro submit` starts."""
    parser = argparse.ArgumentParser(prog="pedro.training.queue.process", description="Run the controller of a home.")
    parser.add_argument("--until-idle", action="store_true", help="exit when no job is open")
    options = parser.parse_args(arguments)

    def log(line: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), line, flush=True)

    try:
        run(Settings.from_env(), log, until_idle=options.until_idle)
    except ConflictError:  # another process was faster
        return 0
    except UnavailableError as error:
        log(error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
