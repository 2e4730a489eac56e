"""The Ray Serve application: ingress (gateway, no accelerator) in front of engine replicas (one a device).

The same `build_app` serves `pedro serve`, a Serve config file and a RayService of KubeRay.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pedro.config import Settings, validate_spec
from pedro.serving.config import ServeConfig

MAX_ONGOING = 4096  # far above the engine's own bounded queue, which is what refuses


@serve.deployment(name="engine", max_ongoing_requests=MAX_ONGOING, graceful_shutdown_timeout_s=10)
class EngineReplica:
    """One engine on one device."""

    def __init__(self, config: dict[str, Any], settings: Settings) -> None:
        from pedro.serving.replica import Replica

        self._replica = Replica(ServeConfig(**config), settings)

    async def generate(self, call: Any, ref: str | None, resumed: tuple[int, ...] = ()) -> Any:
        """Slices of deltas; an error meant for the tenant is the last item rather than an exception."""
        async with aclosing(self._replica.generate(call, ref, resumed)) as pieces:
            async for piece in pieces:
                yield piece

    async def ready(self) -> bool:
        return self._replica.ready()

    async def stats(self) -> dict[str, Any]:
        """Counts and occupancy of this replica's engine."""
        return self._replica.stats()

    def check_health(self) -> None:
        """Called by Serve; an exception has the replica replaced."""
        self._replica.check_health()


@serve.deployment(name="gateway", max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Gateway:
    """The HTTP edge: keys, OpenAI schemas, model names."""

    def __init__(self, config: dict[str, Any], settings: Settings, engine: DeploymentHandle) -> None:
        from pedro.backbone import context_length, resolve_backbone
        from pedro.registry import Registry
        from pedro.serving.backend import ServeBackend
        from pedro.serving.catalog import Catalog
        from pedro.store import Store

        wanted = ServeConfig(**config)
        backbone = resolve_backbone(wanted.backbone)
        registry = Registry.open(settings)
        self._catalog = Catalog(registry, wanted.model_name, backbone.digest, wanted.watch_interval_s)
        longest = min(wanted.max_length or context_length(backbone), context_length(backbone))
        self._backend = ServeBackend(wanted.model_name, longest, self._catalog, registry, engine)
        self._store = Store(settings.database_url)
        self._watching: asyncio.Task | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        from pedro.gateway.app import GatewaySettings, create_app

        self._watching = asyncio.create_task(self._catalog.watch())
        settings = GatewaySettings(
            max_body_bytes=max_body_bytes(self._backend.max_model_len),
            send_request_id=False,  # Serve's proxy sends it itself
        )
        return create_app(lambda: self._backend, self._store, settings)


def max_body_bytes(max_model_len: int) -> int:
    """Room for 256 full prompts as token ids: what is larger could only be refused, at a cost to everybody else."""
    return min(8 * 2**20, max(2**20, 2048 * max_model_len))


def build_app(args: dict[str, Any]) -> Application:
    """The application for `args` (the fields of ServeConfig).

    Raises ConfigError for wrong arguments and BackboneError for a backbone that cannot be had, before anything starts.
    """
    from pedro.backbone import resolve_backbone

    config = validate_spec(args, ServeConfig, source="serve arguments")
    resolve_backbone(config.backbone)
    settings = Settings.from_env()
    replica: Any = EngineReplica
    gateway: Any = Gateway
    engine = replica.options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    ).bind(config.model_dump(), settings)
    return gateway.bind(config.model_dump(), settings, engine)
