"""Restarts a home's server when its Ray head is gone. Ray restarts engines, gateways and proxies, but not the head,
whose death ends all of them.

The supervising process is not a Ray driver, since Ray kills drivers whose head is gone. So each restart is a separate
process, too.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from pedro import cluster
from pedro.errors import PedroError
from pedro.serving.deploy import deploy, end, record, restarting

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from pedro.config import Settings
    from pedro.serving.config import ServeConfig

LOOK_S = 1.0
PATIENCE_S = 30.0  # the longest pause between failed attempts
ENDS_S = 30.0
SET_BACK_S = 30.0  # about the time of a restart; shorter set-backs are waited out
Log = Callable[[str], None]


class Supervisor:
    """Supervises the server that this home runs on its own head. `beside` is called at each check while it runs, to
    look after what belongs to it."""

    def __init__(
        self, settings: Settings, config: ServeConfig, host: str, port: int, log: Log, beside: Callable[[], None]
    ) -> None:
        self._settings, self._config, self._host, self._port = settings, config, host, port
        self._log, self._beside = log, beside
        self._head = cluster.find_head(settings)
        self._ahead = ahead()

    def run(self) -> None:
        """Return when the server was stopped (`pedro down`). Clusters that pedro did not start are not restarted."""
        while record(self._settings).is_file():
            self._look_at_clock()
            if self._settings.ray_address is None and cluster.find_head(self._settings) != self._head:
                self._start_again()
            else:
                with suppress(OSError):  # for instance a full disk: checked again later
                    self._beside()
            time.sleep(LOOK_S)

    def _look_at_clock(self) -> None:
        """End the head if the clock was set back, so that it is restarted.

        Ray's timers use the wall clock: in every running process Serve's checks of replicas, repeated calls and
        heartbeats stop until the old time is reached again.
        """
        before, self._ahead = self._ahead, ahead()
        if before - self._ahead > SET_BACK_S and self._settings.ray_address is None:
            self._log(
                f"the clock was set back by {before - self._ahead:.0f} s, which would stop Ray's timers for that long"
            )
            cluster.stop_head(self._settings)

    def _start_again(self) -> None:
        mark = restarting(self._settings)
        mark.touch()  # removed by a process that stops the server meanwhile
        try:
            if not record(self._settings).is_file():  # stopped just before
                return
            pause = LOOK_S
            while mark.is_file():
                self._log("the Ray head is gone; restarting it and the server")
                cluster.end_orphans(self._settings)  # which may still answer
                if self._deploy_apart():
                    break
                self._log(f"the server did not start; trying again in {pause:g} s")
                time.sleep(pause)
                pause = min(PATIENCE_S, 2 * pause)
            if not mark.is_file():
                end(self._settings)
                return
            self._head = cluster.find_head(self._settings)
        finally:
            mark.unlink(missing_ok=True)

    def _deploy_apart(self) -> bool:
        options = (self._settings, self._config, self._host, self._port, self._log)
        process = multiprocessing.get_context("spawn").Process(target=_deploy, args=options)
        process.start()
        try:
            self._wait(process)
        finally:
            _end(process)
        return process.exitcode == 0

    def _wait(self, process: SpawnProcess) -> None:
        """Wait until it ends: by itself, or because the clock was set back and its head was ended."""
        while process.is_alive():
            process.join(LOOK_S)
            self._look_at_clock()


def ahead() -> float:
    """How far the wall clock is ahead of the monotonic one."""
    return time.time() - time.monotonic()


def _deploy(settings: Settings, config: ServeConfig, host: str, port: int, log: Log) -> None:
    """Entry point of the separate process; exits with 0 if the server answers."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        deploy(settings, config, host, port, log, again=True)
    except PedroError as error:
        log(f"error: {error.message}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end(process: SpawnProcess) -> None:
    """Let it clean up a partial start."""
    if process.is_alive():
        process.terminate()
        with suppress(KeyboardInterrupt):
            process.join(ENDS_S)
        process.kill()
