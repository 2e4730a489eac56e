"""`pedro db`: the schema of the platform's records, what is imported from MLflow, and what MLflow is told."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import Database

app = typer.Typer(
    help="The platform's database: check and upgrade its schema, import MLflow's registry.",
    no_args_is_help=True,
)


@app.command()
def upgrade(
    driver_role: Annotated[
        str | None,
        typer.Option(
            "--driver-role", help="A PostgreSQL role to grant what drivers of fine-tunes need, and nothing else."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upgrade the schema to this release, then, once, import adapters and aliases from MLflow's registry.

    An sqlite database in the home needs no such command: it is upgraded when it is first opened. Again does no harm,
    and of two at once one waits for the other. Back up a server's database first.
    """
    from pedro.registry import Registry
    from pedro.store import Store, driver_rights, migrate, schema

    settings = _settings()
    database = _database(settings)
    before = migrate.upgrade(database)
    if driver_role:
        driver_rights.grant(database, driver_role)
    database.close()
    store = Store(settings.database_url)
    taken = None if store.imported() else Registry.open(settings).take_over()
    store.close()
    result = {"before": before, "schema": schema.REVISION, "taken_over": None if taken is None else asdict(taken)}

    def show() -> None:
        if before == schema.REVISION:
            typer.echo(f"the schema is {before}: nothing to do")
        else:
            typer.echo(f"the schema is {schema.REVISION} now (was {before or 'empty'})")
        if driver_role:
            typer.echo(f"{driver_role} may do what drivers of fine-tunes need")
        if taken is not None:
            typer.echo(_taken(taken.adapters, taken.versions))

    emit(result, as_json, show)


@app.command()
def current(as_json: AsJson = False) -> None:
    """Print the revision of the schema. Changes nothing."""
    from pedro.store import migrate

    database = _database(_settings())
    revision = migrate.current(database)
    state = migrate.state_of(revision)
    emit({"schema": revision, "state": state.value}, as_json, lambda: typer.echo(f"{revision or 'none'} ({state})"))


@app.command()
def check(as_json: AsJson = False) -> None:
    """Check whether this release can work with the database, and say what to do if not (exit 1). Changes nothing."""
    from pedro.store import Store, migrate

    settings = _settings()
    database = _database(settings)
    revision = migrate.current(database)
    state = migrate.state_of(revision)
    remedy = migrate.remedy(database, revision)
    result: dict[str, Any] = {"database": database.shown, "schema": revision, "state": state.value, "remedy": remedy}
    lines = [f"{database.shown}: schema {revision or 'none'} ({state})"]
    if state is migrate.SchemaState.CURRENT:
        store = Store(settings.database_url)
        imported, waiting = store.imported() is not None, store.unmirrored()
        store.close()
        result |= {"taken_over": imported, "unmirrored": waiting}
        if not imported:
            remedy = result["remedy"] = "run `pedro db upgrade`"
            lines.append("MLflow's registry was not taken over yet")
        if waiting:
            lines.append(f"MLflow has not heard of the last moves of {len(waiting)} adapters; `pedro db mirror`")
    database.close()
    if remedy:
        lines.append(f"→ {remedy}")
    emit({**result, "ok": not remedy}, as_json, lambda: typer.echo("\n".join(lines)))
    if remedy:
        raise typer.Exit(1)


@app.command("import")
def import_registry(
    unsealed: Annotated[
        bool, typer.Option("--unsealed", help="Also import versions without the platform's seal, trusting MLflow.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Import adapters, versions and aliases from MLflow's registry that the database does not have.

    Happens once by itself; again, for instance after MLflow was restored, it adds what is missing and moves no alias.
    Then versions are taken that this platform sealed when it registered them; earlier releases sealed none. Anybody who
    can write to MLflow could have entered others: look at them before you give --unsealed.
    """
    from pedro.registry import Registry

    taken = Registry.open(_settings()).take_over(unsealed=unsealed)

    def show() -> None:
        typer.echo(_taken(taken.adapters, taken.versions))
        if taken.refused:
            typer.echo(f"left out, without a seal of this platform: {', '.join(taken.refused)}")

    emit(asdict(taken), as_json, show)


@app.command()
def mirror(as_json: AsJson = False) -> None:
    """Bring the aliases that MLflow shows up to date; a running server does so by itself."""
    from pedro.registry import Registry

    waiting = Registry.open(_settings()).mirror()
    if waiting:
        log(f"MLflow does not answer; {len(waiting)} adapters wait")
    emit({"unmirrored": waiting}, as_json, lambda: typer.echo("MLflow has heard of all moves" if not waiting else ""))
    if waiting:
        raise typer.Exit(1)


def _taken(adapters: int, versions: int) -> str:
    return f"taken over from MLflow's registry: {adapters:,} adapters, {versions:,} versions"


def _settings() -> Settings:
    from pedro.config import Settings

    return Settings.from_env()


def _database(settings: Settings) -> Database:
    from pedro.store import Database

    return Database(settings.database_url)
