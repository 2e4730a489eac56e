"""The Ray Serve application: ingress (gateway, no accelerator) in front of engine replicas (one per device).

The same `build_app` serves `pedro serve`, a Serve config file and a RayService of KubeRay.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from pedro.config import Settings
from pedro.errors import PedroError
from pedro.process import freeze_heap
from pedro.serving.config import ServeConfig
from pedro.serving.protocol import ControlRequest, OutputBatch, ReplicaLost, SubmitRequest, T
from pedro.serving.ray_connection import ROUTER, RayReplicaConnection
from pedro.spec_reader import validate_spec

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

    from pedro.store import Position

KEEP_HOUSE_EVERY_S = 15.0
KEEP_AUDIT_S = 400 * 24 * 3600.0
KEEP_CHANGES_S = 3600.0  # a gateway that lags further behind reads everything again
KEEP_BATCHES_S = 7 * 24 * 3600.0  # of usage: beyond this a gateway's delayed last batch may count twice
HEAD_RESOURCE = "node:__internal_head__"  # which only the head has
HEALTH_CHECK_PERIOD_S = 2.0  # a dead gateway is replaced within a few of these
STREAMS_END_S = 90.0  # for a stopping gateway to finish its streams
MAX_STARTS = 100  # per replica; Serve's default of three is raised by RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT
NO_ACCESS_LOG = {"enable_access_log": False}  # of Serve's: the gateway has its own
MAX_ONGOING = 4096  # far above the engine's own queue limit, which applies first


@serve.deployment(
    name="engine",
    max_ongoing_requests=MAX_ONGOING,
    max_constructor_retry_count=MAX_STARTS,
    logging_config=NO_ACCESS_LOG,
    graceful_shutdown_timeout_s=10,  # unfinished requests then continue on another replica
    request_router_config=RequestRouterConfig.model_validate({"request_router_class": ROUTER}),
)
class EngineReplica:
    """One engine on one device. Each method takes the id of the intended replica."""

    def __init__(self, config: dict[str, Any], settings: Settings) -> None:
        from pedro import log_lines, tracing
        from pedro.serving.server import ReplicaServer

        log_lines.use(settings.log_format)
        self._id = serve.get_replica_context().replica_tag
        tracing.start("pedro-engine", self._id)
        given = ServeConfig(**config)
        self._server = ReplicaServer(given, settings, self._id, self._end, _replicas_here(given))
        freeze_heap()

    def _end(self, _error: PedroError) -> None:
        """The engine cannot continue: exit, so that its requests move to another replica and Serve starts a new one."""
        os._exit(1)

    async def stream(self, stream_id: str, *, to: str) -> AsyncGenerator[OutputBatch | ReplicaLost, None]:
        """The long-lived stream of one ingress."""
        if to != self._id:
            yield ReplicaLost(to, blameless=True)
            return
        async with aclosing(self._server.stream(stream_id)) as batches:
            async for batch in batches:
                yield batch

    async def submit(
        self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int], *, to: str
    ) -> ReplicaLost | PedroError | None:
        """Start and end calls on that stream."""
        return await self._answer(to, lambda: self._server.submit(stream_id, requests, cancelled))

    async def ask(self, request: ControlRequest[T], *, to: str) -> T | ReplicaLost | PedroError:
        """Requests other than generation."""
        return await self._answer(to, lambda: self._server.ask(request))

    async def stats(self) -> dict[str, Any]:
        """Statistics of this replica's engine, or of any one if there are several."""
        return self._server.stats()

    def check_health(self) -> None:
        """Called by Serve; if it raises, the replica is replaced."""
        self._server.check_health()

    async def _answer(self, to: str, work: Callable[[], Awaitable[T]]) -> T | ReplicaLost | PedroError:
        """The result of `work`; errors for the caller are returned as values (`RayReplicaConnection` raises them)."""
        if to != self._id:
            return ReplicaLost(to, blameless=True)
        try:
            return await work()
        except (PedroError, ReplicaLost) as error:
            return error


