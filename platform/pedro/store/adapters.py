"""Adapters and their versions as they are read, entered, taken over from a registry and mirrored to it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import ConflictError, NotFoundError, model_not_found
from pedro.refs import ModelRef
from pedro.store import schema
from pedro.store.adapter_rows import (
    LONG,
    adapter_row,
    in_any,
    parsed,
    same,
    standing_values,
    to_adapter,
    to_version,
    version_row,
    version_values,
)
from pedro.store.changes import ADAPTER, announce, audited_all, next_generation
from pedro.store.erasing import refuse_erased
from pedro.store.records import CHAMPION, Inherited, KnownAdapter, RegisteredAdapter, Standing, Unmirrored, Version

if TYPE_CHECKING:
    from pedro.store.database import Database

BATCH = 400  # names in one question, or transaction
IMPORTED = "imported"  # a counter: when (Unix seconds) the registry of before was taken over


class AdapterTable:
    """Reads adapters and versions, enters new ones, and keeps what the registry must still be told."""

    _database: Database

    # reading

    def list_adapters(self, tenant: str | None = None) -> dict[str, RegisteredAdapter]:
        """Every adapter by name, of one tenant or of all."""
        table = schema.adapters
        query = sa.select(table).where(table.c.deleted.is_(None)).order_by(table.c.tenant, table.c.adapter)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        with self._database.reading() as connection:
            found = [to_adapter(row) for row in connection.execute(query)]
        return {adapter.name: adapter for adapter in found}

    def count_adapters(self) -> int:
        """How many adapters there are, of all tenants."""
        table = schema.adapters
        query = sa.select(sa.func.count()).select_from(table).where(table.c.deleted.is_(None))
        with self._database.reading() as connection:
            return int(connection.execute(query).scalar_one())

    def adapters_of_backbone(self, digest: str) -> list[str]:
        """Names of the adapters with a version that was trained on the backbone of this digest."""
        table, of = schema.versions, schema.adapters
        alive = sa.and_(of.c.tenant == table.c.tenant, of.c.adapter == table.c.adapter, of.c.deleted.is_(None))
        query = (
            sa.select(table.c.tenant, table.c.adapter)
            .join(of, alive)
            .where(table.c.backbone_digest == digest, table.c.deleted.is_(None))
            .distinct()
            .order_by(table.c.tenant, table.c.adapter)
        )
        with self._database.reading() as connection:
            return [ModelRef(row.tenant, row.adapter).name for row in connection.execute(query)]

    def get_adapter(self, name: str) -> RegisteredAdapter | None:
        """One adapter; None if there is none of that name."""
        with self._database.reading() as connection:
            row = adapter_row(connection, parsed(name))
        return None if row is None else to_adapter(row)

    def get_version(self, name: str, which: str | int = CHAMPION) -> Version:
        """A version by number or alias; NotFoundError (the uniform 404) if there is none."""
        ref = parsed(name)
        is_number = isinstance(which, int) or (which.isascii() and which.isdecimal())
        with self._database.reading() as connection:
            adapter = adapter_row(connection, ref)
            if adapter is not None:
                number = int(which) if is_number else adapter.aliases.get(which, 0)
                row = version_row(connection, ref, number)
                if row is not None:
                    return to_version(row, to_adapter(adapter).standing)
        asked = ref.at(int(which)) if is_number else replace(ref, alias=None if which == CHAMPION else str(which))
        raise model_not_found(str(asked))

    def get_own_version(self, model: str, tenant: str, param: str) -> Version:
        """The version that a tenant's own adapter, `tenant.adapter`, `…@alias` or `…:3`, means.

        Raises NotFoundError, the same for one of another tenant as for one that is not there.
        """
        try:
            ref = ModelRef.parse(model)
            if ref.tenant == tenant:
                return self.get_version(ref.name, CHAMPION if ref.which is None else ref.which)
        except NotFoundError:
            pass
        raise NotFoundError(f"{param}: the tenant has no adapter {model[:80]!r}", param=param, code="model_not_found")

    def list_versions(self, name: str) -> list[Version]:
        """All versions of an adapter, oldest first; empty if there is no such adapter."""
        ref, table = parsed(name), schema.versions
        with self._database.reading() as connection:
            adapter = adapter_row(connection, ref)
            query = sa.select(table).where(same(table, ref), table.c.deleted.is_(None)).order_by(table.c.version)
            rows = connection.execute(query).all()
        return [] if adapter is None else [to_version(row, to_adapter(adapter).standing) for row in rows]

    def list_all_versions(self, tenant: str | None = None) -> dict[str, list[Version]]:
        """The versions of every adapter, of one tenant or of all, in two questions; oldest first."""
        table = schema.versions
        query = sa.select(table).where(table.c.deleted.is_(None)).order_by(table.c.version)
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        adapters = self.list_adapters(tenant)
        found: dict[str, list[Version]] = {name: [] for name in adapters}
        with self._database.reading() as connection:
            for row in connection.execute(query):
                name = ModelRef(row.tenant, row.adapter).name
                if name in adapters:
                    found[name].append(to_version(row, adapters[name].standing))
        return found

    def look_up(self, names: Collection[str]) -> dict[str, KnownAdapter]:
        """What serving needs of adapters, in two questions for each `BATCH` of names; those not there are left out."""
        refs = [parsed(name) for name in names]
        found: dict[str, KnownAdapter] = {}
        for start in range(0, len(refs), BATCH):
            found |= self._look_up(refs[start : start + BATCH])
        return found

    def _look_up(self, refs: Collection[ModelRef]) -> dict[str, KnownAdapter]:
        adapters, versions = schema.adapters, schema.versions
        with self._database.reading() as connection:
            alive = sa.select(adapters).where(in_any(adapters, refs), adapters.c.deleted.is_(None))
            found = [to_adapter(row) for row in connection.execute(alive)]
            wanted = [
                (ref.tenant, ref.adapter, number)
                for one in found
                for ref in (parsed(one.name),)
                for number in one.standing.versions
            ]
            key = sa.tuple_(versions.c.tenant, versions.c.adapter, versions.c.version)
            query = sa.select(*(column for column in versions.c if column.name not in LONG)).where(key.in_(wanted))
            rows = connection.execute(query).all()
        known = {one.name: KnownAdapter(one, {}) for one in found}
        for row in rows:
            adapter = known[ModelRef(row.tenant, row.adapter).name]
            adapter.versions[row.version] = to_version(row, adapter.adapter.standing)
        return known

    def newest_versions(self, since: float, limit: int, *, promoted: bool = False) -> list[Version]:
        """The versions that were registered, or became champion, since a time, the last first; without aliases."""
        table = schema.versions
        moment = table.c.promoted if promoted else table.c.created
        query = sa.select(table).where(table.c.deleted.is_(None), moment >= since).order_by(moment.desc()).limit(limit)
        with self._database.reading() as connection:
            return [to_version(row, Standing()) for row in connection.execute(query)]

    # entering

    def add_version(self, version: Version, made: int | None) -> None:
        """Enter a version, of an adapter that is there or not; no alias moves.

        `made` is the adapter's, as `made_of` told it before the registry was asked for the version. Raises
        ConflictError if the adapter was deleted, or made again, since.
        """
        ref = version.model_ref
        with self._database.writing() as connection:
            generation = next_generation(connection)
            refuse_erased(connection, ref.tenant)
            row = adapter_row(connection, ref, deleted=True)
            there = version_row(connection, ref, version.version)
            if there is not None and (there.run_id, there.digest) == (version.run_id, version.digest):
                return  # an import of the registry came between
            if there is not None:
                raise ConflictError(
                    f"{version.ref} is other weights already: MLflow is older than the database; try again"
                )
            if (None if row is None else row.made) != made or (row is not None and row.deleted is not None):
                raise ConflictError(f"{version.name} was deleted while {version.ref} was registered; try again")
            if row is None:
                row_of_new = _row(ref, generation, Standing(), time.time())
                connection.execute(sa.insert(schema.adapters).values(row_of_new))
            else:
                current = row.mirrored == row.generation  # a version is no news to the registry
                values = {"generation": generation, **({"mirrored": generation} if current else {})}
                connection.execute(sa.update(schema.adapters).where(same(schema.adapters, ref)).values(values))
            connection.execute(sa.insert(schema.versions).values(**version_values(version), generation=generation))
            announce(connection, generation, ADAPTER, version.name)

    def made_of(self, name: str) -> int | None:
        """Which adapter the name means now, for `add_version`; None if there is none, or only one that was deleted."""
        adapter = self.get_adapter(name)
        return None if adapter is None else adapter.made

    # taking over

    def imported(self) -> float | None:
        """When the registry of before was taken over; None if it was not."""
        table = schema.counters
        with self._database.reading() as connection:
            value = connection.execute(sa.select(table.c.value).where(table.c.name == IMPORTED)).scalar_one()
        return float(value) or None

    def mark_imported(self) -> None:
        """Nothing is left to be taken over."""
        table = schema.counters
        with self._database.writing() as connection:
            connection.execute(sa.update(table).where(table.c.name == IMPORTED).values(value=int(time.time())))

    def take_over(self, adapters: Iterable[Inherited]) -> tuple[int, int]:
        """Enter adapters of the registry that the store does not know, and versions that it does not: how many of
        each. Of an adapter that it knows, no alias moves: where they stand is the store's to say."""
        entered = versions = 0
        waiting = list(adapters)
        for start in range(0, len(waiting), BATCH):
            with self._database.writing() as connection:
                new, added = _inherit(connection, waiting[start : start + BATCH])
            entered, versions = entered + new, versions + added
        return entered, versions

    # mirroring

    def unmirrored(self, limit: int = 1000) -> list[str]:
        """Names of adapters of which the registry was not told the last move, those that wait longest first."""
        table = schema.adapters
        query = sa.select(table.c.tenant, table.c.adapter).where(table.c.mirrored != table.c.generation)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(table.c.generation).limit(limit)).all()
        return [ModelRef(row.tenant, row.adapter).name for row in rows]

    def to_mirror(self, name: str) -> Unmirrored | None:
        """What the registry has not heard of an adapter; None if it has heard all."""
        ref, table = parsed(name), schema.versions
        with self._database.reading() as connection:
            row = adapter_row(connection, ref, deleted=True)
            if row is None or row.mirrored == row.generation:
                return None
            query = sa.select(table).where(same(table, ref), table.c.generation > row.mirrored)
            rows = connection.execute(query.order_by(table.c.version)).all()
        adapter = to_adapter(row)
        changed = tuple(to_version(one, adapter.standing) for one in rows if one.deleted is None)
        gone = tuple(one.version for one in rows if one.deleted is not None)
        return Unmirrored(adapter, row.deleted is not None, changed, gone)

    def mirrored(self, adapter: RegisteredAdapter) -> None:
        """The registry was told how `adapter` stands; rows that were kept for that alone go."""
        ref, table = parsed(adapter.name), schema.adapters
        told = sa.and_(same(table, ref), table.c.generation == adapter.generation)
        with self._database.writing() as connection:
            gone = connection.execute(sa.delete(table).where(told, table.c.deleted.is_not(None))).rowcount
            if not gone:
                connection.execute(
                    sa.update(table)
                    .where(same(table, ref), table.c.made == adapter.made, table.c.mirrored < adapter.generation)
                    .values(mirrored=adapter.generation)
                )
            old = schema.versions
            connection.execute(
                sa.delete(old).where(same(old, ref), old.c.deleted.is_not(None), old.c.generation <= adapter.generation)
            )


