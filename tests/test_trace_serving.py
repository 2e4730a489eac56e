"""How many files one chat completion enters: the real gateway, serving and engine, traced over all their threads.

The aim was 20 files. The 40 that are entered have 11,000 lines, so 20 would have 550 each, and a file of this
repository has 400 at most: 28 is the least that could be. Between the two lies what is kept apart for a reason: the
scheduler touches no tensor and the runner knows no sequence; an ingress runs without an engine, so that its client, a
replica's outputs and the messages between them are three; where a call goes first is not who answers once that is lost;
templates are run by a bounded process, too; and names, adapters' kinds and the store's records serve every package.
"""

import asyncio
import logging
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
import torch
from serving_adapters import backbone, make_adapter, register, settings_at
from serving_connections import LocalConnection

import pedro
from pedro.gateway.app import GatewaySettings, create_app
from pedro.registry import Registry
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Store

ROOT = f"{Path(pedro.__file__).parent}/"
QUIET = GatewaySettings(follow_keys_every_s=600, write_usage_every_s=600)  # what is done beside requests
MOST_FILES = 40  # the bound that holds; lower it with every file that a request no longer enters


class Trace:
    """The project's files that any thread started since enters while it is `on`, and the calls in each."""

    def __init__(self) -> None:
        self.on = False
        self.calls: Counter[str] = Counter()

    def __call__(self, frame, event, _) -> None:
        if self.on and event == "call" and (path := frame.f_code.co_filename).startswith(ROOT):
            self.calls[path.removeprefix(ROOT)] += 1


@pytest.fixture
def trace():
    trace = Trace()
    logging.disable()  # who formats log lines is a matter of the tests before
    threading.setprofile(trace)  # what the engine and the pools of threads start from now on
    sys.setprofile(trace)
    yield trace
    sys.setprofile(None)
    threading.setprofile(None)
    logging.disable(logging.NOTSET)


def test_one_chat_completion_enters_no_more_files_than_it_must(trace, tmp_path):
    torch.set_num_threads(1)
    settings = settings_at(tmp_path / "home")
    registry, store = Registry.open(settings), Store(settings.database_url)
    make_adapter(tmp_path / "made", 1)
    register(registry, tmp_path / "made", "acme.faq")
    replica = ReplicaServer(ServeConfig(max_batch=8), settings, "r0")
    secret = store.create_key("acme", ("infer",))[1]

    async def go():
        replicas = ReplicaSet(lambda name: LocalConnection(replica))
        resolver = ModelResolver(registry, "stories260K", backbone().digest, 3600.0)
        await resolver.refresh()
        replicas.update(["r0"])
        backend = ServeBackend("stories260K", 512, resolver, registry, replicas)
        transport = httpx.ASGITransport(create_app(lambda: backend, store, QUIET))
        headers = {"Authorization": f"Bearer {secret}"}
        body = {"model": "acme.faq", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 8}
        async with httpx.AsyncClient(transport=transport, base_url="http://here", headers=headers) as client:
            await client.post("/v1/chat/completions", json=body)  # loads the adapter, as the first of many
            trace.on = True
            answer = await client.post("/v1/chat/completions", json=body)
            trace.on = False
        await replicas.close()
        return answer

    answer = asyncio.run(go())
    replica.close()
    store.close()
    assert answer.status_code == 200, answer.text
    entered = "\n".join(f"{calls:5} {file}" for file, calls in sorted(trace.calls.items()))
    assert {"gateway/routes_inference.py"} <= trace.calls.keys(), "the trace sees the gateway"
    assert any(file.startswith("engine/") for file in trace.calls), "the trace sees the engine's thread"
    assert len(trace.calls) <= MOST_FILES, f"{len(trace.calls)} files:\n{entered}"
