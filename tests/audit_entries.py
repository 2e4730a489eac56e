"""The last entries of the audit, newest first, as `pedro audit` finds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.store import AuditQuery, Store

if TYPE_CHECKING:
    from pedro.store.audit import AuditEntry


def last_audit(store: Store, *tenants: str, limit: int = 100) -> list[AuditEntry]:
    """Of these tenants; of all, if none is named."""
    return store.find_audit(AuditQuery(tenants), limit)
