"""Which engine replicas Ray Serve runs now: its router publishes them, the ingress subscribes.

Serve makes the router itself, deep in a deployment handle, and hands it neither the application nor anything that
refers to it, so the two can only meet in their process: `DISCOVERY` is the one global of serving.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Subscriber = Callable[[frozenset[str]], None]


class ReplicaDiscovery:
    """What was published last, for one subscriber; on whatever threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: frozenset[str] = frozenset()
        self._subscriber: Subscriber | None = None

    def publish(self, replicas: frozenset[str]) -> None:
        """These are the replicas from now on."""
        with self._lock:
            self._replicas = replicas
            if self._subscriber is not None:
                self._subscriber(replicas)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have `subscriber` called with the replicas, now and whenever they change."""
        with self._lock:
            self._subscriber = subscriber
            subscriber(self._replicas)


DISCOVERY = ReplicaDiscovery()
"""Of this process's one engine deployment."""