def _inherit(connection: sa.Connection, inherited: list[Inherited]) -> tuple[int, int]:
    """Enter what is new of these adapters: how many adapters, how many versions."""
    generation, refs = next_generation(connection), [parsed(one.name) for one in inherited]
    table, keys = schema.versions, (schema.versions.c.tenant, schema.versions.c.adapter, schema.versions.c.version)
    rows = connection.execute(sa.select(schema.adapters).where(in_any(schema.adapters, refs)))
    there = {(row.tenant, row.adapter): row for row in rows}
    known = {tuple(row) for row in connection.execute(sa.select(*keys).where(in_any(table, refs)))}
    made, added, told, entered = [], [], [], []
    for one, ref in zip(inherited, refs, strict=True):
        row = there.get((ref.tenant, ref.adapter))
        if row is not None and row.deleted is not None:
            continue
        new = [version for version in one.versions if (ref.tenant, ref.adapter, version.version) not in known]
        if row is None:
            numbers = {version.version for version in new}
            standing = Standing({alias: number for alias, number in one.aliases.items() if number in numbers})
            made.append(_row(ref, generation, standing, one.created))
            entered.append((ref.tenant, one.name, standing.to_dict()))
        elif new:
            changed = sa.update(schema.adapters).where(same(schema.adapters, ref))
            connection.execute(changed.values(generation=generation))
        added += [{**version_values(version), "generation": generation} for version in new]
        if new or row is None:
            told.append(one.name)
    if made:
        connection.execute(sa.insert(schema.adapters), made)
        audited_all(connection, None, "adapter.import", entered)
    if added:
        connection.execute(sa.insert(table), added)
    announce(connection, generation, ADAPTER, *told)
    return len(made), len(added)


def _row(ref: ModelRef, generation: int, standing: Standing, created: float) -> dict[str, Any]:
    """The row of a new adapter, of which the registry need not be told."""
    return {
        "tenant": ref.tenant,
        "adapter": ref.adapter,
        "generation": generation,
        "made": generation,
        "created": created,
        "mirrored": generation,
        **standing_values(standing),
    }
