"""What KubeRay 1.7 does with a RayCluster, as processes: its `ray start`, its variables, its way to deploy on Serve.

References: ray-operator/controllers/ray/common/pod.go (the command and the variables), rayservice_controller.go.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from k8s_render import Pod, pods

from integration.pods import AGENT, Known, LocalPod
from pedro.cluster import free_port

if TYPE_CHECKING:
    from integration.substitutions import Reach

SERVE, GCS, DASHBOARD, METRICS = 8000, 6379, 8265, 8080
OBJECT_STORE = 100_000_000
STARTS_S = 300.0
_numbers = itertools.count(1)
Log = Callable[[str], None]


class LocalRayCluster:
    """A head and its workers; `spec` is a RayCluster's."""

    def __init__(self, known: Known, owner: str, spec: dict[str, Any], reach: Callable[[Pod], Reach], log: Log) -> None:
        number = next(_numbers)
        self.name = f"{owner}-{number}"
        self.spec, self._known, self._reach, self._log = spec, known, reach, log
        self._short = f"r{number}"  # the path of a socket has 107 bytes at most
        self._token = secrets.token_hex(32)  # the operator's own Secret
        self._count = itertools.count()
        self._starting, self._ended = threading.Lock(), False
        named = {"kind": "RayCluster", "metadata": {"name": self.name}, "spec": {"rayClusterConfig": spec}}
        head, *self._groups = pods([named])
        self._gcs, self._dashboard, self._proxy = free_port(), free_port(), free_port()
        self.head = self._pod(head, "headgroup")
        self.workers: list[LocalPod] = []

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self._dashboard}"

    @property
    def authorization(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self._token}"}

    @property
    def variables(self) -> dict[str, str]:
        """What a submitter's pod is told."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_ADDRESS": self.dashboard}

    def start(self) -> None:
        """The head, then every worker; returns when all have started, by their own probes."""
        parameters = self.spec["headGroupSpec"]["rayStartParams"]
        ours = {
            "head": "",
            "port": self._gcs,
            "dashboard-port": self._dashboard,
            "ray-client-server-port": free_port(),
            "temp-dir": f"{self.head.folder}/tmp/ray",
        }
        self._start(self.head, parameters, ours)
        self._wait_started(self.head)
        for group, told in zip(self._groups, self.spec["workerGroupSpecs"], strict=True):
            for _ in range(told["replicas"]):
                self._wait_started(self.add_worker(group, told))  # one after the other: this host has few cores

    def add_worker(self, group: Pod | None = None, told: dict[str, Any] | None = None) -> LocalPod:
        """One more, which takes the place of one that ends."""
        group, told = group or self._groups[0], told or self.spec["workerGroupSpecs"][0]
        worker = self._pod(group, told["groupName"])
        self.workers.append(worker)  # before it starts, for `end` to find it
        self._start(worker, told["rayStartParams"], {"address": f"127.0.0.1:{self._gcs}"})
        return worker

    def deploy(self, config: str) -> None:
        """Have Serve run a serveConfigV2, as the operator does at each change."""
        told = yaml.safe_load(config)
        assert told["http_options"] == {"host": "0.0.0.0", "port": SERVE}
        told["http_options"] = {"host": "127.0.0.1", "port": self._proxy}
        url = f"{self.dashboard}/api/serve/applications/"
        httpx.put(url, json=told, headers=self.authorization, timeout=60).raise_for_status()

    def serve_status(self) -> tuple[str, str]:
        """The application's status, and what it says."""
        reply = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=self.authorization, timeout=60)
        reply.raise_for_status()
        applications = reply.json()["applications"]
        if "pedro" not in applications:
            return "NOT_THERE", ""
        told = applications["pedro"]
        parts = [f"{name} {one['status']}: {one['message'][-700:]}" for name, one in told["deployments"].items()]
        return told["status"], "; ".join([told["message"][-700:], *parts])

    def replicas(self) -> dict[str, set[str]]:
        """Of each deployment, the ids of replicas that run."""
        reply = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=self.authorization, timeout=60)
        deployments = reply.json()["applications"]["pedro"]["deployments"]
        return {
            name: {one["replica_id"] for one in told["replicas"] if one["state"] == "RUNNING"}
            for name, told in deployments.items()
        }

    def failed_starts(self) -> int:
        """How often an engine could not be made."""
        logs = self.head.folder.glob("tmp/ray/session_2*/logs/serve/controller_*.log")
        return sum(path.read_text("utf-8", "replace").count("Exception in Replica(") for path in logs)

    def end(self, grace_s: float = 5.0) -> None:
        """Workers first, at once; then the head. Whoever starts a pod of it from now on gets an AssertionError."""
        with self._starting:
            self._ended = True
        all_ = (*self.workers, self.head)
        for pod in all_:
            pod.terminate()
        for pod in all_:
            pod.end(grace_s)

    def _pod(self, pod: Pod, group: str) -> LocalPod:
        number = next(self._count)
        name = f"{self._short}-{number}"
        known = {
            **self.variables,
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs}",
            "RAY_CLUSTER_NAME": self.name,
            "RAY_NODE_TYPE_NAME": group,
            "RAY_CLOUD_INSTANCE_ID": f"{self.name}-{group}-{number}",
        }
        made = LocalPod(self._known, pod, name, self._reach(pod), known)
        if SERVE in made.ports and group != "headgroup":  # several proxies on this host
            made.add({"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(made.ports[SERVE])})
        made.ports |= {GCS: self._gcs, DASHBOARD: self._dashboard} if group == "headgroup" else {}
        return made

    def _start(self, pod: LocalPod, told: dict[str, str], ours: dict[str, Any]) -> None:
        """`ray start` as the operator writes it: the pod's limits are the node's."""
        limits = pod.container["resources"]["limits"]
        said: dict[str, Any] = {
            "block": "",
            "num-cpus": limits["cpu"],
            "memory": _bytes(limits["memory"]),
            **told,
            "dashboard-agent-listen-port": pod.ports[AGENT],
            "metrics-export-port": free_port(),
            "node-ip-address": "127.0.0.1",
            "object-store-memory": OBJECT_STORE,
            **ours,
        }
        if "dashboard-host" in said:
            said["dashboard-host"] = "127.0.0.1"
        words = [f"--{name}" if value == "" else f"--{name}={value}" for name, value in said.items()]
        with self._starting:
            self._check()
            pod.start(["/bin/bash", "-c", "--", f"ulimit -n 65536; ray start {' '.join(words)}"])

    def _wait_started(self, pod: LocalPod) -> None:
        until = time.monotonic() + STARTS_S
        while why := pod.fails("startupProbe"):
            with self._starting:
                self._check()
                if pod.ended:  # as its node starts it again
                    self._log(f"    {pod.name} has ended, and starts again: {pod.last_words(300)}")
                    pod.start_again()
            assert time.monotonic() < until, f"{pod.name} did not start: {why}\n{pod.last_words()}"
            time.sleep(0.5)

    def _check(self) -> None:
        assert not self._ended, f"RayCluster {self.name} has ended"


def _bytes(quantity: str) -> int:
    assert quantity.endswith("Gi"), f"{quantity} is not read here"
    return int(quantity.removesuffix("Gi")) * 2**30
