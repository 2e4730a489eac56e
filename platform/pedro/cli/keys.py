"""`pedro keys`: API keys of tenants."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, table
from pedro.cli.tenants import (
    RequestsPerDay,
    RequestsPerMinute,
    RequestsPerMonth,
    TokensPerDay,
    TokensPerMinute,
    TokensPerMonth,
    describe_quota,
)
from pedro.cli.times import duration, from_now, shown

if TYPE_CHECKING:
    from pedro.store import KeyRecord, Store

app = typer.Typer(help="API keys: a key belongs to one tenant; its secret is shown once.", no_args_is_help=True)
HEADS = [
    "id",
    "tenant",
    "name",
    "scopes",
    "adapters",
    "ends in",
    "created",
    "expires",
    "last used",
    "replaces",
    "state",
]
KeyId = Annotated[str, typer.Argument(help="The key's id, from `pedro keys list`.")]


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant that the key belongs to.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="infer, train, read (models, versions, usage, audit), or admin: an operator of all tenants; repeat "
            "for several."
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="A note to tell keys apart.")] = "",
    expires: Annotated[str | None, typer.Option(help="When it expires: 90d from now, or a date (UTC).")] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Restrict it to these adapters, comma-separated; the backbone is refused too.")
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print its secret, once.

    Example: `pedro keys create acme --name website --expires 90d --adapters support,voice`
    """
    from pedro.store import Quota

    record, secret = _store().create_key(
        tenant,
        scope or ["infer"],
        name,
        Quota(requests_per_minute or None, tokens_per_minute or None),
        expires=None if expires is None else from_now(expires, "expires"),
        adapters=None if adapters is None else [word.strip() for word in adapters.split(",") if word.strip()],
    )
    _show_secret(record, secret, f"key {record.id} of tenant {record.tenant}", as_json)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List keys (never their secrets)."""
    records, now = _store().list_keys(tenant), time.time()

    def show() -> None:
        table(
            HEADS,
            [
                [
                    record.id,
                    record.tenant,
                    record.name,
                    " ".join(record.scopes),
                    "all" if record.adapters is None else " ".join(record.adapters),
                    record.hint,
                    shown(record.created),
                    shown(record.expires),
                    shown(record.last_used),
                    "-" if record.replaces is None else f"…{record.replaces[-6:]}",
                    record.state(now),
                ]
                for record in records
            ],
            empty="no keys yet; `pedro keys create TENANT` makes one",
            whole=1,
        )

    emit([_described(record, now) for record in records], as_json, show)


@app.command()
def show(key: KeyId, as_json: AsJson = False) -> None:
    """Show everything about one key except its secret."""
    record, now = _store().get_key(key), time.time()
    facts = (
        ("id", record.id),
        ("tenant", record.tenant),
        ("name", record.name),
        ("scopes", " ".join(record.scopes)),
        ("adapters", "all of its tenant" if record.adapters is None else " ".join(record.adapters)),
        ("secret", f"sk-pedro-…{record.hint}"),
        ("quota", describe_quota(record.quota)),
        ("created", shown(record.created)),
        ("expires", shown(record.expires, "never")),
        ("revoked", shown(record.revoked)),
        ("last used", shown(record.last_used, "never")),
        ("replaces", record.replaces or "-"),
        ("state", record.state(now)),
    )
    emit(_described(record, now), as_json, lambda: table(["", "(times are UTC)"], facts, whole=1))


@app.command()
def rotate(
    key: KeyId,
    overlap: Annotated[
        str, typer.Option(help="How long the old key keeps working: 24h, 7d; 0s revokes it at once.")
    ] = "24h",
    as_json: AsJson = False,
) -> None:
    """Make a new key with the same rights and print its secret, once; the old key expires after the overlap.

    A key that expires gets a successor that lives as long as it did. Example: `pedro keys rotate key_… --overlap 24h`
    """
    store = _store()
    record, secret = store.rotate_key(key, duration(overlap, "overlap"))
    ends = shown(store.get_key(key).expires)
    _show_secret(record, secret, f"key {record.id} replaces {key}, which ends at {ends} UTC", as_json)


@app.command()
def quota(
    key: KeyId,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_month: RequestsPerMonth = None,
    tokens_per_month: TokensPerMonth = None,
    as_json: AsJson = False,
) -> None:
    """Set or show a key's own quota; its tenant's applies as well. Limits that are not given stay.

    Example: `pedro keys quota key_… --requests-per-minute 60`
    """
    now = _store().set_quota(
        key_id=key,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_day=tokens_per_day,
        requests_per_month=requests_per_month,
        tokens_per_month=tokens_per_month,
    )
    emit({"key": key, **asdict(now)}, as_json, lambda: typer.echo(f"{key}: {describe_quota(now)}"))


@app.command()
def revoke(key: KeyId, as_json: AsJson = False) -> None:
    """Revoke a key; the next request with it is refused."""
    record = _store().revoke_key(key)
    described = _described(record, time.time())
    emit(described, as_json, lambda: typer.echo(f"revoked {record.id} of tenant {record.tenant}"))


def _show_secret(record: KeyRecord, secret: str, what: str, as_json: bool) -> None:
    """The secret alone on standard output, so that it can be substituted."""

    def print_secret() -> None:
        typer.echo(secret)
        typer.echo(f"{what}: keep the secret, it is not shown again", err=True)

    emit({**_described(record, time.time()), "secret": secret}, as_json, print_secret)


def _described(record: KeyRecord, now: float) -> dict[str, Any]:
    return {**asdict(record), "state": record.state(now)}


def _store() -> Store:
    from pedro.config import Settings
    from pedro.store import Store

    return Store(Settings.from_env().database_url)
