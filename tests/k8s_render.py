"""The rendered Kubernetes manifests, and the pods in them. Judging them is left to the tests."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kustomize import rendered

from pedro.config import Settings

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ("dev", "gpu")
FILES = ("PEDRO_DATABASE_PASSWORD_FILE",)


@dataclass(frozen=True)
class Pod:
    """A pod template and where it stands; `labels` are as the operator completes them."""

    where: str
    labels: dict[str, str]
    spec: dict[str, Any]
    ends: bool
    """It runs to completion (a submitter), so it has nothing to probe."""

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@functools.cache
def _render(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(yaml.safe_dump_all(rendered(ROOT / "k8s" / "overlays" / overlay))))


def render(overlay: str) -> list[dict[str, Any]]:
    """Every object of an overlay; a copy, which a test may change."""
    return copy.deepcopy(_render(overlay))


@functools.cache
def _monitored(overlay: str) -> list[dict[str, Any]]:
    folder = ROOT / "k8s"
    told = {
        "resources": [str(folder / "overlays" / overlay)],
        "components": [str(folder / "components" / "monitoring")],
    }
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "kustomization.yaml").write_text(json.dumps(told), "utf-8")
        return list(yaml.safe_load_all(yaml.safe_dump_all(rendered(Path(made)))))


def monitored(overlay: str) -> list[dict[str, Any]]:
    """The same with the component that watches it."""
    return copy.deepcopy(_monitored(overlay))


def one(objects: list[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The only object of a kind (whose name starts so)."""
    found = [obj for obj in objects if obj["kind"] == kind and obj["metadata"]["name"].startswith(name)]
    assert len(found) == 1, f"{kind} {name}: {len(found)} found"
    return found[0]


def pods(objects: list[dict[str, Any]]) -> Iterator[Pod]:
    """Every pod template, those inside ray.io objects too."""
    for obj in objects:
        where, spec = f"{obj['kind']}/{obj['metadata']['name']}", obj.get("spec", {})
        if obj["kind"] in ("Deployment", "StatefulSet"):
            yield _pod(where, spec["template"])
        if obj["kind"] == "Job":
            yield _pod(where, spec["template"], ends=True)
        cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec")
        if cluster:
            yield _pod(f"{where}/head", cluster["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
            for group in cluster["workerGroupSpecs"]:
                added = {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}
                yield _pod(f"{where}/{group['groupName']}", group["template"], added)
        if "submitterPodTemplate" in spec:
            yield _pod(f"{where}/submitter", spec["submitterPodTemplate"], ends=True)


def _pod(where: str, template: dict[str, Any], added: dict[str, str] | None = None, ends: bool = False) -> Pod:
    return Pod(where, {**template["metadata"]["labels"], **(added or {})}, template["spec"], ends)


def settings_of(container: dict[str, Any], objects: list[dict[str, Any]]) -> Settings:
    """What a container reads there, whose passwords in files are `<secret>`."""
    files = {f"{name.removesuffix('_FILE')}": "<secret>" for name in environment(container, objects) if name in FILES}
    return Settings.from_env({**files, **environment(container, objects)})


def environment(container: dict[str, Any], objects: list[dict[str, Any]]) -> dict[str, str]:
    """A container's variables, references to secrets as `<secret>`."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    for entry in container.get("env", []):
        found[entry["name"]] = entry.get("value", "<secret>")
    return found


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """A Kubernetes label selector against labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", f"operator {rule['operator']} is not used here"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True
