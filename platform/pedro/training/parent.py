"""Training that starts from an adapter's version, the job's parent, instead of from a fresh adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training.spec import FineTuneSpec


def pin_parent(spec: FineTuneSpec, store: Store) -> FineTuneSpec:
    """The spec with its parent as one version, whose method it takes where it names none.

    Raises NotFoundError for a parent that is not the tenant's, ConfigError for one of another method.
    """
    if spec.parent is None:
        return spec
    version = store.get_own_version(spec.parent, spec.tenant, "parent")
    trained = (version.spec or {}).get("method")
    if trained is None:
        message = f"parent: {version.ref} was not trained here, so how is not known; start from a fresh adapter"
        raise ConfigError(message, param="parent")
    changes: dict[str, Any] = {"parent": version.ref}
    if "method" not in spec.model_fields_set:
        changes["method"] = type(spec.method).model_validate(trained)
    elif spec.method.model_dump() != trained:
        message = f"method: {version.ref} was trained with {trained}; leave `method` out, or start from a fresh adapter"
        raise ConfigError(message, param="method")
    return spec.model_copy(update=changes)


def with_pinned_parent(spec: FineTuneSpec, settings: Settings) -> FineTuneSpec:
    """`pin_parent` with the store of these settings, which is opened where the spec has a parent alone."""
    if spec.parent is None:
        return spec
    from pedro.store import Store

    store = Store(settings.database_url)
    try:
        return pin_parent(spec, store)
    finally:
        store.close()
