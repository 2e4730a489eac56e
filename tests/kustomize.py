"""Renders a kustomization without kubectl: as much of kustomize as k8s/ uses, and an error for what is beyond that.

A test compares it with kubectl's own rendering if kubectl is installed. It works for any manifests.
Reference: https://kubectl.docs.kubernetes.io/references/kustomize/kustomization/
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KEYS = {
    "apiVersion",
    "kind",
    "namespace",
    "labels",
    "images",
    "resources",
    "components",
    "patches",
    "configMapGenerator",
    "configurations",
}
CLUSTER_WIDE = ("Namespace", "ClusterRole", "ClusterRoleBinding")


def rendered(folder: Path) -> list[Object]:
    """Every object of the kustomization in `folder`."""
    return _named_by_content(_accumulated(folder, []))


def _accumulated(folder: Path, objects: list[Object]) -> list[Object]:
    """`objects`, to which a component adds, and what `folder` has; names of generated maps lack their hashes yet."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text("utf-8"))
    assert not (unknown := told.keys() - KEYS), f"{folder}: {sorted(unknown)} is not rendered here"
    for place in told.get("resources", []):
        path = folder / place
        objects += _accumulated(path, []) if path.is_dir() else list(yaml.safe_load_all(path.read_text("utf-8")))
    objects += [_config_map(folder, generator) for generator in told.get("configMapGenerator", [])]
    for place in told.get("components", []):
        objects = _accumulated(folder / place, objects)
    for patch in told.get("patches", []):
        operations = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text("utf-8"))
        chosen = [obj for obj in objects if _is_target(obj, patch["target"])]
        assert chosen, f"{folder}: a patch has no target: {patch['target']}"
        for obj in chosen:
            for operation in operations:
                _apply(obj, operation)
    for obj in objects:
        _transform(obj, told)
    return objects


def _transform(obj: Object, told: dict[str, Any]) -> None:
    """The namespace, labels and images of a kustomization."""
    metadata = obj["metadata"]
    if "namespace" in told and obj["kind"] not in CLUSTER_WIDE:
        metadata["namespace"] = told["namespace"]
    for labels in told.get("labels", []):
        assert labels.keys() == {"pairs"}, "labels of selectors and templates are not rendered here"
        metadata["labels"] = {**metadata.get("labels", {}), **labels["pairs"]}
    for image in told.get("images", []):
        assert image.keys() <= {"name", "newName", "newTag"}, f"{image} is not rendered here"
        for holder in _holders(obj, "image"):
            if holder["image"].partition(":")[0] == image["name"]:
                holder["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"


def _config_map(folder: Path, generator: dict[str, Any]) -> Object:
    assert generator.keys() <= {"name", "literals", "files", "options"}, f"{generator} is not rendered here"
    data = dict(literal.split("=", 1) for literal in generator.get("literals", []))
    data |= {Path(place).name: (folder / place).read_text("utf-8") for place in generator.get("files", [])}
    metadata: dict[str, Any] = {"name": generator["name"], "labels": generator.get("options", {}).get("labels", {})}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data, "generated": True}


def _named_by_content(objects: list[Object]) -> list[Object]:
    """Generated maps get a hash of what they hold to their names, wherever a pod refers to them."""
    objects = copy.deepcopy(objects)  # one part of a file may stand in several places
    names = {}
    for obj in objects:
        if obj.pop("generated", False):
            digest = hashlib.sha256(json.dumps(obj["data"], sort_keys=True).encode()).hexdigest()[:10]
            plain = obj["metadata"]["name"]
            names[plain] = obj["metadata"]["name"] = f"{plain}-{digest}"
    for obj in objects:
        for key in ("configMapRef", "configMapKeyRef", "configMap"):
            for holder in _holders(obj, key):
                if holder[key].get("name") in names:
                    holder[key] = {**holder[key], "name": names[holder[key]["name"]]}
    return objects


def _is_target(obj: Object, target: dict[str, str]) -> bool:
    assert target.keys() <= {"kind", "name"}, f"{target} is not rendered here"
    name = obj["metadata"]["name"]
    return bool(obj["kind"] == target["kind"] and target.get("name", name) == name)


def _apply(obj: Object, operation: dict[str, Any]) -> None:
    """One operation of JSON Patch (RFC 6902)."""
    *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
    at: Any = obj
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    kind, value = operation["op"], copy.deepcopy(operation.get("value"))
    assert kind in ("add", "replace"), f"{kind} is not rendered here"
    if isinstance(at, list):
        if kind == "replace":
            at[int(last)] = value
        else:
            at.insert(len(at) if last == "-" else int(last), value)
        return
    assert kind == "add" or last in at, f"{operation['path']} of {obj['metadata']['name']} is not there to be replaced"
    at[last] = value


def _holders(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """Every mapping below `value` that has `key`."""
    if isinstance(value, dict):
        if key in value:
            yield value
        for inner in value.values():
            yield from _holders(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _holders(inner, key)
