"""One line a request: who asked which model, for how many tokens, how long it took. Never what was asked or answered.

Lines go to the logger `pedro.access`; `write_to` gives it a file. Knows nothing of routes or engines.
"""

from __future__ import annotations

import json
import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROBES = frozenset({"/health", "/ready"})
MAX_FILE_BYTES, KEPT_FILES = 10 * 2**20, 3
MAX_MODEL = 120  # characters of a name that a client chose

log = logging.getLogger("pedro.access")


def note(scope: Scope, **facts: Any) -> None:
    """Have this request's line tell `facts`."""
    scope["state"].setdefault("access", {}).update(facts)


def write_to(path: Path) -> None:
    """Log to a file that begins anew at `MAX_FILE_BYTES`, the last few kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


class Logged:
    """The ASGI layer around everything else, so that it sees the status that the client sees."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 499, time.monotonic()  # 499: the client left before an answer began

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            if route not in PROBES or status >= 400:
                log.info("%s", _line(scope, route, status, time.monotonic() - begun))


def _line(scope: Scope, route: str, status: int, total_s: float) -> str:
    facts = dict(scope["state"].get("access", {}))
    words = [scope["state"]["request_id"], facts.pop("tenant", "-"), scope["method"], route, str(status)]
    for name, value in facts.items():
        if isinstance(value, float):
            words.append(f"{name}={value:.3f}s")
        elif value is not None:  # a name is quoted, so that it cannot break the line
            words.append(f"{name}={json.dumps(value[:MAX_MODEL]) if isinstance(value, str) else value}")
    return " ".join([*words, f"total={total_s:.3f}s"])
