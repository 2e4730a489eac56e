"""Starts a home's server again when its Ray head is gone. Ray itself starts engines, gateways and proxies again, but
nobody starts the head, whose death takes all of them along.

The process that watches is no driver of Ray: Ray ends a driver whose head is gone. So each new start is a process, too.
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
PATIENCE_S = 30.0  # the longest pause between two tries that failed
ENDS_S = 30.0
SET_BACK_S = 30.0  # about what starting again takes; less is waited out
Log = Callable[[str], None]


class Supervisor:
    """Watches over the server that this home runs on a head of its own. `beside` is called at each look while it runs,
    and sees to what belongs to it."""

    def __init__(
        self, settings: Settings, config: ServeConfig, host: str, port: int, log: Log, beside: Callable[[], None]
    ) -> None:
        self._settings, self._config, self._host, self._port = settings, config, host, port
        self._log, self._beside = log, beside
        self._head = cluster.find_head(settings)
        self._ahead = ahead()

    def run(self) -> None:
        """Return when somebody ended the server (`pedro down`). A cluster that is somebody else's is left to them."""
        while record(self._settings).is_file():
            self._look_at_clock()
            if self._settings.ray_address is None and cluster.find_head(self._settings) != self._head:
                self._start_again()
            else:
                with suppress(OSError):  # a disk without room, say: it is looked at again
                    self._beside()
            time.sleep(LOOK_S)

    def _look_at_clock(self) -> None:
        """End the head if the clock was set back, so that it is started again.

        Ray's timers go by the wall clock: in every process that runs, Serve's looks at replicas, calls that are to be
        repeated and heartbeats stand still until the clock is where it was.
        """
        before, self._ahead = self._ahead, ahead()
        if before - self._ahead > SET_BACK_S and self._settings.ray_address is None:
            self._log(
                f"the clock was set back by {before - self._ahead:.0f} s, for which Ray's timers would stand still"
            )
            cluster.stop_head(self._settings)

    def _start_again(self) -> None:
        mark = restarting(self._settings)
        mark.touch()  # removed by whoever ends the server meanwhile
        try:
            if not record(self._settings).is_file():  # ended just before
                return
            pause = LOOK_S
            while mark.is_file():
                self._log("the Ray head is gone; starting it and the server again")
                cluster.end_orphans(self._settings)  # which may answer still
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
        """Until it ends: by itself, or because the clock was set back and its head with it."""
        while process.is_alive():
            process.join(LOOK_S)
            self._look_at_clock()


def ahead() -> float:
    """How far the wall clock is ahead of the one that nobody can set."""
    return time.time() - time.monotonic()


def _deploy(settings: Settings, config: ServeConfig, host: str, port: int, log: Log) -> None:
    """What the process apart does; its status is 0 if the server answers."""
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        deploy(settings, config, host, port, log, again=True)
    except PedroError as error:
        log(f"error: {error.message}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end(process: SpawnProcess) -> None:
    """It takes down what it has half started."""
    if process.is_alive():
        process.terminate()
        with suppress(KeyboardInterrupt):
            process.join(ENDS_S)
        process.kill()
