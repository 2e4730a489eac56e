"""Uploaded files used as a request's input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.errors import NotFoundError, PedroError

if TYPE_CHECKING:
    from pedro.store import Store


def check_input_file(store: Store, tenant: str, field: str, file_id: str, purpose: str) -> None:
    """Raise PedroError naming the field if a file is not the tenant's, or was uploaded for another purpose.

    Files belong to their tenant: a key that is restricted to some adapters may still name any of them by id.
    """
    try:
        record = store.get_file(file_id, tenant)
    except NotFoundError:
        message = f'{field}: no file {file_id[:64]!r}; upload it with purpose "{purpose}"'
        raise PedroError(message, param=field, code="file_not_found") from None
    if record.purpose != purpose:
        message = f'{field}: {record.id} was uploaded for "{record.purpose}"; upload it with purpose "{purpose}"'
        raise PedroError(message, param=field, code="invalid_file_purpose")
