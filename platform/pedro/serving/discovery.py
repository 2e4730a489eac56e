"""Which engine replicas Ray Serve runs now: its router publishes them, the ingress subscribes.

Serve creates the router inside a deployment handle, without any reference to the application, so the two can only be
connected through a global of their process: `DISCOVERY`, the only one in serving.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Subscriber = Callable[[frozenset[str]], None]


class ReplicaDiscovery:
    """The last published replicas, for one subscriber; on any threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: frozenset[str] = frozenset()
        self._subscriber: Subscriber | None = None

    def publish(self, replicas: frozenset[str]) -> None:
        """Publish the current replicas."""
        with self._lock:
            self._replicas = replicas
            if self._subscriber is not None:
                self._subscriber(replicas)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with the replicas, now and whenever they change."""
        with self._lock:
            self._subscriber = subscriber
            subscriber(self._replicas)


DISCOVERY = ReplicaDiscovery()
"""For this process's only engine deployment."""
