"""How a version of an adapter is written to and read from the tags of MLflow's model versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedro.refs import ModelRef
from pedro.registry.tags import PREFIX, ours, stored
from pedro.store import Version, utc

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

TENANT, GATE, PROMOTED = f"{PREFIX}tenant", f"{PREFIX}gate", f"{PREFIX}promoted"


def version_tags(manifest: Mapping[str, Any], gate: str) -> dict[str, str]:
    """The tags of a new version, from its adapter's manifest."""
    return stored(
        {
            "digest": manifest["digest"],
            "manifest_digest": str(manifest.get("manifest_digest") or ""),
            "backbone": manifest["backbone"]["id"],
            "backbone_digest": manifest["backbone"]["digest"],
            "method": manifest["method"]["name"],
            "trainable_parameters": str(manifest.get("trainable_parameters", 0)),
            "metrics": json.dumps(manifest.get("metrics") or {}),
            "spec": json.dumps(manifest.get("spec") or {}),
            "data_digest": str(manifest.get("data_digest") or ""),
            "gate": gate,
        }
    )


def read_version(entity: ModelVersion) -> Version:
    """What MLflow says of a model version, but for its aliases, which are the store's to say."""
    name, run_id = ModelRef.parse(entity.name), entity.run_id
    assert run_id is not None, f"{entity.name}: every version is registered of a run"
    return _version(entity, name, run_id, entity.tags)


def made_version(entity: ModelVersion, name: ModelRef, run_id: str, tags: Mapping[str, str]) -> Version:
    """A version that MLflow was just asked to make: what it was told. Its answer counts for the number and the time, so
    that who can write to MLflow cannot have the store take other weights for those that were registered."""
    return _version(entity, name, run_id, tags)


def _version(entity: ModelVersion, name: ModelRef, run_id: str, stored_tags: Mapping[str, str]) -> Version:
    tags = ours(stored_tags)
    return Version(
        tenant=name.tenant,
        adapter=name.adapter,
        version=int(entity.version),
        digest=tags.get("digest", ""),
        backbone_id=tags.get("backbone", ""),
        backbone_digest=tags.get("backbone_digest", ""),
        method=tags.get("method", ""),
        trainable_parameters=int(tags.get("trainable_parameters") or 0),
        metrics=json.loads(tags.get("metrics") or "{}"),
        spec=json.loads(tags.get("spec") or "{}"),
        gate=tags.get("gate", ""),
        run_id=run_id,
        created=utc(entity.creation_timestamp / 1000),
        promoted=tags.get("promoted", ""),
        manifest_digest=tags.get("manifest_digest", ""),
    )