@serve.deployment(
    name="gateway",
    max_ongoing_requests=MAX_ONGOING,
    max_constructor_retry_count=MAX_STARTS,
    logging_config=NO_ACCESS_LOG,
    graceful_shutdown_timeout_s=STREAMS_END_S,
    health_check_period_s=HEALTH_CHECK_PERIOD_S,
)
@serve.ingress()
class Gateway:
    """The HTTP edge: keys, OpenAI schemas, model names."""

    def __init__(self, config: dict[str, Any], settings: Settings, engine: DeploymentHandle[Any]) -> None:
        from pedro.backbone import context_length, resolve_backbone
        from pedro.backbones.sharing import obtain_backbone
        from pedro.registry import Registry
        from pedro.serving.resolver import ModelResolver
        from pedro.sizes import SizeGauges
        from pedro.store import Store

        self._config = ServeConfig(**config)
        obtain_backbone(settings, self._config.backbone)
        backbone = resolve_backbone(self._config.backbone)
        self._registry = Registry.open(settings)
        self._backbone_digest = backbone.digest
        self._resolver = ModelResolver(
            self._registry, self._config.model_name, backbone.digest, self._config.watch_interval_s
        )
        self._longest = min(self._config.max_length or context_length(backbone), context_length(backbone))
        self._store = Store(settings.database_url)
        self._engine = engine
        self._requests_log, self._log_format = settings.requests_log, settings.log_format
        self._storage = settings.storage
        self._env = settings.env()
        self._webhook_key_file, self._webhook_networks = settings.webhook_key_file, settings.webhook_networks
        self._sizes = SizeGauges(settings)
        self._starting: list[asyncio.Task[Any]] = []

    async def __serve_build_asgi_app__(self) -> Any:
        from pedro import log_lines, tracing
        from pedro.gateway.access_log import write_to
        from pedro.gateway.app import GatewaySettings, create_app
        from pedro.serving.backend import ServeBackend
        from pedro.serving.discovery import DISCOVERY  # here: Serve pickles this class with its globals
        from pedro.serving.router import ReplicaSet

        log_lines.use(self._log_format)
        tracing.start("pedro-gateway", serve.get_replica_context().replica_tag)
        write_to(self._requests_log, self._log_format)
        loop = asyncio.get_running_loop()
        connected = ReplicaSet(lambda replica: RayReplicaConnection(self._engine, replica), self._backbone_digest)

        def update(replicas: frozenset[str]) -> None:  # on the router's thread
            loop.call_soon_threadsafe(connected.update, replicas)

        DISCOVERY.subscribe(update)
        first = self._engine.stats.remote()  # a handle's first request creates its router, which publishes replicas
        with suppress(Exception):  # the watcher logs it and retries
            await self._resolver.refresh()  # before the first request, which may arrive at once
        name = serve.get_replica_context().replica_tag if self._config.gateways > 1 else ""
        backend = ServeBackend(
            self._config.model_name,
            self._longest,
            self._resolver,
            self._registry,
            connected,
            self._config.request_timeout_s,
            self._sizes,
            name,
        )

        async def learn() -> None:  # an engine may have memory for less than the context
            backend.max_model_len = (await first)["max_length"]

        tasks = learn(), self._resolver.watch(), self._keep_house()
        self._starting = [asyncio.create_task(task) for task in tasks]
        settings = GatewaySettings(
            max_body_bytes=max_body_bytes(self._longest),
            max_open_requests=MAX_ONGOING,
            gateways=self._config.gateways,
            name=name,
            backbones={self._config.model_name: self._config.backbone},
            dry_run_command=(sys.executable, "-m", "pedro.training.dry_run_process"),
            dry_run_env=self._env,
            storage=self._storage,
            webhook_key_file=self._webhook_key_file,
            webhook_networks=self._webhook_networks,
            max_file_bytes=int(self._config.max_file_mb * 2**20),
            max_tenant_file_bytes=int(self._config.max_tenant_files_mb * 2**20),
            max_open_jobs=self._config.max_open_jobs,
            send_request_id=False,  # Serve's proxy sends it
        )
        app = create_app(lambda: backend, self._store, settings)
        freeze_heap()
        return app

    async def _keep_house(self) -> None:
        """Mirror pending moves to MLflow, trim the change feed and the audit, measure stored sizes; until cancelled."""
        seen: Position | None = None
        waiting: list[str] = []
        while True:
            await asyncio.sleep(KEEP_HOUSE_EVERY_S)
            with suppress(Exception):  # the database is away, which the watcher logs; retried
                here = await asyncio.to_thread(self._registry.stamp)
                if waiting or here != seen:
                    waiting = await asyncio.to_thread(self._registry.mirror)
                    seen = here
                await asyncio.to_thread(self._store.forget_changes, time.time() - KEEP_CHANGES_S)
                await asyncio.to_thread(self._store.forget_audit, time.time() - KEEP_AUDIT_S)
                await asyncio.to_thread(self._store.forget_batches, int(1000 * (time.time() - KEEP_BATCHES_S)))
            await asyncio.to_thread(self._sizes.refresh)


def max_body_bytes(max_model_len: int) -> int:
    """Room for 256 full prompts as token ids: anything larger would be refused anyway, after delaying others."""
    return min(8 * 2**20, max(2**20, 2048 * max_model_len))


def build_app(args: dict[str, Any]) -> Application:
    """The application for `args` (the fields of ServeConfig).

    Raises ConfigError for invalid arguments and BackboneError for an unavailable backbone, before anything starts.
    """
    from pedro.backbone import resolve_backbone
    from pedro.backbones.sharing import obtain_backbone

    config = validate_spec(args, ServeConfig, source="serve arguments")
    settings = Settings.from_env()
    obtain_backbone(settings, config.backbone)
    resolve_backbone(config.backbone)
    replica: Any = EngineReplica
    gateway: Any = Gateway
    engine = replica.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    ).bind(config.model_dump(), settings)
    gateway = gateway.options(
        num_replicas=config.gateways,
        ray_actor_options={"num_cpus": config.gateway_num_cpus, **_off_the_head()},
    )
    application: Application = gateway.bind(config.model_dump(), settings, engine)
    return application


def _replicas_here(config: ServeConfig) -> int:
    """How many replicas may share the memory of this node, or of a GPU, if spread evenly over all nodes."""
    import ray

    if config.device != "cpu" and config.num_gpus:
        return max(1, min(config.replicas, int(1 / config.num_gpus)))
    nodes = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]}
    each: int = -(-config.replicas // max(1, sum(cpus >= config.num_cpus for cpus in nodes.values())))
    here = nodes.get(ray.get_runtime_context().get_node_id(), 0)
    fit: int = int(here // config.num_cpus) if config.num_cpus else each
    return max(1, min(each, fit))


def _off_the_head() -> dict[str, Any]:
    """Options that keep an actor off the head, if the cluster has other nodes."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    heads = [node["NodeID"] for node in nodes if HEAD_RESOURCE in node["Resources"]]
    return {"label_selector": {"ray.io/node-id": f"!{heads[0]}"}} if len(nodes) > 1 and heads else {}
