"""A tenant's files as wholes: what is uploaded is there with row and bytes, or not at all.

Bytes come first and go first: a row never names what is not stored yet, and whoever was told that a file is deleted
can rely on it.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from pedro.config import UPLOADS, check_name
from pedro.data.files import HEAD_BYTES, ending
from pedro.errors import PedroError
from pedro.files.contents import Contents
from pedro.files.names import MADE, check_content, check_filename, check_purpose, default_expiry
from pedro.store import FileRecord, check_file_room

if TYPE_CHECKING:
    from pedro.files.contents import Scratch
    from pedro.store import Store
    from pedro.store.records import By

SCRATCH_KEPT_S = 24 * 3600.0  # far longer than any upload takes
log = logging.getLogger("pedro.files")


class FileTooLargeError(PedroError):
    """The file is over the limit."""

    code = "file_too_large"
    status = 413


@dataclass(frozen=True)
class FileLimits:
    """None is no limit."""

    file_bytes: int | None = None
    tenant_bytes: int | None = None  # of all files of a tenant
    tenant_files: int | None = None  # their number


class Upload:
    """A file on its way in: what came of it is stored, measured and digested."""

    def __init__(self, tenant: str, scratch: Scratch, limit: int | None) -> None:
        self.tenant = tenant
        self.size = 0
        self.head = b""
        self.scratch = scratch
        self._digest = hashlib.sha256()
        self._limit = limit

    @property
    def digest(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"

    def write(self, data: bytes) -> None:
        """Take the next piece. Raises FileTooLargeError as soon as it is too large, UnavailableError."""
        self.size += len(data)
        if self._limit is not None and self.size > self._limit:
            raise file_too_large(self._limit)
        if len(self.head) < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - len(self.head)]
        self._digest.update(data)
        self.scratch.write(data)

    def abandon(self) -> None:
        """Remove what came, unless it became a file."""
        self.scratch.abandon()


class Files:
    """All tenants' files in one storage. Safe from many threads and processes at once."""

    def __init__(self, store: Store, storage: str, limits: FileLimits | None = None) -> None:
        self._store = store
        self.contents = Contents(storage)
        self.limits = limits or FileLimits()

    def check_room(self, tenant: str, more: int) -> None:
        """Raise what an upload of so many bytes would meet, before any of them comes."""
        if self.limits.file_bytes is not None and more > self.limits.file_bytes:
            raise file_too_large(self.limits.file_bytes)
        check_file_room(self._store.held_files(tenant), more, self.limits.tenant_bytes, self.limits.tenant_files)

    def begin(self, tenant: str, *, limited: bool = True) -> Upload:
        """Either `finish`, `keep` or `Upload.abandon` must follow. Raises UnavailableError."""
        check_name("tenant", tenant)
        return Upload(tenant, self.contents.begin(), self.limits.file_bytes if limited else None)

    def finish(
        self,
        upload: Upload,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        *,
        key_id: str | None = None,
        actor: By = None,
    ) -> FileRecord:
        """Make a file of an upload. Raises PedroError for a name, purpose or content that is not taken and for a tenant
        that has no room; then nothing is left of it once it is abandoned."""
        check_filename(filename)
        check_content(upload.head, purpose if purpose in MADE else check_purpose(purpose))
        record = self.keep(upload, filename, purpose, expires_after_s, key_id=key_id)
        try:
            self._store.add_file(
                record,
                tenant_bytes=self.limits.tenant_bytes,
                tenant_files=self.limits.tenant_files,
                actor=actor,
            )
        except BaseException:
            self.contents.remove(record.location)
            raise
        return record

    def keep(
        self,
        upload: Upload,
        filename: str,
        purpose: str,
        expires_after_s: int | None = None,
        *,
        key_id: str | None = None,
    ) -> FileRecord:
        """Store the bytes of an upload. Whoever enters the row removes them where that fails. Raises
        UnavailableError."""
        file_id, created = f"file-{uuid.uuid4().hex[:24]}", time.time()
        after = expires_after_s if expires_after_s is not None else default_expiry(purpose)
        record = FileRecord(
            id=file_id,
            tenant=upload.tenant,
            filename=filename,
            purpose=purpose,
            bytes=upload.size,
            digest=upload.digest,
            location=f"{UPLOADS}/{upload.tenant}/{file_id}{''.join(ending(filename))}",
            created=created,
            expires=None if after is None else float(int(created) + after),
            key_id=key_id,
        )
        self.contents.keep(upload.scratch, record.location)
        return record

    def get(self, file_id: str, tenant: str | None) -> FileRecord:
        """Raises NotFoundError; of all tenants if none is named."""
        return self._store.get_file(file_id, tenant)

    def list_files(
        self,
        tenant: str | None,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int | None = None,
        oldest_first: bool = False,
    ) -> list[FileRecord]:
        """Files, newest first; `limit` of them behind the file `after`. Raises NotFoundError for an `after` that is
        none of these."""
        return self._store.list_files(tenant, purpose=purpose, after=after, limit=limit, oldest_first=oldest_first)

    def open(self, record: FileRecord) -> BinaryIO:
        """The bytes. Raises UnavailableError."""
        return self.contents.open(record.location)

    def delete(self, record: FileRecord, *, actor: By = None) -> None:
        """Remove bytes and row. A job that was submitted with it has its own copy. Raises UnavailableError."""
        self.contents.remove(record.location)
        self._store.delete_file(record.id, record.tenant, actor=actor)

    def sweep(self, older_than_s: float = SCRATCH_KEPT_S) -> int:
        """Remove what uploads that were killed left behind; how many."""
        return self.contents.sweep(older_than_s)


def file_too_large(limit: int) -> FileTooLargeError:
    return FileTooLargeError(f"file: larger than {limit:,} bytes, the most that a file may have", param="file")
