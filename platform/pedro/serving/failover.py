"""Failover: of calls whose replica dies, and of adapter versions that cannot be served.

A call whose replica dies is reissued (`Retries`). If a name resolves to a version that cannot be loaded, the last
version that answered is used instead, as far as this ingress knows (`VersionFaults`); versions requested by number are
never replaced. The caller, `pedro.serving.backend`, resolves names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pedro.errors import DeadlineError, PedroError, UnavailableError
from pedro.serving.protocol import ReplicaLost

if TYPE_CHECKING:
    from pedro.gateway.backend import Delta, GenerateCall
    from pedro.refs import ModelRef
    from pedro.registry import Version
    from pedro.serving.client import ReplicaClient
    from pedro.serving.router import ReplicaSet

ATTEMPTS = 3
PROBE_S = 30.0  # how long a suspected adapter's first token may keep others waiting
GRACE_S = 0.5
TOO_LATE = "the request has reached its time limit; allow more or ask for fewer tokens"
LOST = "the engine that was answering was lost; try again"
SET_ASIDE_S = {"adapter_unusable": 60.0, "adapter_unavailable": 5.0, "adapter_quarantined": 600.0}
"""Error codes caused by a version, and how long each is assumed to persist before another attempt."""
MAX_KNOWN = 4096
log = logging.getLogger("pedro.serving")


class Retries:
    """Calls of one ingress on the `replicas`. On one event loop."""

    def __init__(self, replicas: ReplicaSet, faults: VersionFaults) -> None:
        self._replicas = replicas
        self._faults = faults
        self._probing = asyncio.Lock()

    async def generate(self, call: GenerateCall, ref: ModelRef | None, until: float) -> AsyncGenerator[Delta, None]:
        """The deltas of one version.

        A call whose replica dies is reissued from the last token received, with the same version, conditioning and
        seed, so that the answer does not change. Calls with several choices start again, unless some output was sent
        already.

        A call that was lost before its first token may have caused the loss, unless the replica was stopping or the
        loss has a known other cause. It is reissued without other suspects beside it, as are other calls of its version
        until one is answered, to a replica that survived the first; if that is lost, too, the version is set aside.
        """
        sent: list[int] = []
        name = call.request_id
        suspected = ref is not None and self._faults.suspected(ref)
        for attempt in range(1, ATTEMPTS + 1):
            last: Delta | None = None
            try:
                async with (
                    self._alone(suspected, ref, until) as begun,
                    aclosing(
                        self._replicas.generate(
                            replace(call, timeout_s=_left(until)),
                            ref,
                            tuple(sent),
                            self._lost_to_no_other(ref) if suspected else None,
                        )
                    ) as batches,
                ):
                    async for batch in _in_time(batches, until):
                        begun()
                        for last in batch:
                            sent += last.token_ids[last.prompt_tokens if call.echo else 0 :]
                            if call.echo and call.n == 1:
                                call = replace(call, echo=False)  # already sent
                            yield last
                return
            except ReplicaLost as error:
                implicated = last is None and not error.blameless
                if suspected and implicated and ref is not None:
                    self._faults.quarantine(ref)
                if attempt == ATTEMPTS or (suspected and implicated) or (call.n > 1 and last is not None):
                    raise UnavailableError(LOST, code="replica_lost") from error
                log.warning(
                    "request %s (%s): replica lost after %d tokens; reissued",
                    call.trace_id,
                    name,
                    len(sent),
                )
                suspected = implicated or (suspected and last is None)
                if implicated and ref is not None:
                    self._faults.suspect(ref)
                call = replace(call, request_id=f"{name}~{attempt}")  # the replica may still have the first

    def _lost_to_no_other(self, ref: ModelRef | None) -> Callable[[ReplicaClient], bool]:
        """Whether no call of another suspected version waits for its first token on the replica."""

        def suits(client: ReplicaClient) -> bool:
            return not any(map(self._faults.suspected, client.waiting(PROBE_S) - {ref}))

        return suits

    @asynccontextmanager
    async def _alone(self, suspected: bool, ref: ModelRef | None, until: float) -> AsyncIterator[Callable[[], None]]:
        """Runs suspected calls one at a time, until one of the version has begun: else one would incriminate others.

        Once an adapter is set aside, its waiting calls are not tried, since each would crash a replica. After `PROBE_S`
        the next call is tried anyway: a slow adapter must not block other tenants' calls.
        """
        held = suspected
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
            if suspected and ref is not None:
                if self._faults.current(ref) is not None:
                    raise UnavailableError(LOST, code="replica_lost")
                if not self._faults.suspected(ref):
                    begun()
            yield begun
        finally:
            begun()
            if timer is not None:
                timer.cancel()


async def _in_time(batches: AsyncGenerator[list[Delta], None], until: float) -> AsyncIterator[list[Delta]]:
    """The batches, up to the deadline; the engine itself ends running calls slightly earlier."""
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


@dataclass(frozen=True)
class _Fault:
    error: PedroError
    until: float


class VersionFaults:
    """For one event loop. Versions are named with their digest."""

    def __init__(self) -> None:
        self._faults: OrderedDict[ModelRef, _Fault] = OrderedDict()
        self._good: OrderedDict[str, Version] = OrderedDict()
        self._served_at: OrderedDict[ModelRef, float] = OrderedDict()
        self._lost_at: OrderedDict[ModelRef, float] = OrderedDict()

    def current(self, ref: ModelRef) -> PedroError | None:
        """The recent error of `ref`."""
        fault = self._faults.get(ref)
        return fault.error if fault is not None and time.monotonic() < fault.until else None

    def add(self, ref: ModelRef, error: PedroError) -> None:
        """Note that `ref` cannot be served."""
        if ref not in self._faults:
            log.error("adapter %s cannot be served: %s", ref.without_digest, error.message)
        self._faults[ref] = _Fault(error, time.monotonic() + SET_ASIDE_S[str(error.code)])
        _bound(self._faults)

    def served(self, model: str, version: Version, ref: ModelRef) -> None:
        """Note that `ref`, which is `version`, answered for `model`."""
        self._faults.pop(ref, None)
        self._served_at[ref] = time.monotonic()
        _bound(self._served_at)
        if self._good.get(model) is not version:
            self._good[model] = version
            _bound(self._good)

    def suspect(self, ref: ModelRef) -> None:
        """Suspect `ref`: a replica was lost before a request of it had its first token."""
        self._lost_at[ref] = time.monotonic()
        _bound(self._lost_at)

    def suspected(self, ref: ModelRef) -> bool:
        """Whether `ref` is suspected and no request of it was answered since."""
        return ref in self._lost_at and self._served_at.get(ref, 0.0) <= self._lost_at[ref]

    def last_good(self, model: str) -> Version | None:
        """The version that last answered for `model`."""
        return self._good.get(model)

    def reason(self, ref: ModelRef) -> str | None:
        """Why `ref` cannot be served, for operators; None if it has answered since, or was never tried."""
        fault = self._faults.get(ref)
        return None if fault is None else fault.error.message

    def quarantine(self, ref: ModelRef) -> None:
        """Set `ref` aside: a request of it crashed two replicas, one after the other, before its first token."""
        named = ref.without_digest
        self.add(
            ref,
            UnavailableError(
                f"model: {named} is set aside because engine replicas were lost on its requests; ask an operator",
                param="model",
                code="adapter_quarantined",
            ),
        )

    def metrics(self) -> str:
        """Prometheus text."""
        name = "pedro_adapter_versions_set_aside"
        help_text = "Adapter versions that could not be served when this gateway last tried."
        return f"# HELP {name} {help_text}\n# TYPE {name} gauge\n{name} {len(self._faults)}\n"


def _bound(known: OrderedDict[Any, Any]) -> None:
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
