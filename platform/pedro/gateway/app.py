"""Puts the gateway together: edge, errors, routes. The wiring only; each part is in a file of its own."""

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
from pedro.gateway.edge import Edge
from pedro.gateway.errors import install_error_handlers
from pedro.gateway.observability import GatewayMetrics, Observed
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
    max_body_bytes: int = 8 * 2**20  # more is a 413
    body_timeout_s: float = 60.0  # a body that takes longer to arrive is a 408
    max_open_requests: int = 4096  # a tenant may hold half of them, less while others hold some
    max_choices: int = 256  # prompts × n of one request
    gateways: int = 1  # gateway processes that share the quotas
    name: str = ""  # of this one among them
    follow_keys_every_s: float = 0.5  # a revoked key, or a changed quota, is heard of within that time
    backbones: Mapping[str, str] = field(default_factory=dict)  # that can be fine-tuned: by name, as a spec has them
    dry_run_command: tuple[str, ...] = ()  # what reads a job's spec and says what it would take; none: no dry runs
    dry_run_env: Mapping[str, str] = field(default_factory=dict)
    storage: str | None = None  # a folder or fsspec URL for uploaded files; none: there are no files
    max_file_bytes: int = 512 * 2**20  # of one uploaded file; more is a 413
    max_tenant_file_bytes: int = 10 * 2**30  # of all files of a tenant
    max_tenant_files: int = 10_000  # their number
    max_open_uploads: int = 4  # of a tenant
    max_open_jobs: int = 100  # fine-tuning jobs of a tenant, those that have not ended
    max_open_batches: int = 100  # of a tenant, those that have not ended
    rows_of_batch: int = 8  # of one batch asked at once, while no other request is open
    batch_rows: int = 32  # of all batches
    batch_lease_s: float = 15.0  # a killed gateway's batches are gone on with after it
    webhook_key_file: Path | None = None  # of the keys that signing secrets are made by; none: there are no webhooks
    webhook_networks: tuple[str, ...] = ()  # beside the public ones, that webhooks may go to, also without TLS
    upload_timeout_s: float = 3600.0  # for the whole of a file to arrive
    write_usage_every_s: float = FLUSH_EVERY_S  # what a gateway that is killed has not written is lost
    observe_every_s: float = EVERY_S  # its own figures and the engines' are read and kept for /metrics/history
    send_request_id: bool = True  # false behind a server that adds x-request-id itself, as Ray Serve's proxy does


def create_app(
    backend_provider: Callable[[], Backend], store: Store, settings: GatewaySettings | None = None
) -> FastAPI:
    """The gateway as an ASGI application.

    `backend_provider` is asked at each request, on the event loop, so it must not block; it may raise a PedroError
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
    """Remove what uploads left behind whose process was killed."""
    try:
        if removed := files.sweep():
            log.info("%d uploads that were cut off are removed", removed)
    except PedroError as error:
        log.warning("uploads that were cut off could not be looked for: %s", error.message)
