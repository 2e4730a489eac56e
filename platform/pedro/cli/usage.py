"""`pedro usage`: what tenants used, from the ledger."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pedro.cli.output import AsJson, emit, log, table


def usage(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    since: Annotated[str | None, typer.Option("--from", metavar="DAY", help="First day (UTC): 2026-03-01.")] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="DAY", help="Last day, included.")] = None,
    by: Annotated[
        str, typer.Option(help="Sum by these, comma-separated: tenant, model, key, day; empty for the total only.")
    ] = "tenant,model",
    csv: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write CSV to a file, or to standard output with -.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what tenants used: requests, prompt and answer tokens, tokens and seconds of training, by day (UTC).

    The counts are the engine's own, include answers that a client abandoned, and appear within about a second.

    Example: `pedro usage --tenant acme --from 2026-03-01 --to 2026-03-31 --by day,model --csv march.csv`
    """
    from pedro.config import Settings
    from pedro.csv_cells import csv_table
    from pedro.errors import ConfigError
    from pedro.store import Store, Usage, check_period, check_usage_groups, usage_row

    if csv and as_json:
        raise ConfigError("--csv: not together with --json; give one of them", param="--csv")
    groups = [name.strip() for name in by.split(",") if name.strip()]
    check_usage_groups("--by", groups)
    first, last = check_period(since, until, ("--from", "--to"))
    store = Store(Settings.from_env().database_url)
    rows = [usage_row(used, groups) for used in store.usage(tenant, since=first, until=last, by=groups)]
    total = next(iter(store.usage(tenant, since=first, until=last, by=())), Usage())
    columns = list(usage_row(total, groups))
    if csv:
        text = csv_table(columns, rows)
        if csv == "-":
            sys.stdout.write(text)
        else:
            Path(csv).write_text(text, encoding="utf-8")
            log(f"{len(rows):,} rows are in {csv}")
        return

    def show() -> None:
        last_row = ["total", *[""] * (len(groups) - 1)] if groups else []
        shown = [list(row.values()) for row in rows] + ([[*last_row, *usage_row(total, ()).values()]] if groups else [])
        table(
            [name.replace("_", " ") for name in columns],
            [[_cell(value) for value in row] for row in shown] if rows else [],
            empty="nothing was used in that time",
        )

    emit({"usage": rows, "total": usage_row(total, ())}, as_json, show)


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return value if isinstance(value, str) else f"{value:,}"
