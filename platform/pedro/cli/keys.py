"""`pedro keys`: API keys of tenants."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from pedro.cli.output import AsJson, emit, table
from pedro.cli.tenants import RequestsPerMinute, TokensPerMinute, describe_quota, quota_columns

app = typer.Typer(help="API keys: a key belongs to one tenant; its secret is shown once.", no_args_is_help=True)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant that the key speaks for.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="infer, train, or admin: an operator of all tenants; repeat for several.")
    ] = None,
    name: Annotated[str, typer.Option(help="A note to tell keys apart.")] = "",
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print its secret, once.

    Example: `pedro keys create acme --scope infer --name website`
    """
    from pedro.config import Settings
    from pedro.store import Quota, Store

    store = Store(Settings.from_env().database_url)
    quota = Quota(requests_per_minute or None, tokens_per_minute or None)
    record, secret = store.create_key(tenant, scope or ["infer"], name, quota)

    def show() -> None:
        typer.echo(secret)
        typer.echo(f"key {record.id} of tenant {record.tenant}: keep the secret, it is not shown again", err=True)

    emit({**asdict(record), "secret": secret}, as_json, show)


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None, as_json: AsJson = False
) -> None:
    """List keys (never their secrets)."""
    from pedro.config import Settings
    from pedro.store import Store

    records = Store(Settings.from_env().database_url).list_keys(tenant)

    def show() -> None:
        table(
            ["id", "tenant", "name", "scopes", "ends in", "created", "requests/min", "tokens/min", "state"],
            [
                [
                    record.id,
                    record.tenant,
                    record.name,
                    " ".join(record.scopes),
                    record.hint,
                    time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created)),
                    *quota_columns(record.quota),
                    "revoked" if record.revoked else "active",
                ]
                for record in records
            ],
            empty="no keys yet; `pedro keys create TENANT` makes one",
        )

    emit([asdict(record) for record in records], as_json, show)


@app.command()
def quota(
    key: Annotated[str, typer.Argument(help="The key's id, from `pedro keys list`.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    as_json: AsJson = False,
) -> None:
    """Set a key's own quota, or show it; its tenant's holds as well. What is not given stays.

    Example: `pedro keys quota key_… --requests-per-minute 60`
    """
    from pedro.config import Settings
    from pedro.store import Store

    now = Store(Settings.from_env().database_url).set_quota(
        key_id=key, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
    )
    emit({"key": key, **asdict(now)}, as_json, lambda: typer.echo(f"{key}: {describe_quota(now)}"))


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, from `pedro keys list`.")], as_json: AsJson = False
) -> None:
    """Revoke a key; the next request with it is refused."""
    from pedro.config import Settings
    from pedro.store import Store

    record = Store(Settings.from_env().database_url).revoke_key(key)
    emit(asdict(record), as_json, lambda: typer.echo(f"revoked {record.id} of tenant {record.tenant}"))
