"""Adapter versions that cannot be served, as one ingress found out, and the last that could. Knows nothing of streams.

A name that means a version which cannot be loaded goes on meaning the last one that answered; a version that a
request asks for by number is never another.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from pedro.errors import PedroError, UnavailableError
from pedro.refs import ModelRef
from pedro.registry import Version

SET_ASIDE_S = {"adapter_unusable": 60.0, "adapter_unavailable": 5.0, "adapter_quarantined": 600.0}
"""The codes of errors that are a version's own, and how long each is taken as said before it is tried again."""
MAX_KNOWN = 4096
log = logging.getLogger("pedro.serving")


@dataclass(frozen=True)
class _Fault:
    error: PedroError
    until: float


class Faults:
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
                f"model: {named} is set aside, since engine replicas were lost on its requests; ask an operator",
                param="model",
                code="adapter_quarantined",
            ),
        )

    def metrics(self) -> str:
        """Prometheus text."""
        name = "pedro_adapter_versions_set_aside"
        help_text = "Adapter versions that could not be served when this gateway asked last."
        return f"# HELP {name} {help_text}\n# TYPE {name} gauge\n{name} {len(self._faults)}\n"


def _bound(known: OrderedDict) -> None:
    if len(known) > MAX_KNOWN:
        known.popitem(last=False)
