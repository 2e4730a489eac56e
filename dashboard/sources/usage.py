"""What was used, from the ledger: requests, tokens and training by tenant, model, key and day (UTC), and as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pedro.csv_cells import csv_table
from pedro.store import Store, Usage, usage_row
from sources.stores import ask_store
from sources.view import tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings

PERIODS: dict[str, int | None] = {"Today": 1, "7 days": 7, "30 days": 30, "90 days": 90, "All": None}
MOST_ROWS = 100_000  # as `/v1/usage` gives in one file


def first_day(period: str, today: datetime | None = None) -> str | None:
    """The day (UTC) on which a period began; None: the ledger's first."""
    days = PERIODS[period]
    return None if days is None else ((today or datetime.now(UTC)) - timedelta(days=days - 1)).date().isoformat()


def read_usage(
    settings: Settings, by: Sequence[str], since: str | None, tenant: str | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Sums by what `by` names (of `USAGE_GROUPS`), of one tenant or of all that are shown; and what went wrong."""
    own = tenant_seen(settings)
    if own is not None and tenant not in (None, own):
        return [], ""

    def read(store: Store) -> list[dict[str, Any]]:
        return [usage_row(used, by) for used in store.usage(own or tenant, since=since, by=by, limit=MOST_ROWS)]

    return ask_store(settings, read, [])


def key_names(settings: Settings) -> dict[str, str]:
    """What the keys that are shown are called, by id."""
    keys, _ = ask_store(settings, lambda store: store.list_keys(tenant_seen(settings)), [])
    return {key.id: key.name for key in keys}


def tenants_with_usage(settings: Settings) -> list[str]:
    """Those that are shown and have used anything."""
    return [row["tenant"] for row in read_usage(settings, ["tenant"], None)[0]]


def as_csv(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """As `pedro usage --csv` and `/v1/usage?format=csv` write it."""
    return csv_table(usage_row(Usage(), by), rows)
