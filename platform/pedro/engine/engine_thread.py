"""Runs an engine on its own thread and delivers its outputs: a step's together, or each to its request's callback.

A callback runs on the step thread and must return at once (an asyncio server uses `loop.call_soon_threadsafe`); one
that raises ends only the requests whose outputs it received.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pedro.engine.sequence import Output
from pedro.errors import PedroError, UnavailableError

if TYPE_CHECKING:
    from pedro.engine.engine import Engine
    from pedro.engine.request import Request

log = logging.getLogger(__name__)
IDLE_WAIT_S = 0.5  # wakes up anyway, in case a deadline moved or a notification was missed
OnOutput = Callable[[Output], None]
OnOutputs = Callable[[list[Output]], None]
OnLost = Callable[[PedroError], None]


def ignore(_error: PedroError) -> None:
    """Default for `on_lost`."""


class EngineThread:
    """Steps `engine` while there is work, until it fails. Use as a context manager, or `start` and `stop`.

    `on_outputs`, if given, is called once per step with all its outputs, instead of one callback per request. `on_lost`
    gets the reason why the engine cannot continue, before its requests do.
    """

    def __init__(self, engine: Engine, on_outputs: OnOutputs | None = None, on_lost: OnLost = ignore) -> None:
        self.engine = engine
        self._on_outputs = on_outputs
        self._on_lost = on_lost
        self._callbacks: dict[str, tuple[OnOutput, set[int]]] = {}  # and the indices of unfinished answers
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        engine.on_change = self._wake.set

    def __enter__(self) -> EngineThread:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread after its current step; unfinished requests get an UnavailableError."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.engine.close()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, for health checks."""
        return self._thread.is_alive()

    def submit(self, request: Request, on_output: OnOutput | None = None) -> None:
        """Queue a request; `on_output` gets each of its outputs, the last of each answer with a finish reason.

        Omit `on_output` if the thread delivers whole steps.

        Raises what `Engine.add` raises, and UnavailableError once the thread stops.
        """
        assert (on_output is None) != (self._on_outputs is None), "one callback: the thread's or the request's"
        with self._lock:
            if self._stopping:
                raise UnavailableError("the engine is shutting down; try again on another replica")
            if request.id in self._callbacks:
                raise PedroError(f"request id: {request.id!r} is in use; give each request its own", param="id")
            self.engine.add(request)
            if on_output is not None:
                self._callbacks[request.id] = (on_output, set(range(request.n)))

    def cancel(self, request_id: str) -> None:
        """End a request; its callback gets "cancelled"."""
        self.engine.cancel(request_id)

    def _run(self) -> None:
        outputs: list[Output] = []
        while not self._stopping:
            self._wake.clear()
            outputs = self._step()
            if self.engine.lost is not None:
                break
            self._hand_over(outputs)
            if self.engine.idle and not outputs and not self._stopping:
                self._wait()
            outputs = []
        lost = self.engine.lost
        with self._lock:
            self._stopping = True
        if lost is not None:
            self._on_lost(lost)  # before the requests end: another replica may continue them
        self._hand_over(outputs)
        self.engine.fail_all(lost or UnavailableError("the engine is shutting down; try again on another replica"))
        self._hand_over(self._step())

    def _step(self) -> list[Output]:
        try:
            return self.engine.step()
        except Exception:  # the thread survives any error: current requests fail, later ones are served
            log.exception("an engine step failed outside the model")
            self.engine.fail_all(UnavailableError("the engine failed on this request; try again", code="engine_error"))
            return self.engine.take_outputs()

    def _wait(self) -> None:
        """Wait until there may be work."""
        deadline = self.engine.next_deadline()
        wait_s = IDLE_WAIT_S if deadline is None else min(IDLE_WAIT_S, max(0.0, deadline - time.monotonic()))
        self._wake.wait(wait_s)

    def _hand_over(self, outputs: list[Output]) -> None:
        if self._on_outputs is None:
            for output in outputs:
                self._deliver(output)
        elif outputs:
            try:
                self._on_outputs(outputs)
            except Exception:  # outputs cannot be delivered twice: these requests end
                log.exception("the consumer of %d outputs failed", len(outputs))
                for request_id in {output.request_id for output in outputs}:
                    self.engine.cancel(request_id)

    def _deliver(self, output: Output) -> None:
        with self._lock:
            callback, open_indices = self._callbacks[output.request_id]
            if output.finish_reason is not None:
                open_indices.discard(output.index)
                if not open_indices:
                    del self._callbacks[output.request_id]
        try:
            callback(output)
        except Exception:  # a failed consumer ends only its own request
            log.exception("the consumer of request %s failed", output.request_id)
            self.engine.cancel(output.request_id)
