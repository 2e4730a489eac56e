"""Runs a gateway on a port of this machine for the tests, in a thread, as uvicorn would serve it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import openai
import uvicorn
from gateway_backend import WordBackend

from pedro.gateway.app import GatewaySettings, create_app
from pedro.store import Store

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass
class Gateway:
    url: str
    backend: WordBackend
    store: Store
    storage: Path
    app: FastAPI

    def key(self, tenant: str = "acme", scopes: tuple[str, ...] = ("infer",)) -> str:
        return self.store.create_key(tenant, scopes)[1]

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@contextlib.contextmanager
def serve(directory: Path, *, token_s: float = 0.0, settings: GatewaySettings | None = None) -> Iterator[Gateway]:
    store = Store(f"sqlite:///{directory}/pedro.db")
    backend = WordBackend(token_s)
    settings = settings or GatewaySettings()
    storage = settings.storage or f"{directory}/storage"
    settings = replace(settings, storage=storage, follow_keys_every_s=0.0)  # tests wait for no change
    app = create_app(lambda: backend, store, settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < deadline, "the server did not start in time"
        time.sleep(0.01)
    try:
        yield Gateway(f"http://127.0.0.1:{listener.getsockname()[1]}", backend, store, Path(storage), app)
    finally:
        server.should_exit = True
        thread.join(60)
        store.close()
