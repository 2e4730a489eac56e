"""What a version of an adapter is, and how it is written to and read from the tags of MLflow's model versions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pedro.refs import ModelRef
from pedro.registry.tags import PREFIX, ours, stored

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

TENANT, GATE, PROMOTED = f"{PREFIX}tenant", f"{PREFIX}gate", f"{PREFIX}promoted"


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter; `aliases` is as of the reading."""

    tenant: str
    adapter: str
    version: int
    digest: str
    backbone_id: str
    backbone_digest: str
    method: str
    trainable_parameters: int
    metrics: dict[str, Any]
    spec: dict[str, Any]
    gate: str
    run_id: str
    created: str
    aliases: tuple[str, ...] = ()
    promoted: str = ""  # when it last became champion
    manifest_digest: str = ""  # of all that pedro_adapter.json says; versions of earlier releases have none

    @property
    def name(self) -> str:
        """`tenant.adapter`, as the registry and the API call it."""
        return ModelRef(self.tenant, self.adapter).name

    @property
    def ref(self) -> str:
        """`tenant.adapter:7`, which always means these weights."""
        return str(self.model_ref.without_digest)

    @cached_property  # asked for by every request
    def model_ref(self) -> ModelRef:
        """This version and its weights: it can never mean others."""
        return ModelRef(self.tenant, self.adapter, version=self.version, digest=self.digest)


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


def read_version(entity: ModelVersion, aliases: Mapping[str, int] | None = None) -> Version:
    """What MLflow says of a model version; `aliases` are its adapter's, if the entity does not know its own."""
    name = ModelRef.parse(entity.name)
    tags = ours(entity.tags)
    number = int(entity.version)
    if aliases is None:
        held: Iterable[str] = entity.aliases or ()
    else:
        held = (alias for alias, version in aliases.items() if version == number)
    return Version(
        tenant=name.tenant,
        adapter=name.adapter,
        version=number,
        digest=tags.get("digest", ""),
        backbone_id=tags.get("backbone", ""),
        backbone_digest=tags.get("backbone_digest", ""),
        method=tags.get("method", ""),
        trainable_parameters=int(tags.get("trainable_parameters") or 0),
        metrics=json.loads(tags.get("metrics") or "{}"),
        spec=json.loads(tags.get("spec") or "{}"),
        gate=tags.get("gate", ""),
        run_id=entity.run_id,  # type: ignore[arg-type]  # every version is registered of a run
        created=utc(entity.creation_timestamp / 1000),
        aliases=tuple(sorted(held)),
        promoted=tags.get("promoted", ""),
        manifest_digest=tags.get("manifest_digest", ""),
    )


def utc(seconds: float) -> str:
    """Unix seconds as people and tags write them."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
