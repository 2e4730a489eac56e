"""Enters adapters into a registry by the thousand, each a tenant's own, as if this host had fetched them before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.random_adapters import adapter_directories
from pedro.registry import Version, utc
from pedro.store import Inherited

if TYPE_CHECKING:
    from jobs.benchmarks.model_sizes import ModelSize
    from pedro.backbone import Backbone
    from pedro.refs import ModelRef
    from pedro.registry import Registry

ADAPTER = "own"


def tenant_name(number: int) -> str:
    """Of the tenant of that number."""
    return f"tenant{number:05}"


def enter(
    registry: Registry, size: ModelSize, backbone: Backbone, tenants: int, asked: Sequence[int]
) -> dict[int, ModelRef]:
    """The adapters of all the tenants; those that are `asked` have their files, too, and are returned by number."""
    made = zip(asked, adapter_directories(size, "pedro", len(asked)), strict=True)
    versions = {number: _cached(registry, source, backbone, number) for number, source in made}
    refs = {number: version.model_ref for number, version in versions.items()}
    rest = (number for number in range(tenants) if number not in versions)
    versions |= {number: _version(backbone, number, f"sha256:{number}", "") for number in rest}
    registry.store.take_over(Inherited(one.name, 0.0, {"champion": 1}, (one,)) for one in versions.values())
    return refs


def _version(backbone: Backbone, number: int, digest: str, manifest_digest: str) -> Version:
    return Version(
        tenant_name(number),
        ADAPTER,
        1,
        digest,
        backbone.id,
        backbone.digest,
        "pedro",
        1,
        {},
        {},
        "",
        f"made{number}",
        utc(0),
        manifest_digest=manifest_digest,
    )


def _cached(registry: Registry, source: Path, backbone: Backbone, number: int) -> Version:
    """A tenant's adapter where this host keeps the copies that it fetched of the registry's."""
    from pedro.adapter_directory import MANIFEST, manifest_digest, read_manifest, write_manifest
    from pedro.data.prompt_format import FORMATS

    digest = str(json.loads((source / MANIFEST).read_text())["digest"])
    target = registry.cached(digest, f"made{number}")
    shutil.copytree(source, target)
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["backbone"] = {
        "id": backbone.id,
        "digest": backbone.digest,
        "tokenizer_digest": backbone.tokenizer_digest,
    }
    write_manifest(target, manifest | {"prompt_format": FORMATS["raw"].to_dict(), "metrics": {}})
    written = read_manifest(target)
    return _version(backbone, number, str(written["digest"]), manifest_digest(written))
