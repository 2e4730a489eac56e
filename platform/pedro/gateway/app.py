"""Assembles the gateway: edge, errors, routes. Only the wiring; each part has its own file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI

from pedro.errors import PedroError
from pedro.files import FileLimits, Files
from pedro.gateway import (
    routes_adapters,
    routes_audit,
    routes_batches,
    routes_embeddings,
    routes_files,
    routes_fine_tuning,
    routes_health,
    routes_inference,
    routes_metrics,
    routes_models,
    routes_openapi,
    routes_responses,
    routes_tokenizer,
    routes_usage,
    routes_webhooks,
)
from pedro.gateway.auth import Authenticator
from pedro.gateway.batch_runner import BatchRunner
from pedro.gateway.dry_runs import DryRuns
from pedro.gateway.edge import Edge, GatewayMetrics, Observed
from pedro.gateway.errors import install_error_handlers
from pedro.gateway.quotas import OpenRequests, Quotas
from pedro.gateway.traffic_sampler import EVERY_S, TrafficSampler
from pedro.gateway.uploads import FileThreads, OpenUploads
from pedro.gateway.usage import FLUSH_EVERY_S, UsageLedger
from pedro.gateway.webhook_addresses import Addresses
from pedro.gateway.webhook_runner import WebhookRunner
from pedro.gateway.webhook_sending import WebhookSender
from pedro.gateway.webhook_signing import WebhookSecrets

if TYPE_CHECKING:
    from pedro.gateway.backend import Backend
    from pedro.store import Store

log = logging.getLogger("pedro.gateway")


@dataclass(frozen=True)
class GatewaySettings:
    max_body_bytes: int = 8 * 2**20  # larger ones get 413
    body_timeout_s: float = 60.0  # a body that takes longer to arrive gets 408
    max_open_requests: int = 4096  # a tenant may have as many as are free, so at most half
    max_choices: int = 256  # prompts × n of one request
    gateways: int = 1  # gateway processes that share the quotas
    name: str = ""  # of this gateway
    follow_keys_every_s: float = 0.5  # revoked keys and changed quotas take effect within this time
    backbones: Mapping[str, str] = field(default_factory=dict)  # that can be fine-tuned: spec value by name
    dry_run_command: tuple[str, ...] = ()  # the program that estimates a job from its spec; empty: no dry runs
    dry_run_env: Mapping[str, str] = field(default_factory=dict)
    storage: str | None = None  # a folder or fsspec URL for uploaded files; None: no files
    max_file_bytes: int = 512 * 2**20  # of one uploaded file; larger ones get 413
    max_tenant_file_bytes: int = 10 * 2**30  # of all files of a tenant
    max_tenant_files: int = 10_000  # their number
    max_open_uploads: int = 4  # of a tenant
    max_open_jobs: int = 100  # unfinished fine-tuning jobs per tenant
    max_open_batches: int = 100  # unfinished ones per tenant
    rows_of_batch: int = 8  # concurrent rows of one batch, while no other request is open
    batch_rows: int = 32  # concurrent rows of all batches
    batch_lease_s: float = 15.0  # after which another gateway continues a killed one's batches
    webhook_key_file: Path | None = None  # with the keys of signing secrets; None: no webhooks
    webhook_networks: tuple[str, ...] = ()  # private networks that webhooks may reach, also without TLS
    upload_timeout_s: float = 3600.0  # for a whole file to arrive
    write_usage_every_s: float = FLUSH_EVERY_S  # a killed gateway loses what it has not written
    observe_every_s: float = EVERY_S  # interval of the samples in /metrics/history
    send_request_id: bool = True  # false behind a server that adds x-request-id itself, as Ray Serve's proxy does


def create_app(
    backend_provider: Callable[[], Backend], store: Store, settings: GatewaySettings | None = None
) -> FastAPI:
    """The gateway as an ASGI application.

    `backend_provider` is called for each request, on the event loop, so it must not block; it may raise a PedroError
    while there is no backend, and `/ready` is 503 until it returns one that is ready.
    """
    settings = settings or GatewaySettings()
    authenticator = Authenticator(store, settings.follow_keys_every_s)
    quotas = Quotas(store, settings.gateways)
    limits = FileLimits(settings.max_file_bytes, settings.max_tenant_file_bytes, settings.max_tenant_files)
    files = Files(store, settings.storage, limits) if settings.storage is not None else None
    file_threads = FileThreads()
    metrics = GatewayMetrics(settings.name)
    sampler = TrafficSampler(metrics, backend_provider, settings.observe_every_s)
    usage = UsageLedger(store, metrics.registry, settings.write_usage_every_s)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sampling = asyncio.create_task(sampler.run())
        sweeping = asyncio.create_task(file_threads.run(_sweep, files)) if files is not None else None
        for runner in runners:
            runner.start()
        yield
        sampling.cancel()
        for runner in runners:
            await runner.close()
        await usage.close()
        await quotas.close()
        if sweeping is not None:
            await sweeping
        file_threads.close()
        authenticator.close()

    app = FastAPI(
        title="pedro", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.backend = backend_provider
    app.state.store = store
    app.state.settings = settings
    app.state.authenticator = authenticator
    app.state.open_requests = OpenRequests(settings.max_open_requests)
    app.state.quotas = quotas
    app.state.metrics = metrics
    app.state.sampler = sampler
    app.state.files = files
    app.state.open_uploads = OpenUploads(settings.max_open_uploads)
    app.state.file_threads = file_threads
    app.state.usage = usage
    app.state.dry_runs = DryRuns(settings.dry_run_command, settings.dry_run_env)
    batches = BatchRunner(app, store, files) if files is not None else None
    app.state.batches = batches
    webhooks = _webhooks(store, settings, metrics) if settings.webhook_key_file is not None else None
    app.state.webhooks = webhooks
    runners = [runner for runner in (batches, webhooks) if runner is not None]
    install_error_handlers(app)
    app.add_middleware(Edge, send_request_id=settings.send_request_id)
    app.add_middleware(Observed, metrics=metrics)
    for routes in (
        routes_inference,
        routes_responses,
        routes_embeddings,
        routes_tokenizer,
        routes_models,
        routes_openapi,
        routes_adapters,
        routes_audit,
        routes_batches,
        routes_files,
        routes_fine_tuning,
        routes_health,
        routes_metrics,
        routes_usage,
        routes_webhooks,
    ):
        app.include_router(routes.router)
    return app


def _webhooks(store: Store, settings: GatewaySettings, metrics: GatewayMetrics) -> WebhookRunner:
    assert settings.webhook_key_file is not None, "webhooks have keys"
    sender = WebhookSender(WebhookSecrets(settings.webhook_key_file), Addresses(settings.webhook_networks))
    return WebhookRunner(store, sender, metrics.registry)


def _sweep(files: Files) -> None:
    """Remove files of uploads whose process was killed."""
    try:
        if removed := files.sweep():
            log.info("removed %d incomplete uploads", removed)
    except PedroError as error:
        log.warning("could not look for incomplete uploads: %s", error.message)
