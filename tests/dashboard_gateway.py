"""A real gateway over a real engine in this process, on a port of this machine: a small home for dashboard tests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import uvicorn
from serving_adapters import make_adapter, register, settings_at
from serving_connections import LocalConnection

from pedro.backbone import context_length, resolve_backbone
from pedro.gateway.app import create_app
from pedro.registry import Registry
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Store

if TYPE_CHECKING:
    from pedro.config import Settings


@dataclass
class Running:
    url: str
    settings: Settings
    registry: Registry
    store: Store
    admin: str
    acme: str  # a key of the tenant, for inference


def make_adapters(folder: Path) -> Settings:
    """acme.faq (1, 2 the champion, 3 a candidate), globex.faq (1), and initech.plain of another backbone."""
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    for seed, (name, promote) in enumerate(
        (("acme.faq", True), ("acme.faq", True), ("acme.faq", False), ("globex.faq", True)), start=1
    ):
        make_adapter(folder / f"made-{seed}", seed)
        version = register(registry, folder / f"made-{seed}", name, promote=promote)
        if not promote:
            registry.set_alias(name, "candidate", version.version)
            registry.set_gate(version, "refused: accuracy 0.5000 against 0.7000 of the champion")
    return settings


@contextlib.contextmanager
def running(settings: Settings, config: ServeConfig | None = None) -> Iterator[Running]:
    """Serve what the registry of `settings` holds, on stories260K unless told."""
    torch.set_num_threads(1)
    registry, store = Registry.open(settings), Store(settings.database_url)
    config = config or ServeConfig(max_batch=8)
    backbone = resolve_backbone(config.backbone)
    replica = ReplicaServer(config, settings, "r0")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(lambda: None, log_level="warning", timeout_graceful_shutdown=2))

    async def main() -> None:
        replicas = ReplicaSet(lambda _name: LocalConnection(replica))
        resolver = ModelResolver(registry, config.model_name, backbone.digest, 0.2)
        await resolver.refresh()
        replicas.update(["r0"])
        backend = ServeBackend(config.model_name, context_length(backbone), resolver, registry, replicas)
        server.config.app = create_app(lambda: backend, store)
        watching = asyncio.create_task(resolver.watch())
        try:
            await server.serve(sockets=[listener])
        finally:
            watching.cancel()
            await replicas.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.01)
    try:
        yield Running(
            f"http://127.0.0.1:{listener.getsockname()[1]}",
            settings,
            registry,
            store,
            store.create_key("ops", ("admin",))[1],
            store.create_key("acme", ("infer",))[1],
        )
    finally:
        server.should_exit = True
        thread.join(60)
        replica.close()
        store.close()
