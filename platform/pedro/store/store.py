"""The store: the platform's own records in sqlite or PostgreSQL, one method a short transaction.

Rows never leave this package: callers get frozen records. Safe from many threads and processes at once. Times are
Unix seconds.
"""

from __future__ import annotations

from typing import Any

from pedro.store.adapters import AdapterTable
from pedro.store.audit import AuditTable
from pedro.store.batches import BatchTable
from pedro.store.buckets import BucketTable
from pedro.store.canaries import CanaryTable
from pedro.store.changes import ChangeTable
from pedro.store.database import Database
from pedro.store.erasure import ErasureTable
from pedro.store.files import FileTable
from pedro.store.job_events import JobEventTable
from pedro.store.job_queue import JobQueue
from pedro.store.jobs import JobTable
from pedro.store.keys import KeyTable
from pedro.store.migrate import ready
from pedro.store.quotas import QuotaTable
from pedro.store.retention import RetentionTable
from pedro.store.shadows import ShadowTable
from pedro.store.usage import UsageTable
from pedro.store.webhook_deliveries import WebhookDeliveryTable
from pedro.store.webhooks import WebhookTable


class Store(
    KeyTable,
    QuotaTable,
    JobTable,
    JobQueue,
    JobEventTable,
    FileTable,
    BatchTable,
    WebhookTable,
    WebhookDeliveryTable,
    AdapterTable,
    CanaryTable,
    ShadowTable,
    AuditTable,
    BucketTable,
    ChangeTable,
    UsageTable,
    RetentionTable,
    ErasureTable,
):
    """The records behind one database URL. Picklable: a copy in another process opens its own connections."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError for a URL that cannot be used or a schema of a newer release, UnavailableError when the
        database does not answer or its schema is that of an older one (an sqlite file is brought up to date)."""
        self.url = url
        self._database = Database(url)
        ready(self._database)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.url,)

    @property
    def is_file(self) -> bool:
        """Whether it is an sqlite file, which belongs to one machine."""
        return self._database.is_sqlite

    def close(self) -> None:
        if self._notifications is not None:
            self._notifications.close()
        self._database.close()
