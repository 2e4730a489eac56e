"""`pedro keys`: API keys of tenants."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from pedro.cli.output import AsJson, emit, table

app = typer.Typer(help="API keys: a key belongs to one tenant; its secret is shown once.", no_args_is_help=True)


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="The tenant that the key speaks for.")],
    scope: Annotated[list[str] | None, typer.Option(help="infer, train or admin; repeat for several.")] = None,
    name: Annotated[str, typer.Option(help="A note to tell keys apart.")] = "",
    as_json: AsJson = False,
) -> None:
    """Create a key and print its secret, once.

    Example: `pedro keys create acme --scope infer --name website`
    """
    from pedro.config import Settings
    from pedro.store import Store

    record, secret = Store(Settings.from_env().database_url).create_key(tenant, scope or ["infer"], name)

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
            ["id", "tenant", "name", "scopes", "ends in", "created", "state"],
            [
                [
                    record.id,
                    record.tenant,
                    record.name,
                    " ".join(record.scopes),
                    record.hint,
                    time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created)),
                    "revoked" if record.revoked else "active",
                ]
                for record in records
            ],
            empty="no keys yet; `pedro keys create TENANT` makes one",
        )

    emit([asdict(record) for record in records], as_json, show)


@app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, from `pedro keys list`.")], as_json: AsJson = False
) -> None:
    """Revoke a key; the next request with it is refused."""
    from pedro.config import Settings
    from pedro.store import Store

    record = Store(Settings.from_env().database_url).revoke_key(key)
    emit(asdict(record), as_json, lambda: typer.echo(f"revoked {record.id} of tenant {record.tenant}"))
