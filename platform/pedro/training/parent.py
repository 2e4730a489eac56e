"""Training that starts from an adapter version, the job's parent, instead of a fresh adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError
from pedro.training.quantised_check import why_whole
from pedro.training.sharing import why_alone

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import Store
    from pedro.training.spec import FineTuneSpec


def pin_parent(spec: FineTuneSpec, store: Store) -> FineTuneSpec:
    """The spec with its parent resolved to one version, whose method it takes if it names none.

    Raises NotFoundError if the parent is not the tenant's, ConfigError if it has another method.
    """
    if spec.parent is None:
        return spec
    version = store.get_own_version(spec.parent, spec.tenant, "parent")
    trained = (version.spec or {}).get("method")
    if trained is None:
        message = f"parent: {version.ref} was not trained here, so its method is unknown; start from a fresh adapter"
        raise ConfigError(message, param="parent")
    changes: dict[str, Any] = {"parent": version.ref}
    if "method" not in spec.model_fields_set:
        changes["method"] = type(spec.method).model_validate(trained)
    elif spec.method.model_dump() != trained:
        message = f"method: {version.ref} was trained with {trained}; leave `method` out, or start from a fresh adapter"
        raise ConfigError(message, param="method")
    pinned = spec.model_copy(update=changes)
    if why := why_whole(pinned):
        raise ConfigError(f"training.backbone_dtype: {why}", param="training.backbone_dtype")
    if pinned.resources.share and (why := why_alone(pinned)):
        raise ConfigError(f"resources.share: {why}", param="resources.share")
    return pinned


def with_pinned_parent(spec: FineTuneSpec, settings: Settings) -> FineTuneSpec:
    """`pin_parent` with the store of these settings, which is only opened if the spec has a parent."""
    if spec.parent is None:
        return spec
    from pedro.store import Store

    store = Store(settings.database_url)
    try:
        return pin_parent(spec, store)
    finally:
        store.close()
