"""Reaches one engine replica by its id through Ray Serve.

Serve's own routers choose a replica for each request: at random among two, by session (consistent hashing, without
regard to load) or by the models a replica reports to have (multiplexing: known late, and a hot model stays where it
is). Here the ingress chooses, since it alone knows the load of each stream, and a stream belongs to one replica; so
this router does as it is told, and publishes which replicas there are.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pedro.serving.protocol import ControlRequest, OutputBatch, ReplicaLost, SubmitRequest

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

ROUTER = "pedro.serving.ray_connection:AddressedRouter"
T = TypeVar("T")


class AddressedRouter(RequestRouter):
    """Sends a request to the replica that its argument `to` names; one without goes to any.

    A replica refuses what names another (`EngineReplica`), so a request for one that is gone ends at once, rather
    than wait for a replica that never comes back.
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
        from pedro.serving.discovery import DISCOVERY  # Serve ships this class by value: a global here would be a copy

        DISCOVERY.publish(frozenset(replica.replica_id.unique_id for replica in replicas))


class RayReplicaConnection:
    """Conforms to `pedro.serving.protocol.ReplicaConnection`."""

    def __init__(self, engine: DeploymentHandle[Any], replica: str) -> None:
        self._engine = engine
        self._replica = replica

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of the calls submitted under `stream_id`."""
        batches: Any = self._engine.options(stream=True).stream.remote(stream_id, to=self._replica)
        try:
            async for batch in batches:
                yield _checked(batch)
        except (RayError, RayServeException) as error:
            raise ReplicaLost(str(error).partition("\n")[0]) from error
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
        # Serve tells calls apart by the HTTP request that they are part of: one request's calls to several replicas
        # would be mistaken for one another, hence a context of their own.
        return await asyncio.create_task(self._answer(method, arguments), context=contextvars.Context())

    async def _answer(self, method: DeploymentHandle[Any], arguments: tuple[Any, ...]) -> Any:
        try:
            return _checked(await method.remote(*arguments, to=self._replica))
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise ReplicaLost(str(error).partition("\n")[0]) from error


def _checked(answer: Any) -> Any:
    """Errors come as values: raised over there they would come wrapped, and logged as faults of the replica."""
    if isinstance(answer, Exception):
        raise answer
    return answer
