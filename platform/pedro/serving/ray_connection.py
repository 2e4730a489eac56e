"""Connects to one engine replica by its id through Ray Serve.

Serve's own routers choose a replica for each request: the better of two random ones, by session (consistent hashing
that ignores load) or by the models that a replica reports (multiplexing: delayed, and a hot model never spreads). Here
the ingress chooses, since only it knows the load of each stream, and a stream belongs to one replica; so this router
follows the given id, and publishes which replicas exist.

Where Serve's proxies talk to gateways by gRPC and its limit of messages is lifted, gateways talk to replicas so, too:
results of Ray's actors cost several times as much (`cluster.py` and the manifests set both). A host that vanishes is
noticed late there, hence the limit on answers.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pedro.serving.protocol import ControlRequest, OutputBatch, ReplicaLost, SubmitRequest

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ROUTER = "pedro.serving.ray_connection:AddressedRouter"
SWITCHES = {"RAY_SERVE_PROXY_USE_GRPC": "1", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "-1"}  # Serve's own
BY_GRPC: dict[str, Any] = {
    "_by_reference": False,
    "request_serialization": "pickle",  # not by cloudpickle, which is written in Python
    "response_serialization": "pickle",
}
LOST = (RayError, RayServeException, grpc.RpcError)
ENDED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL)  # as a dead replica's calls
ANSWER_S = 90.0  # a replica that takes longer is gone; loading an adapter may take 60 s
T = TypeVar("T")


class AddressedRouter(RequestRouter):
    """Sends a request to the replica in its argument `to`, or to any replica without it.

    Replicas refuse requests for others (`EngineReplica`), so a request for one that is gone fails at once instead of
    waiting for it forever.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        to = pending_request.kwargs.get("to") if pending_request is not None else None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == to]
        return [named or candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve whenever the deployment's replicas change, on its router's thread."""
        super().update_replicas(replicas)
        from pedro.serving.discovery import DISCOVERY  # Serve pickles this class by value: a global would be a copy

        DISCOVERY.publish(frozenset(replica.replica_id.unique_id for replica in replicas))


class RayReplicaConnection:
    """Conforms to `pedro.serving.protocol.ReplicaConnection`."""

    def __init__(self, engine: DeploymentHandle[Any], replica: str) -> None:
        by_grpc = SWITCHES.items() <= os.environ.items()
        self._engine = engine.options(**BY_GRPC) if by_grpc else engine
        self._replica = replica

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of the calls submitted under `stream_id`."""
        batches: Any = self._engine.options(stream=True).stream.remote(stream_id, to=self._replica)
        try:
            async for batch in batches:
                yield _checked(batch)
        except LOST as error:
            raise _lost(error) from error
        except asyncio.CancelledError:
            _check_own()
            raise
        finally:
            batches.cancel()

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        """Start calls and end others."""
        await self._call(self._engine.submit, stream_id, requests, cancelled)

    async def ask(self, request: ControlRequest[T]) -> T:
        """What the replica answers."""
        answer: T = await self._call(self._engine.ask, request)
        return answer

    async def _call(self, method: DeploymentHandle[Any], *arguments: Any) -> Any:
        # Serve identifies calls by the HTTP request they belong to: calls of one request to several replicas would be
        # confused, so each gets a new context.
        return await asyncio.create_task(self._answer(method, arguments), context=contextvars.Context())

    async def _answer(self, method: DeploymentHandle[Any], arguments: tuple[Any, ...]) -> Any:
        try:
            async with asyncio.timeout(ANSWER_S):
                return _checked(await method.remote(*arguments, to=self._replica))
        except TimeoutError as error:
            raise ReplicaLost(f"no answer for {ANSWER_S:g} s", blameless=True) from error
        except RayTaskError:
            raise
        except LOST as error:
            raise _lost(error) from error
        except asyncio.CancelledError:
            _check_own()
            raise


def _lost(error: BaseException) -> ReplicaLost:
    refused = isinstance(error, grpc.aio.AioRpcError) and error.code() not in ENDED  # the message, whoever runs there
    return ReplicaLost(str(error).partition("\n")[0], blameless=refused)


def _check_own() -> None:
    """Raise ReplicaLost if it is not this task that was cancelled, but by gRPC what it waits for."""
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        raise ReplicaLost("the replica cancelled it") from None


def _checked(answer: Any) -> Any:
    """Errors are returned as values: raised in the replica, they would be wrapped, and logged as its failures."""
    if isinstance(answer, Exception):
        raise answer
    return answer
