"""Who may talk to whom, worked out from the rendered network policies as a cluster would."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

import pytest
from k8s_policies import component, direction_allows, may_talk
from k8s_render import OVERLAYS, environment, matches, monitored, pods, render

OPERATOR = {"kubernetes.io/metadata.name": "kuberay-system"}
CLIENTS = {"kubernetes.io/metadata.name": "ingress-nginx", "pedro/clients": "allowed"}
STRANGERS = {"kubernetes.io/metadata.name": "default"}


@pytest.fixture(params=OVERLAYS)
def policies(request) -> list[dict[str, Any]]:
    return [obj["spec"] for obj in render(request.param) if obj["kind"] == "NetworkPolicy"]


def test_everything_is_denied_unless_a_policy_allows_it(policies):
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies


def test_every_policy_names_pods_that_exist():
    objects = render("dev")
    for obj in objects:
        if obj["kind"] == "NetworkPolicy":
            assert any(matches(obj["spec"]["podSelector"], pod.labels) for pod in pods(objects)), obj["metadata"]


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("serving", "mlflow", 5000),
        ("serving", "postgres", 5432),
        ("serving", "serving", 6379),
        ("finetune/head", "mlflow", 5000),
        ("finetune/head", "postgres", 5432),
        ("finetune", "finetune/head", 8265),
        ("finetune/head", "finetune/worker", 6379),
        ("mlflow", "postgres", 5432),
        ("dashboard", "mlflow", 5000),
        ("dashboard", "postgres", 5432),
        ("upgrade", "mlflow", 5000),
        ("upgrade", "postgres", 5432),
        ("controller", "mlflow", 5000),
        ("controller", "postgres", 5432),
        ("dashboard", "serving", 8000),
    ],
)
def test_what_must_talk_can(policies, source, target, port):
    assert may_talk(policies, component(source), component(target), port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("finetune/worker", "mlflow", 5000),
        ("finetune/worker", "postgres", 5432),
        ("finetune", "mlflow", 5000),  # its submitter
        ("finetune", "postgres", 5432),
        ("finetune/head", "serving", 8000),
        ("finetune/head", "serving", 8265),
        ("serving", "finetune", 8265),
        ("serving", "dashboard", 8501),
        ("finetune", "dashboard", 8501),
        ("upgrade", "serving", 8000),
        ("upgrade", "dashboard", 8501),
        ("controller", "serving", 8265),
        ("serving", "controller", 8000),
        ("dashboard", "serving", 8265),
        ("mlflow", "serving", 8265),
        ("postgres", "mlflow", 5000),
    ],
)
def test_what_need_not_talk_cannot(policies, source, target, port):
    assert not may_talk(policies, component(source), component(target), port)


def test_tenants_reach_the_api_and_nothing_else(policies):
    assert may_talk(policies, {}, component("serving"), 8000, namespace=CLIENTS)
    for target, port in (("serving", 8265), ("mlflow", 5000), ("dashboard", 8501), ("postgres", 5432)):
        assert not may_talk(policies, {}, component(target), port, namespace=CLIENTS)


def test_a_namespace_without_the_label_reaches_nothing(policies):
    for target, port in (("serving", 8000), ("serving", 8265), ("mlflow", 5000), ("dashboard", 8501)):
        assert not may_talk(policies, {}, component(target), port, namespace=STRANGERS)


def test_the_operator_reaches_the_heads_of_both_clusters(policies):
    for target in ("serving", "finetune"):
        assert may_talk(policies, {}, component(target), 8265, namespace=OPERATOR)


def test_storage_in_the_cluster_is_reached_by_those_who_hold_its_key():
    policies = [obj["spec"] for obj in render("dev") if obj["kind"] == "NetworkPolicy"]
    for source in ("serving", "finetune", "controller", "dashboard", "mlflow"):
        assert may_talk(policies, component(source), component("minio"), 9000)
    assert not may_talk(policies, component("postgres"), component("minio"), 9000)


def test_the_dashboard_alone_asks_prometheus_and_is_let_through_where_it_is_told_of_one(policies):
    prometheus, there = {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"}
    objects = monitored("gpu")
    with_it = [obj["spec"] for obj in objects if obj["kind"] == "NetworkPolicy"]
    told = {}
    for pod in pods(objects):
        for container in pod.containers:
            if url := environment(container, objects).get("PEDRO_PROMETHEUS_URL"):
                told[pod.where] = url
    assert [*told] == ["Deployment/dashboard"]
    address = urlsplit(told["Deployment/dashboard"])
    assert address.hostname == "prometheus-operated.monitoring.svc"
    for pod in pods(objects):
        may = direction_allows(with_it, "Egress", pod.labels, prometheus, there, address.port)
        assert may == (pod.where in told), pod.where
    assert not direction_allows(policies, "Egress", component("dashboard"), prometheus, there, address.port)


def test_the_kubernetes_api_is_within_reach_of_the_controller_alone(policies):
    api = ipaddress.ip_address("10.96.0.1")
    reach = set()
    for policy in policies:
        for rule in policy.get("egress", []):
            for block in (peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer):
                out = any(api in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
                if api in ipaddress.ip_network(block["cidr"]) and not out:
                    selector = policy["podSelector"]
                    reach.add(selector.get("matchLabels", {}).get("app.kubernetes.io/component"))
    assert reach == {"controller"}
