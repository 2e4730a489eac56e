"""`pedro audit`: who changed what, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, printable, table
from pedro.cli.times import ago, shown

if TYPE_CHECKING:
    from pedro.store import AuditEntry, AuditQuery, Store

FOLLOW_EVERY_S = 1.0
TOGETHER = 500
MOMENTS = ("expires", "revoked")  # of a key, in Unix seconds


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only what concerns this tenant.")] = None,
    action: Annotated[
        str | None, typer.Option(help="Only this action: key.create, or key for everything about keys.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="Only changes by this actor: user:ada, or a key's id.")] = None,
    since: Annotated[str | None, typer.Option(help="Only changes since then: 24h ago, or a date (UTC).")] = None,
    limit: Annotated[int, typer.Option(help="How many of the latest entries to show.", min=1)] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Then keep printing new entries.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show who changed keys, quotas, adapters and the database; the latest entry comes last.

    Example: `pedro audit --tenant acme --action key --since 7d`
    """
    from pedro.config import Settings
    from pedro.store import AuditQuery, Store

    store = Store(Settings.from_env().database_url)
    query = AuditQuery(
        tenants=(tenant,) if tenant else (),
        actions=(action,) if action else (),
        actors=(actor,) if actor else (),
        since=None if since is None else ago(since, "since"),
    )
    entries = store.find_audit(query, limit)[::-1]
    if not follow:
        emit([asdict(entry) for entry in entries], as_json, lambda: _show(entries))
        return
    for entry in entries:
        _print(entry, as_json)
    for entry in _coming(store, query, entries[-1].id if entries else 0):
        _print(entry, as_json)


def _coming(store: Store, query: AuditQuery, last: int) -> Iterator[AuditEntry]:
    """Entries after `last`, for ever."""
    while True:
        for entry in store.find_audit(replace(query, above=last), TOGETHER):
            last = entry.id
            yield entry
        time.sleep(FOLLOW_EVERY_S)


def _show(entries: list[AuditEntry]) -> None:
    table(
        ["when (UTC)", "by", "tenant", "action", "what", "change", "request"],
        [
            [_when(one), one.actor, one.tenant, one.action, one.subject, _change(one), one.request_id or "-"]
            for one in entries
        ],
        empty="nothing was changed yet",
        whole=1,
    )


def _print(entry: AuditEntry, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(entry)))
        return
    words = [_when(entry), entry.actor, entry.tenant, entry.action, entry.subject, _change(entry)]
    typer.echo(printable("  ".join([*words, entry.request_id or ""]).replace("\n", " ").rstrip()))


def _when(entry: AuditEntry) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.at))


def _change(entry: AuditEntry) -> str:
    """What is other than before: `aliases.champion: 6 → 7`."""
    before, after = _flat(entry.before), _flat(entry.after)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if not before:
        return ", ".join(f"{name}: {_value(name, after[name])}" for name in names)
    return ", ".join(f"{name}: {_value(name, before.get(name))} → {_value(name, after.get(name))}" for name in names)


def _flat(state: dict[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in (state or {}).items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _value(name: str, value: Any) -> str:
    if name in MOMENTS and isinstance(value, int | float):
        return shown(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)
