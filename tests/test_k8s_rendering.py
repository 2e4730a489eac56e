"""The renderer that the other tests of k8s/ use makes what kubectl makes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from k8s_render import OVERLAYS, ROOT, environment, monitored, one, pods, render
from kustomize import rendered

HASH = re.compile(r"^(pedro-[a-z]+)-[0-9a-z]{10}$")


def comparable(value):
    """Without the hashes in names, which each renderer makes in a way of its own, and without empty fields."""
    if isinstance(value, dict):
        return {key: comparable(inner) for key, inner in value.items() if inner not in ({}, None)}
    if isinstance(value, list):
        return [comparable(inner) for inner in value]
    return HASH.sub(r"\1", value) if isinstance(value, str) else value


def by_name(objects):
    return {(obj["kind"], comparable(obj["metadata"]["name"])): comparable(obj) for obj in objects}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl to compare with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_what_kubectl_makes_of_it(overlay):
    folder = str(ROOT / "k8s" / "overlays" / overlay)
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    theirs, ours = by_name(yaml.safe_load_all(done.stdout)), by_name(render(overlay))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == theirs[name], name


def test_a_setting_that_changes_rolls_out_every_pod_that_reads_it():
    before, after = (str(render("gpu")) for _ in range(2))
    assert before == after
    (name,) = set(re.findall(r"pedro-settings-[0-9a-f]{10}", before))
    assert "'pedro-settings'" not in before, f"a pod would look for a map that is called {name}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{resources: [], replicas: []}", "replicas"),
        ("{patches: [{target: {kind: Job}, patch: '[]'}]}", "no target"),
        ("{resources: [map.yaml], patches: [{target: {kind: ConfigMap}, patch: '[{op: move, path: /a}]'}]}", "move"),
        ("{resources: [map.yaml], patches: [{target: {kind: ConfigMap}, patch: '[{op: replace, path: /a}]'}]}", "/a"),
    ],
)
def test_what_it_does_not_render_is_an_error(tmp_path, text, complaint):
    (tmp_path / "kustomization.yaml").write_text(text)
    (tmp_path / "map.yaml").write_text("{kind: ConfigMap, metadata: {name: a}}")
    with pytest.raises(AssertionError, match=complaint):
        rendered(tmp_path)


def test_the_monitoring_component_names_its_secret_and_hands_the_dashboard_over():
    objects = monitored("gpu")
    assert {obj["metadata"].get("namespace", "pedro") for obj in objects} == {"pedro"}
    scrape = one(objects, "ScrapeConfig")["spec"]
    assert scrape["staticConfigs"] == [{"targets": ["pedro-serve-svc.pedro.svc:8000"]}]
    secret = scrape["authorization"]["credentials"]
    guide = (ROOT / "k8s" / "README.md").read_text("utf-8")
    assert f"secret generic {secret['name']} --from-file={secret['key']}=/dev/stdin" in guide
    board = one(objects, "ConfigMap", "pedro-grafana-dashboard")
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(board["data"]["pedro.json"])["title"] == "pedro"
    (rule,) = one(objects, "NetworkPolicy", "metrics")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]


def test_the_tracing_component_names_the_collector_to_every_pod_that_makes_spans(tmp_path):
    k8s = ROOT / "k8s"
    told = {"resources": [str(k8s / "overlays/dev")], "components": [str(k8s / "components/tracing")]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(told))
    objects = rendered(tmp_path)
    (policy,) = [obj for obj in objects if obj["kind"] == "NetworkPolicy" and obj["metadata"]["name"] == "tracing"]
    (chosen,) = policy["spec"]["podSelector"]["matchExpressions"]
    tracing = [pod for pod in pods(objects) if pod.labels["app.kubernetes.io/component"] in chosen["values"]]
    assert len(tracing) == 5
    for pod in tracing:
        told = environment(pod.spec["containers"][0], objects)
        assert pod.ends or told["OTEL_EXPORTER_OTLP_ENDPOINT"].endswith(":4318"), pod.where
    assert policy["spec"]["egress"][0]["ports"] == [{"protocol": "TCP", "port": 4318}]
