"""One version's answer, whatever becomes of the replica that began it: a call whose replica dies is issued again.

Names are resolved by the caller (`pedro.serving.backend`); `pedro.serving.faults` keeps which versions are suspected.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from pedro.errors import DeadlineError, UnavailableError
from pedro.gateway.backend import Delta, GenerateCall
from pedro.refs import ModelRef
from pedro.serving.faults import Faults
from pedro.serving.fleet import Fleet
from pedro.serving.wire import ReplicaLost

ATTEMPTS = 3
PROBE_S = 30.0  # how long a suspected adapter may keep others apart while its first token is awaited
GRACE_S = 0.5
TOO_LATE = "the time that this request may take has passed; allow more or ask for fewer tokens"
LOST = "the engine that answered was lost; try again"
log = logging.getLogger("pedro.serving")


class Retries:
    """Calls of one ingress on the replicas of `fleet`. On one event loop."""

    def __init__(self, fleet: Fleet, faults: Faults) -> None:
        self._fleet = fleet
        self._faults = faults
        self._probing = asyncio.Lock()

    async def generate(self, call: GenerateCall, ref: ModelRef | None, until: float) -> AsyncGenerator[Delta, None]:
        """The deltas of one version.

        A call whose replica dies is issued again, from the token it had come to: the same version, conditioning and
        seed, so the answer is the one it would have been. Several choices begin again, unless some were sent already.
        One that was lost before its first token may be why: it is issued again alone among its like, as are others of
        its version until one is answered, and if one is lost so again, the version is set aside.
        """
        sent: list[int] = []
        name = call.request_id
        suspected = ref is not None and self._faults.suspected(ref)
        for attempt in range(1, ATTEMPTS + 1):
            last: Delta | None = None
            try:
                async with (
                    self._alone(ref if suspected else None, until) as begun,
                    aclosing(self._fleet.generate(replace(call, timeout_s=_left(until)), ref, tuple(sent))) as batches,
                ):
                    async for batch in _in_time(batches, until):
                        begun()
                        for last in batch:
                            sent += last.token_ids[last.prompt_tokens if call.echo else 0 :]
                            if call.echo and call.n == 1:
                                call = replace(call, echo=False)  # sent now: not again
                            yield last
                return
            except ReplicaLost as error:
                if suspected and last is None and ref is not None:
                    self._faults.quarantine(ref)
                if attempt == ATTEMPTS or (suspected and last is None) or (call.n > 1 and last is not None):
                    raise UnavailableError(LOST, code="replica_lost") from error
                log.warning(
                    "request %s (%s): its replica was lost after %d tokens; issued again",
                    call.trace_id,
                    name,
                    len(sent),
                )
                suspected = last is None
                if suspected and ref is not None:
                    self._faults.suspect(ref)
                call = replace(call, request_id=f"{name}~{attempt}")  # the replica may still hold the first

    @asynccontextmanager
    async def _alone(self, suspect: ModelRef | None, until: float) -> AsyncIterator[Callable[[], None]]:
        """Keeps suspected adapters apart, each until one call of it has begun: else one would incriminate others.

        Of those that wait no other is tried once its adapter is set aside: each would take a replica down. After
        `PROBE_S` the next is tried, whatever this one does: a slow adapter must not hold other tenants' calls.
        """
        held = suspect is not None
        if held:
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._probing.acquire()
            except TimeoutError:
                raise DeadlineError(TOO_LATE) from None

        def begun() -> None:
            nonlocal held
            if held:
                held = False
                self._probing.release()

        timer = asyncio.get_running_loop().call_later(PROBE_S, begun) if held else None
        try:
            if suspect is not None and self._faults.current(suspect) is not None:
                raise UnavailableError(LOST, code="replica_lost")
            if suspect is not None and not self._faults.suspected(suspect):
                begun()
            yield begun
        finally:
            begun()
            if timer is not None:
                timer.cancel()


async def _in_time(batches: AsyncGenerator[list[Delta], None], until: float) -> AsyncIterator[list[Delta]]:
    """The batches, as long as they come in time; the engine itself ends what it has begun a little earlier."""
    while True:
        try:
            async with asyncio.timeout(until + GRACE_S - time.monotonic()):
                batch = await anext(batches)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineError(TOO_LATE) from None
        yield batch


def _left(until: float) -> float:
    left_s = until - time.monotonic()
    if left_s <= 0:
        raise DeadlineError(TOO_LATE)
    return left_s
