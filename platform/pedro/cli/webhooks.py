"""`pedro webhooks`: where tenants' events are sent, for operators; tenants use `/v1/webhook_endpoints`."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, confirm, emit, table
from pedro.cli.times import shown

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.gateway.webhook_sending import WebhookSender
    from pedro.store import Store, WebhookEndpoint

app = typer.Typer(help="Webhook endpoints, which receive events of jobs, batches and aliases.", no_args_is_help=True)
EndpointId = Annotated[str, typer.Argument(help="The endpoint's id, from `pedro webhooks list`.")]


@app.command("list")
def list_webhooks(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List endpoints, newest first, with their last failure; never their secrets."""
    found = _store(_settings()).list_webhooks(tenant)
    emit([_described(endpoint) for endpoint in found], as_json, lambda: _show(found))


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="The tenant whose events are sent there.")],
    url: Annotated[str, typer.Argument(help="https://…, on the public network.")],
    event: Annotated[list[str] | None, typer.Option(help="An event type; repeatable [all].")] = None,
    name: Annotated[str, typer.Option(help="A note to tell endpoints apart.")] = "added by an operator",
    as_json: AsJson = False,
) -> None:
    """Add an endpoint and print its signing secret, once.

    Example: `pedro webhooks add acme https://example.com/hooks --event batch.completed`
    """
    from pedro.config import check_name
    from pedro.gateway.webhook_addresses import read_url
    from pedro.gateway.webhook_fields import check_event_types, check_webhook_name
    from pedro.store import EVENT_TYPES

    check_name("tenant", tenant)
    check_webhook_name(name)
    event_types, where = check_event_types(event or list(EVENT_TYPES)), read_url(url)
    settings = _settings()
    sender = _sender(settings)
    asyncio.run(sender.addresses.of(tenant, where))
    endpoint, secret = sender.secrets.new_endpoint(tenant, name, str(where), event_types, time.time())
    _store(settings).create_webhook(endpoint)

    def print_secret() -> None:
        typer.echo(secret)
        typer.echo(f"{endpoint.id} of tenant {tenant}: keep the secret, it is not shown again", err=True)

    emit({**_described(endpoint), "signing_secret": secret}, as_json, print_secret)


@app.command()
def remove(
    endpoint: EndpointId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove an endpoint and the events waiting for it."""
    store = _store(_settings())
    found = store.get_webhook(endpoint, None)
    confirm(f"Remove {found.name} of tenant {found.tenant}?", yes, as_json)
    store.delete_webhook(found.id, found.tenant)
    emit({"id": found.id, "deleted": True}, as_json, lambda: typer.echo(f"removed {found.id}"))


@app.command("test")
def send_test(endpoint: EndpointId, as_json: AsJson = False) -> None:
    """Send a `ping` to an endpoint from this host and print the response."""
    from pedro.gateway.webhook_sending import sample
    from pedro.store import PING

    settings = _settings()
    found = _store(settings).get_webhook(endpoint, None)
    status = asyncio.run(_sender(settings).send(found, *sample(PING, time.time())))
    emit({"id": found.id, "status_code": status}, as_json, lambda: typer.echo(f"{found.id} answered {status}"))


def _show(found: list[WebhookEndpoint]) -> None:
    rows = [
        [
            one.id,
            one.tenant,
            one.name,
            one.url,
            "all" if len(one.event_types) == _all() else " ".join(one.event_types),
            shown(one.created),
            shown(one.last_delivered),
            one.last_error or "-",
        ]
        for one in found
    ]
    heads = ["id", "tenant", "name", "url", "events", "created", "last delivered", "last error"]
    table(heads, rows, empty="no webhook endpoints yet; `pedro webhooks add TENANT URL` adds one", whole=1)


def _all() -> int:
    from pedro.store import EVENT_TYPES

    return len(EVENT_TYPES)


def _described(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {key: value for key, value in asdict(endpoint).items() if key != "secrets"}


def _settings() -> Settings:
    from pedro.config import Settings

    return Settings.from_env()


def _store(settings: Settings) -> Store:
    from pedro.store import Store

    return Store(settings.database_url)


def _sender(settings: Settings) -> WebhookSender:
    from pedro.gateway.webhook_addresses import Addresses
    from pedro.gateway.webhook_sending import WebhookSender
    from pedro.gateway.webhook_signing import WebhookSecrets

    return WebhookSender(WebhookSecrets(settings.webhook_key_file), Addresses(settings.webhook_networks))
