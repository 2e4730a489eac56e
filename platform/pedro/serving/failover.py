"""How an answer survives what fails: a replica that dies, and an adapter version that cannot be served.

A call whose replica dies is issued again (`Retries`). A name that means a version which cannot be loaded keeps meaning
the last one that answered, as far as one ingress found out (`VersionFaults`); a version that a request asks for by
number is never another. Names are resolved by the caller, `pedro.serving.backend`.
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
PROBE_S = 30.0  # how long a suspected adapter may keep others apart while its first token is awaited
GRACE_S = 0.5
TOO_LATE = "the request has reached its time limit; allow more or ask for fewer tokens"
LOST = "the engine that answered was lost; try again"
SET_ASIDE_S = {"adapter_unusable": 60.0, "adapter_unavailable": 5.0, "adapter_quarantined": 600.0}
"""The codes of errors that are a version's own, and how long each is taken as said before it is tried again."""
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

        A call whose replica dies is issued again, from the token it had come to: the same version, conditioning and
        seed, so the answer is the one it would have been. Several choices begin again, unless some were sent already.

        One that was lost before its first token may be why, unless the replica was to leave or the loss is known to be
        another's fault. It is issued again alone among its like, as are others of its version until one is answered, to
        a replica that lived after the first was lost; if one is lost so again, the version is set aside.
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
                                call = replace(call, echo=False)  # sent now: not again
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
                call = replace(call, request_id=f"{name}~{attempt}")  # the replica may still hold the first

    def _lost_to_no_other(self, ref: ModelRef | None) -> Callable[[ReplicaClient], bool]:
        """Whether no other suspected version's call may take the replica down: none waits there for its first token."""

        def suits(client: ReplicaClient) -> bool:
            return not any(map(self._faults.suspected, client.waiting(PROBE_S) - {ref}))

        return suits

    @asynccontextmanager
    async def _alone(self, suspected: bool, ref: ModelRef | None, until: float) -> AsyncIterator[Callable[[], None]]:
        """Keeps suspected calls apart, each version's until one has begun: else one would incriminate others.

        Of those that wait no other is tried once its adapter is set aside: each would take a replica down. After
        `PROBE_S` the next is tried, whatever this one does: a slow adapter must not hold other tenants' calls.
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


@dataclass(frozen=True)
class _Fault:
    error: PedroError
    until: float


class VersionFaults:
    """On one event loop. A version is named with its digest."""

    def __init__(self) -> None:
        self._faults: OrderedDict[ModelRef, _Fault] = OrderedDict()
        self._good: OrderedDict[str, Version] = OrderedDict()
        self._served_at: OrderedDict[ModelRef, float] = OrderedDict()
        self._lost_at: OrderedDict[ModelRef, float] = OrderedDict()

    def current(self, ref: ModelRef) -> PedroError | None:
        """The error that `ref` ended in not long ago."""
        fault = self._faults.get(ref)
        return fault.error if fault is not None and time.monotonic() < fault.until else None

    def add(self, ref: ModelRef, error: PedroError) -> None:
        """`ref` cannot be served."""
        if ref not in self._faults:
            log.error("adapter %s cannot be served: %s", ref.without_digest, error.message)
        self._faults[ref] = _Fault(error, time.monotonic() + SET_ASIDE_S[str(error.code)])
        _bound(self._faults)

    def served(self, model: str, version: Version, ref: ModelRef) -> None:
        """`ref`, which is `version`, answered as what `model` means."""
        self._faults.pop(ref, None)
        self._served_at[ref] = time.monotonic()
        _bound(self._served_at)
        if self._good.get(model) is not version:
            self._good[model] = version
            _bound(self._good)

    def suspect(self, ref: ModelRef) -> None:
        """A replica was lost before a request of `ref` had its first token; that may be why."""
        self._lost_at[ref] = time.monotonic()
        _bound(self._lost_at)

    def suspected(self, ref: ModelRef) -> bool:
        """Whether no request of `ref` was answered since it was suspected."""
        return ref in self._lost_at and self._served_at.get(ref, 0.0) <= self._lost_at[ref]

    def last_good(self, model: str) -> Version | None:
        """The version that answered last as what `model` means."""
        return self._good.get(model)

    def reason(self, ref: ModelRef) -> str | None:
        """Why `ref` cannot be served, for operators; None for one that answered since, or was never asked."""
        fault = self._faults.get(ref)
        return None if fault is None else fault.error.message

    def quarantine(self, ref: ModelRef) -> None:
        """A request of `ref` took two replicas down, one after the other, before its first token."""
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
        help_text = "Adapter versions that could not be served when this gateway asked last."
        return f"# HELP {name} {help_text}\n# TYPE {name} gauge\n{name} {len(self._faults)}\n"


def _bound(known: OrderedDict[Any, Any]) -> None:
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
