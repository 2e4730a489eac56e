"""One engine replica of a fleet on this machine, reached over a socket; an order gives what its process used so far."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

from jobs.benchmarks.replica_connection import listening
from pedro.backbone import quiet
from pedro.config import Settings
from pedro.serving.config import ServeConfig
from pedro.serving.server import ReplicaServer


class Replica:
    """Set-up: home, config (as of ServeConfig), name, socket."""

    def __init__(self, setup: dict[str, Any]) -> None:
        quiet()
        settings = Settings.from_env({"PEDRO_HOME": setup["home"]})
        self._server = ReplicaServer(ServeConfig(**setup["config"]), settings, setup["name"])
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._listen(Path(setup["socket"]), ready)), daemon=True).start()
        ready.wait()

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """Processor time, adapters loaded since the start, and those that are resident now."""
        adapters = self._server.stats()["adapters"]
        return {"cpu_s": time.process_time(), "loads": adapters["loads"], "resident": adapters["resident"]}

    async def _listen(self, socket: Path, ready: threading.Event) -> None:
        async with listening(self._server, socket):
            ready.set()
            await asyncio.Event().wait()
