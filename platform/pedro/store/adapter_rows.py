"""Rows of adapters and versions, and the records that are made of them."""

from __future__ import annotations

import calendar
import time
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from pedro.errors import NotFoundError
from pedro.refs import ModelRef
from pedro.store import schema
from pedro.store.records import Canary, RegisteredAdapter, Shadow, Standing, Version, utc

AS_THEY_ARE = (
    "tenant",
    "adapter",
    "version",
    "digest",
    "manifest_digest",
    "backbone_id",
    "backbone_digest",
    "method",
    "trainable_parameters",
    "metrics",
    "spec",
    "gate",
    "run_id",
)
LONG: dict[str, Any] = {"metrics": {}, "spec": {}, "gate": ""}
BIGGEST = 2**31 - 1  # number of a version


def parsed(name: str) -> ModelRef:
    """The adapter of a plain name. Raises NotFoundError for what is no such name."""
    ref = ModelRef.parse(name)
    if ref.name != name:
        raise NotFoundError(f"{name!r} is not an adapter name; expected tenant.adapter", param="model")
    return ref


def same(table: sa.Table, ref: ModelRef) -> sa.ColumnElement[bool]:
    """The rows of one adapter."""
    return sa.and_(table.c.tenant == ref.tenant, table.c.adapter == ref.adapter)


def adapter_row(connection: sa.Connection, ref: ModelRef, *, deleted: bool = False) -> sa.Row[Any] | None:
    """An adapter's row; of one that is deleted only if that is wanted."""
    query = sa.select(schema.adapters).where(same(schema.adapters, ref))
    if not deleted:
        query = query.where(schema.adapters.c.deleted.is_(None))
    return connection.execute(query).one_or_none()


def version_row(connection: sa.Connection, ref: ModelRef, version: int) -> sa.Row[Any] | None:
    """The row of a version that is not deleted."""
    if version > BIGGEST:
        return None
    table = schema.versions
    query = sa.select(table).where(same(table, ref), table.c.version == version, table.c.deleted.is_(None))
    return connection.execute(query).one_or_none()


def in_any(table: sa.Table, refs: Collection[ModelRef]) -> sa.ColumnElement[bool]:
    """The rows of several adapters."""
    return sa.tuple_(table.c.tenant, table.c.adapter).in_([(ref.tenant, ref.adapter) for ref in refs])


def to_adapter(row: sa.Row[Any]) -> RegisteredAdapter:
    canary = None if row.canary is None else Canary(row.canary["version"], row.canary["weight"])
    name = ModelRef(row.tenant, row.adapter).name
    shadow = None if row.shadow is None else Shadow(row.shadow["version"], row.shadow["weight"])
    standing = Standing(dict(row.aliases), canary, shadow)
    return RegisteredAdapter(name, row.generation, row.made, row.created, standing)


def to_version(row: sa.Row[Any], standing: Standing) -> Version:
    """The version of a row, which may lack what serving does not need (`LONG`)."""
    return Version(
        **{name: row._mapping.get(name, LONG.get(name)) for name in AS_THEY_ARE},
        created=utc(row.created),
        promoted="" if row.promoted is None else utc(row.promoted),
        aliases=standing.names_of(row.version),
    )


def standing_values(standing: Standing) -> dict[str, Any]:
    """The columns of an adapter's row."""
    told = standing.to_dict()
    return {"aliases": standing.aliases, "canary": told.get("canary"), "shadow": told.get("shadow")}


def version_values(version: Version) -> dict[str, Any]:
    """The columns of a version's row, without its generation."""
    values = {name: getattr(version, name) for name in AS_THEY_ARE}
    return {**values, "created": _seconds(version.created), "promoted": _seconds(version.promoted)}


def _seconds(moment: str) -> float | None:
    return float(calendar.timegm(time.strptime(moment, "%Y-%m-%dT%H:%M:%SZ"))) if moment else None
