"""Which engine replicas there are, as this process hears it. Knows nothing of Ray or of who asks."""

from __future__ import annotations

import threading
from collections.abc import Callable

Listener = Callable[[frozenset[str]], None]


class Live:
    """The last word of who tells, for one who listens; on whatever threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: frozenset[str] = frozenset()
        self._listener: Listener | None = None

    def tell(self, replicas: frozenset[str]) -> None:
        """These are the replicas from now on."""
        with self._lock:
            self._replicas = replicas
            if self._listener is not None:
                self._listener(replicas)

    def listen(self, listener: Listener) -> None:
        """Have `listener` called with the replicas, now and whenever they change."""
        with self._lock:
            self._listener = listener
            listener(self._replicas)


LIVE = Live()
"""Of this process's one engine deployment."""
