"""The connection to a replica by Serve's handle: by gRPC where proxies use it, and lost if either side ends it."""

import asyncio
from contextlib import aclosing

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorUnavailableError

from pedro.serving import ray_connection
from pedro.serving.protocol import ReplicaLost
from pedro.serving.ray_connection import RayReplicaConnection


class Handle:
    """A deployment's handle whose stream and answers end in `ends`, an exception or what is awaited."""

    def __init__(self, ends):
        self.ends, self.given, self.cancelled = ends, {}, False

    def options(self, **given):
        self.given |= given
        return self

    @property
    def stream(self):
        return self

    submit = stream

    def remote(self, *_, to):
        self.to = to
        return self

    def cancel(self):
        self.cancelled = True

    async def _end(self):
        if isinstance(self.ends, BaseException):
            raise self.ends
        return await self.ends

    def __await__(self):
        return self._end().__await__()

    async def __aiter__(self):
        yield "batch"
        yield await self._end()


def unavailable():
    return AioRpcError(grpc.StatusCode.UNAVAILABLE, Metadata(), Metadata(), "Socket closed")


LOST = [unavailable, asyncio.CancelledError, lambda: ActorUnavailableError("gone", b"x" * 16)]


@pytest.mark.parametrize(
    ("switch", "limit", "by_reference"), [("1", "-1", False), ("0", "-1", None), (None, "-1", None), ("1", None, None)]
)
def test_replicas_are_asked_by_grpc_where_serve_was_told_to_use_it(switch, limit, by_reference, monkeypatch):
    told = {"RAY_SERVE_PROXY_USE_GRPC": switch, "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": limit}
    for name, value in told.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    handle = Handle(None)
    RayReplicaConnection(handle, "r0")
    assert handle.given.get("_by_reference") is by_reference


@pytest.mark.parametrize("error", LOST)
def test_a_stream_or_call_that_its_replica_ends_is_lost_and_never_taken_for_cancelled(error):
    handle = Handle(error())
    connection = RayReplicaConnection(handle, "r0")

    async def read():
        async with aclosing(connection.stream("s")) as batches:
            return [batch async for batch in batches]

    for work in (read(), connection.submit("s", [], [])):
        with pytest.raises(ReplicaLost):
            asyncio.run(work)
    assert handle.cancelled
    assert handle.to == "r0"


def test_a_replica_that_does_not_answer_is_lost_and_one_that_refuses_a_message_is_nobodys_fault(monkeypatch):
    monkeypatch.setattr(ray_connection, "ANSWER_S", 0.01)
    too_large = AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, Metadata(), Metadata(), "larger than max")

    async def lost(ends):
        with pytest.raises(ReplicaLost) as told:
            await RayReplicaConnection(Handle(ends), "r0").submit("s", [], [])
        return told.value.blameless

    async def silent():
        return await lost(asyncio.Event().wait())

    assert asyncio.run(silent())
    assert asyncio.run(lost(too_large))
    assert not asyncio.run(lost(unavailable()))


def test_who_is_cancelled_itself_has_lost_no_replica():
    async def go():
        connection = RayReplicaConnection(Handle(asyncio.Event().wait()), "r0")
        task = asyncio.create_task(anext_of(connection.stream("s")))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def anext_of(batches):
        assert await anext(batches) == "batch"
        await anext(batches)

    asyncio.run(go())
