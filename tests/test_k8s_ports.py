"""Ports and addresses of the manifests are those of the code, of each other, and of pods that there are."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml
from k8s_render import OVERLAYS, ROOT, environment, matches, one, pods, render

from pedro.cli.dashboard import dashboard
from pedro.cli.serve import serve

MADE_BY_KUBERAY = {"pedro-serve-svc": "RayService/pedro/engines"}
OUTSIDE = {53, 443, 6443}  # DNS, object storage, the Kubernetes API
RAY = {8265: "its dashboard", 52365: "its agent"}
ADDRESS = re.compile(r"://(?:[^@/]*@)?([a-z][a-z0-9-]*):(\d+)")


def default(command, option: str) -> int:
    return inspect.signature(command).parameters[option].default


def ports_of(pod) -> set[int]:
    return {port["containerPort"] for container in pod.containers for port in container.get("ports", [])}


def argument(container, name: str) -> str:
    words = [*container.get("command", []), *container.get("args", [])]
    (found,) = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_listens_does_so_on_the_port_that_its_pod_names_and_the_code_has(overlay):
    objects = render(overlay)
    config = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    at = {pod.where: pod for pod in pods(objects)}
    assert config["http_options"]["port"] == default(serve, "port")
    assert {config["http_options"]["port"]} == ports_of(at["RayService/pedro/engines"])
    for where, command_line in (("Deployment/dashboard", "--server.port"), ("Deployment/mlflow", "--port")):
        (container,) = at[where].spec["containers"]
        assert {int(argument(container, command_line))} == ports_of(at[where]), where
    assert ports_of(at["Deployment/dashboard"]) == {default(dashboard, "port")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_address_in_a_setting_is_a_service_with_that_port(overlay):
    objects = render(overlay)
    at = {pod.where: pod for pod in pods(objects)}
    open_at = {
        obj["metadata"]["name"]: {port["port"] for port in obj["spec"]["ports"]}
        for obj in objects
        if obj["kind"] == "Service"
    }
    open_at |= {name: ports_of(at[where]) for name, where in MADE_BY_KUBERAY.items()}
    named = set()
    for pod in at.values():
        for container in pod.containers:
            named |= {found for value in environment(container, objects).values() for found in ADDRESS.findall(value)}
    assert {host for host, _ in named} >= {"postgres", "mlflow", "pedro-serve-svc"}
    for host, port in named:
        assert int(port) in open_at[host], f"{host}:{port}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_port_that_a_policy_opens_is_one_on_which_such_a_pod_listens(overlay):
    objects = render(overlay)
    everywhere = set().union(*(ports_of(pod) for pod in pods(objects))) | OUTSIDE | set(RAY)
    for policy in (obj for obj in objects if obj["kind"] == "NetworkPolicy"):
        chosen = [pod for pod in pods(objects) if matches(policy["spec"]["podSelector"], pod.labels)]
        assert chosen, policy["metadata"]["name"]
        listening = set().union(*(ports_of(pod) for pod in chosen)) | set(RAY)
        for side, ports in (("ingress", listening), ("egress", everywhere)):
            opened = {port["port"] for rule in policy["spec"].get(side, []) for port in rule.get("ports", [])}
            assert opened <= ports, f"{policy['metadata']['name']}: {side} on {sorted(opened - ports)}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_a_port_on_which_the_pod_listens(overlay):
    for pod in pods(render(overlay)):
        for container in pod.containers:
            names = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                assert port is None or port in names or port in {*names.values(), *RAY}, f"{pod.where}: {probe}"


def test_the_guide_forwards_ports_that_there_are():
    guide = (ROOT / "k8s" / "README.md").read_text("utf-8")
    forwarded = re.findall(r"port-forward svc/(\S+) (\d+)", guide)
    assert {name for name, _ in forwarded} == {"pedro-serve-svc", "dashboard", "mlflow"}
    objects = render("dev")
    at = {pod.where: pod for pod in pods(objects)}
    for name, port in forwarded:
        if name in MADE_BY_KUBERAY:
            assert int(port) in ports_of(at[MADE_BY_KUBERAY[name]])
        else:
            assert int(port) in {each["port"] for each in one(objects, "Service", name)["spec"]["ports"]}
