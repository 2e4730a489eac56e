"""A gateway on a port of this machine, with every service of its own, in front of one real replica in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import uvicorn
from serving_ingress import ingress

from pedro.gateway.app import GatewaySettings, create_app
from pedro.store import Store


@contextlib.contextmanager
def served_engine(served: SimpleNamespace, folder: Path, database_url: str) -> Iterator[tuple[str, Store]]:
    """Its address and its store. `served` is what `running_replica` gives."""
    store = Store(database_url)
    key_file = folder / "webhook.key"
    key_file.write_text("a1" * 32)
    key_file.chmod(0o600)
    settings = GatewaySettings(
        backbones={"stories260K": "stories260K"},
        storage=f"{folder}/storage",
        webhook_key_file=key_file,
        webhook_networks=("127.0.0.0/8",),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []
    begun = threading.Event()

    async def serve() -> None:
        async with ingress(served, "r0") as at:
            app = create_app(lambda: at.backend, store, settings)
            servers.append(uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)))
            begun.set()
            await servers[0].serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert begun.wait(60), "the gateway did not start"
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", store
    finally:
        servers[0].should_exit = True
        thread.join(60)
        store.close()
