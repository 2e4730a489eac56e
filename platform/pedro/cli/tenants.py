"""`pedro tenants`: who has keys, their quotas a minute, a day and a month, and erasing one."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pedro.cli.output import AsJson, emit, log, table

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import Quota, Store

app = typer.Typer(help="Tenants and their quotas; a tenant exists once it has a key.", no_args_is_help=True)
RequestsPerMinute = Annotated[int | None, typer.Option(help="Most requests a minute; 0: no limit.", min=0)]
TokensPerMinute = Annotated[
    int | None, typer.Option(help="Most tokens of prompts and answers a minute; 0: no limit.", min=0)
]
RequestsPerDay = Annotated[int | None, typer.Option(help="Most requests a day (UTC); 0: no limit.", min=0)]
TokensPerDay = Annotated[int | None, typer.Option(help="Most tokens a day (UTC); 0: no limit.", min=0)]
RequestsPerMonth = Annotated[int | None, typer.Option(help="Most requests a month (UTC); 0: no limit.", min=0)]
TokensPerMonth = Annotated[int | None, typer.Option(help="Most tokens a month (UTC); 0: no limit.", min=0)]
TrainingPerDay = Annotated[
    int | None, typer.Option("--training-hours-per-day", help="Most hours of training a day (UTC).", min=0)
]
TrainingPerMonth = Annotated[
    int | None, typer.Option("--training-hours-per-month", help="Most hours of training a month (UTC).", min=0)
]
SHORT = {"minute": "min", "day": "day", "month": "month"}


@app.command("list")
def list_tenants(as_json: AsJson = False) -> None:
    """List tenants with their quotas."""
    quotas = _store().list_quotas()

    def show() -> None:
        table(
            ["tenant", *quota_heads()],
            [[tenant, *quota_columns(quota)] for tenant, quota in quotas.items()],
            empty="no tenants yet; `pedro keys create TENANT` makes one",
        )

    emit([{"tenant": tenant, **asdict(quota)} for tenant, quota in quotas.items()], as_json, show)


@app.command("set")
@app.command("quota", hidden=True)  # its name until now
def set_limits(
    tenant: Annotated[str, typer.Argument(help="The tenant, for all its keys together.")],
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    requests_per_day: RequestsPerDay = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_month: RequestsPerMonth = None,
    tokens_per_month: TokensPerMonth = None,
    training_hours_per_day: TrainingPerDay = None,
    training_hours_per_month: TrainingPerMonth = None,
    as_json: AsJson = False,
) -> None:
    """Set or show a tenant's quota, which a running server applies within a second. Limits that are not given stay.

    Hours of training are those of every worker, sweeps included; over them, queued jobs wait for the next one.

    Example: `pedro tenants set acme --requests-per-minute 600 --tokens-per-month 50000000`
    """
    store = _store()
    now = store.set_quota(
        tenant=tenant,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        requests_per_day=requests_per_day,
        tokens_per_day=tokens_per_day,
        requests_per_month=requests_per_month,
        tokens_per_month=tokens_per_month,
        training_hours_per_day=training_hours_per_day,
        training_hours_per_month=training_hours_per_month,
    )
    if not store.list_keys(tenant):
        log(f"note: tenant {tenant} has no key yet")
    emit({"tenant": tenant, **asdict(now)}, as_json, lambda: typer.echo(f"{tenant}: {describe_quota(now)}"))


@app.command()
def erase(
    tenant: Annotated[str, typer.Argument(help="The tenant to erase.", metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be erased; erase nothing.")] = False,
    keep_sums: Annotated[
        bool, typer.Option("--keep-sums", help="Keep its daily usage, under a number instead of its name.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Erase everything of a tenant: keys, quotas, jobs, data, adapters, runs, caches, logs, usage, history, audit.

    It is refused from the first moment; its running jobs are ended, its running requests end by themselves. Data that
    another tenant's job names too stays. The audit keeps that somebody was erased, with counts and no name; the name is
    free again. Broken off, the same command ends it. Backups, and what other hosts have cached, are not reached: see
    docs/operations.md.

    Examples: `pedro tenants erase acme --dry-run`; `pedro tenants erase acme --keep-sums`
    """
    from pedro.cli.gc import size
    from pedro.cli.jobs import end_driver
    from pedro.cli.output import confirm
    from pedro.cli.standing_jobs import ask_cluster
    from pedro.config import Settings
    from pedro.registry import Registry
    from pedro.retention.erasure import erase_tenant

    settings = Settings.from_env()
    if not dry_run:
        confirm(f"Erase everything of {tenant}? It cannot be had back.", yes, as_json)
    done = erase_tenant(
        tenant,
        settings,
        Registry.open(settings),
        lambda: ask_cluster(settings),
        lambda job: end_driver(settings, job),
        keep_sums=keep_sums,
        dry_run=dry_run,
        log=log,
    )

    def show() -> None:
        rows = [[kind, count, ""] for kind, count in done.rows.items()]
        rows += [[f"{kind} (files)", total.removed, size(total.bytes)] for kind, total in done.files.items()]
        table(["what", "would go" if dry_run else "erased", "size"], rows)
        if not dry_run:
            typer.echo(f"{tenant} is erased; the audit has it as {done.number}")
        if done.hidden_experiments:
            log(
                f"MLflow's server has hidden {done.at_server} runs and experiments, whose rows stay in its database. "
                "Remove them for good beside it, with its database in place of DATABASE:"
            )
            typer.echo(gc_command(settings, done.hidden_experiments))

    emit(asdict(done), as_json, show)


def gc_command(settings: Settings, experiments: list[str]) -> str:
    """What removes experiments, with their runs, that MLflow's server at the settings' address hides."""
    from pedro.config import without_password

    address = without_password(settings.tracking_uri).replace("://…@", "://")
    ids = ",".join(experiments)
    return f"mlflow gc --backend-store-uri DATABASE --tracking-uri {address} --experiment-ids {ids}"


def quota_heads() -> list[str]:
    """The limits as heads of a table's columns: `requests/min`, `training hours/month`."""
    from pedro.store import LIMITS

    return [f"{what.replace('_', ' ')}/{SHORT[span]}" for what, span in (limit.split("_per_") for limit in LIMITS)]


def quota_columns(quota: Quota) -> list[str]:
    """All limits for a table; a dash for none."""
    return ["-" if limit is None else f"{limit:,}" for limit in asdict(quota).values()]


def describe_quota(quota: Quota) -> str:
    """`600 requests/min, no limit of tokens`, and the budgets that there are: `5,000 tokens/day`."""
    parts = (("requests", quota.requests_per_minute), ("tokens", quota.tokens_per_minute))
    words = [f"no limit of {what}" if n is None else f"{n:,} {what}/min" for what, n in parts]
    budgets = list(zip(quota_heads(), asdict(quota).values(), strict=True))[len(parts) :]
    return ", ".join([*words, *(f"{limit:,} {head}" for head, limit in budgets if limit is not None)])


def _store() -> Store:
    from pedro.config import Settings
    from pedro.store import Store

    return Store(Settings.from_env().database_url)
