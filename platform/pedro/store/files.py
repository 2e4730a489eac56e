"""Tenants' uploaded files: what is known of each. Their bytes lie in the storage (`pedro.files`)."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pedro.errors import NotFoundError, PedroError
from pedro.refs import FILE_ID
from pedro.store import schema
from pedro.store.changes import audited
from pedro.store.erasing import refuse_erased
from pedro.store.records import By, FileRecord

if TYPE_CHECKING:
    from pedro.store.database import Database


class FileTable:
    """Reads and writes the rows of files. One that has expired is as if it were gone, but for who cleans up."""

    _database: Database

    def add_file(
        self,
        record: FileRecord,
        *,
        tenant_bytes: int | None = None,
        tenant_files: int | None = None,
        actor: By = None,
    ) -> None:
        """Enter a file whose bytes are stored. Raises PedroError if its tenant would then hold more than `tenant_bytes`
        in more than `tenant_files`: of uploads that end together no more get in than fit."""
        with self._database.writing() as connection:
            if not self._database.is_sqlite:  # where a writer is alone anyway
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"files:{record.tenant}"))))
            refuse_erased(connection, record.tenant)
            if tenant_bytes is not None or tenant_files is not None:
                check_file_room(_held(connection, record.tenant), record.bytes, tenant_bytes, tenant_files)
            connection.execute(sa.insert(schema.files).values(record.__dict__))
            audited(connection, actor, "file.create", record.tenant, record.id, after=_shown(record))

    def get_file(self, file_id: str, tenant: str | None = None) -> FileRecord:
        """Raises NotFoundError, the same for an unknown file, for one of another tenant than the one named, and for
        one that has expired."""
        row = None
        if FILE_ID.fullmatch(file_id):
            with self._database.reading() as connection:
                row = connection.execute(sa.select(schema.files).where(_of(file_id, tenant), _live())).one_or_none()
        if row is None:
            raise file_not_found(file_id)
        return _file_record(row)

    def list_files(
        self,
        tenant: str | None = None,
        *,
        purpose: str | None = None,
        filename: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """Files, newest first; `limit` of them behind the file `after`. Raises NotFoundError for an `after` that is
        none of these."""
        table = schema.files
        place = sa.tuple_(table.c.created, table.c.id)
        query = sa.select(table).where(_live()).limit(limit)
        query = query.order_by(*(column if oldest_first else column.desc() for column in (table.c.created, table.c.id)))
        if tenant is not None:
            query = query.where(table.c.tenant == tenant)
        if purpose is not None:
            query = query.where(table.c.purpose == purpose)
        if filename is not None:
            query = query.where(table.c.filename == filename)
        if after is not None:
            last = self.get_file(after, tenant)
            here = sa.tuple_(sa.literal(last.created), sa.literal(last.id))
            query = query.where(place > here if oldest_first else place < here)
        with self._database.reading() as connection:
            return [_file_record(row) for row in connection.execute(query)]

    def delete_file(self, file_id: str, tenant: str | None = None, *, actor: By = None) -> bool:
        """Forget a file, expired or not; whether there was one. Its bytes are to be removed first: see
        `pedro.files.Files.delete`."""
        with self._database.writing() as connection:
            row = connection.execute(sa.select(schema.files).where(_of(file_id, tenant))).one_or_none()
            if row is None:
                return False
            connection.execute(sa.delete(schema.files).where(schema.files.c.id == row.id))
            audited(connection, actor, "file.delete", row.tenant, row.id, before=_shown(_file_record(row)))
        return True

    def held_files(self, tenant: str) -> tuple[int, int]:
        """How many files a tenant has, and of how many bytes together."""
        with self._database.reading() as connection:
            return _held(connection, tenant)


def file_not_found(file_id: str) -> NotFoundError:
    """The one 404 for a file's id, the same for an unknown, a foreign and an expired one."""
    return NotFoundError(f"No such File object: {file_id[:64]}", param="id")


def check_file_room(held: tuple[int, int], more: int, tenant_bytes: int | None, tenant_files: int | None) -> None:
    """Raise PedroError where a tenant that holds so many files and bytes may not have a file of `more` bytes."""
    count, size = held
    if tenant_files is not None and count >= tenant_files:
        reason = f"you have {count:,} files, which is the most"
    elif tenant_bytes is not None and size + more > tenant_bytes:
        reason = f"your files hold {size:,} of at most {tenant_bytes:,} bytes, which leaves no room for {more:,} more"
    else:
        return
    raise PedroError(f"file: {reason}; delete some that you do not need", param="file", code="file_quota_exceeded")


def _held(connection: sa.Connection, tenant: str) -> tuple[int, int]:
    total = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(schema.files.c.bytes), 0))
    count, size = connection.execute(total.where(schema.files.c.tenant == tenant, _live())).one()
    return int(count), int(size)


def _of(file_id: str, tenant: str | None) -> sa.ColumnElement[bool]:
    named = schema.files.c.id == file_id
    return named if tenant is None else sa.and_(named, schema.files.c.tenant == tenant)


def _live() -> sa.ColumnElement[bool]:
    return sa.or_(schema.files.c.expires.is_(None), schema.files.c.expires > time.time())


def _shown(record: FileRecord) -> dict[str, Any]:
    return {"filename": record.filename, "purpose": record.purpose, "bytes": record.bytes, "digest": record.digest}


def _file_record(row: sa.Row[Any]) -> FileRecord:
    return FileRecord(**{field.name: getattr(row, field.name) for field in fields(FileRecord)})
