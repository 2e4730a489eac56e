"""The backend of a gateway on one real replica in this process, and calls to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from serving_adapters import backbone, make_adapter, register, settings_at
from serving_connections import LocalConnection

from pedro.gateway.backend import GenerateCall
from pedro.registry import Registry
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer

T = TypeVar("T")
_ids = itertools.count()


@contextmanager
def running_replica(folder: Path) -> Iterator[SimpleNamespace]:
    """A replica of 8 slots and a registry with acme.faq (two versions) and globex.faq."""
    torch.set_num_threads(1)
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    for seed, name in enumerate(("acme.faq", "acme.faq", "globex.faq"), start=1):
        make_adapter(folder / str(seed), seed, "completion")
        register(registry, folder / str(seed), name)
    replica = ReplicaServer(ServeConfig(max_batch=8), settings, "r0")
    yield SimpleNamespace(replica=replica, registry=registry, folder=folder)
    replica.close()


@asynccontextmanager
async def ingress(
    served: SimpleNamespace, *names: str, connection: type[LocalConnection] = LocalConnection, timeout_s: float = 600.0
) -> AsyncIterator[SimpleNamespace]:
    """The backend of an ingress whose replicas are `names`: all the one real replica, each reached on its own way."""
    connections: dict[str, LocalConnection] = {}
    replicas = ReplicaSet(lambda name: connections.setdefault(name, connection(served.replica)))
    resolver = ModelResolver(served.registry, "stories260K", backbone().digest, 0.05)
    await resolver.refresh()
    replicas.update(names)
    try:
        yield SimpleNamespace(
            backend=ServeBackend("stories260K", 512, resolver, served.registry, replicas, timeout_s),
            replicas=replicas,
            connections=connections,
        )
    finally:
        await replicas.close()


def call(
    prompt: str = "Once upon a time", model: str = "acme.faq", n: int = 1, tenant: str = "acme", **params: Any
) -> GenerateCall:
    params = {"max_tokens": 40, "ignore_eos": True, **params}
    return GenerateCall(f"c{next(_ids)}", tenant, model, prompt=prompt, n=n, params=params)


async def answer(backend: ServeBackend, asked: GenerateCall) -> tuple[str, list[int], int]:
    """Text and ids of a call's one choice, and how many deltas it came in."""
    async with aclosing(backend.generate(asked)) as deltas:
        got = [delta async for delta in deltas]
    assert got[-1].finish_reason
    return "".join(d.text for d in got), [token for d in got for token in d.token_ids], len(got)


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, within a minute."""

    async def limited() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(limited())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def waiting_apart(at: SimpleNamespace) -> int:
    """How many suspected calls wait until another has begun."""
    return len(at.backend._retries._probing._waiters or ())


def idle(served: SimpleNamespace) -> bool:
    """Whether its engine runs nothing."""
    stats = served.replica.stats()
    return bool(stats["slots_free"] == stats["slots"]) and not stats["running"]


def text_call(prompt: str, model: str = "acme.faq", **fields: Any) -> GenerateCall:
    """A call of four tokens."""
    return replace(call(prompt, model, max_tokens=4), **fields)


async def fingerprint(backend: ServeBackend, asked: GenerateCall) -> str:
    """The version that answered."""
    async with aclosing(backend.generate(asked)) as deltas:
        return ([delta.fingerprint async for delta in deltas][-1] or "").partition("#")[0]
