"""What KubeRay does with a RayService and with RayJobs.

A RayService whose RayCluster changes gets a second one, to which its Service turns once that is ready; the first goes
after its time. One whose serveConfigV2 alone changes is told to Serve. A RayJob has a cluster of its own; its submitter
submits the entrypoint there, and status and end are the job's.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
from k8s_render import Pod, pods

from integration.kuberay import SERVE, LocalRayCluster
from integration.service import Service

if TYPE_CHECKING:
    from kubernetes_api import RayJobs

    from integration.pods import LocalPod

LOOK_S = 0.5
READY_S = 600.0
Log = Callable[[str], None]
Made = Callable[[str, dict[str, Any]], LocalRayCluster]


class RayServiceController:
    """One RayService. `active` is the cluster to which the Service leads."""

    def __init__(self, port: int, make: Made, log: Log) -> None:
        self.service = Service(port)
        self.active: LocalRayCluster | None = None
        self.told = "nothing yet"
        self.failed_starts = 0  # of engines, as the log of Serve's controller has them
        self.leaving: set[str] = set()  # names of workers that are being ended: no endpoints any more
        self._make, self._log = make, log
        self._spec: dict[str, Any] = {}
        self._clusters: list[LocalRayCluster] = []
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="endpoints", daemon=True)
        self._watch.start()

    @property
    def ready(self) -> bool:
        return bool(self.service.backends)

    def replicas(self) -> dict[str, set[str]]:
        """Of each deployment, the ids of replicas that run where the Service leads."""
        assert self.active is not None
        return self.active.replicas()

    def change(self, obj: dict[str, Any]) -> None:
        """Bring it to what its object says; returns when that serves. Raises AssertionError if it never does."""
        before, self._spec = self._spec, obj["spec"]
        if before.get("rayClusterConfig") == self._spec["rayClusterConfig"] and self.active is not None:
            self.active.deploy(self._spec["serveConfigV2"])
            self._wait_running(self.active)
            return
        if self._over.is_set():
            return
        cluster = self._make(obj["metadata"]["name"], self._spec["rayClusterConfig"])
        self._clusters.append(cluster)
        cluster.start()
        self._log(f"    RayCluster {cluster.name}: a head and {len(cluster.workers)} workers have started")
        cluster.deploy(self._spec["serveConfigV2"])
        self._wait_running(cluster)
        while not self._endpoints(cluster) and not self._over.is_set():
            time.sleep(LOOK_S)
        old, self.active = self.active, cluster
        if old is not None:
            delay_s = self._spec["rayClusterDeletionDelaySeconds"]
            self._log(f"    the Service leads to {cluster.name}; {old.name} goes in {delay_s} s")
            threading.Thread(target=self._delete, args=(old, delay_s), daemon=True).start()

    def replace_worker(self, worker: LocalPod, grace_s: float) -> tuple[float, LocalPod]:
        """What a drain of its node does: the pod leaves the Service and gets SIGTERM, another is made at once, and at
        the end of its grace period it is killed. Gives the seconds that it took, and the other."""
        assert self.active is not None
        self.leaving.add(worker.name)
        worker.terminate()
        other = self.active.add_worker()
        took = worker.end(grace_s)
        self.active.workers.remove(worker)
        return took, other

    def end(self) -> None:
        """End every cluster there is; again once `change` has ended, which may have made another meanwhile."""
        self._over.set()
        for cluster in list(self._clusters):
            cluster.end()

    def close(self) -> None:
        self.end()
        self._watch.join(60)
        self.service.close()

    def _wait_running(self, cluster: LocalRayCluster) -> None:
        until = time.monotonic() + READY_S
        while not self._over.is_set():
            try:
                status, self.told = cluster.serve_status()
            except httpx.HTTPError as error:
                status = self.told = repr(error)
            self.failed_starts = cluster.failed_starts()
            if status == "RUNNING":
                return
            assert status != "DEPLOY_FAILED", f"Serve has given the application up: {self.told}"
            assert time.monotonic() < until, f"{status}: {self.told}"
            time.sleep(LOOK_S)

    def _look(self) -> None:
        """Keep the Service's endpoints: workers of the active cluster that are ready."""
        while not self._over.wait(LOOK_S):
            if self.active is not None:
                self.service.backends = self._endpoints(self.active)

    def _endpoints(self, cluster: LocalRayCluster) -> list[int]:
        stay = [worker for worker in list(cluster.workers) if worker.name not in self.leaving]
        return [worker.ports[SERVE] for worker in stay if not worker.fails("readinessProbe")]

    def _delete(self, cluster: LocalRayCluster, delay_s: float) -> None:
        if not self._over.wait(delay_s):
            cluster.end(30)
            self._clusters.remove(cluster)
            self._log(f"    RayCluster {cluster.name} is gone")


class RayJobController:
    """Every RayJob that is not suspended."""

    def __init__(self, api: RayJobs, make: Made, make_pod: Callable[[Pod, str], LocalPod], log: Log) -> None:
        self._api, self._make, self._make_pod, self._log = api, make, make_pod, log
        self._clusters: dict[str, LocalRayCluster] = {}
        self._over = threading.Event()

    def round(self) -> None:
        """One look at all of them."""
        for name, item in list(self._api.items.items()):
            if self._over.is_set():
                return
            if item["spec"].get("suspend"):
                continue
            if item["metadata"].get("deletionTimestamp"):
                self._end(name)
                self._api.pods_gone(name)
            elif name not in self._clusters:
                self._begin(name, item)
            elif item.get("status", {}).get("jobDeploymentStatus") == "Running":
                self._follow(name, item)

    def end(self) -> None:
        """End every cluster there is; again once `round` has ended, which may have made another meanwhile."""
        self._over.set()
        for name in list(self._clusters):
            self._end(name)

    def _begin(self, name: str, item: dict[str, Any]) -> None:
        self._api.set(name, "Initializing")
        cluster = self._clusters[name] = self._make(name, item["spec"]["rayClusterSpec"])
        cluster.start()
        self._log(f"    RayJob {name}: a head and {len(cluster.workers)} workers have started")
        (submitter,) = (pod for pod in pods([item]) if pod.where.endswith("/submitter"))
        made = self._make_pod(submitter, f"s-{cluster.name}"[:40])
        made.add(cluster.variables)
        job = ["ray", "job", "submit", f"--address={cluster.dashboard}", "--no-wait"]
        job += [f"--submission-id={item['spec']['jobId']}", "--", *shlex.split(item["spec"]["entrypoint"])]
        done = made.run(made.container, job)
        assert done.returncode == 0, done.stderr[-2000:].decode(errors="replace")
        self._api.set(name, "Running", "RUNNING")

    def _follow(self, name: str, item: dict[str, Any]) -> None:
        cluster = self._clusters[name]
        url = f"{cluster.dashboard}/api/jobs/{item['spec']['jobId']}"
        status = httpx.get(url, headers=cluster.authorization, timeout=60).json()["status"]
        if status in ("SUCCEEDED", "FAILED", "STOPPED"):
            logs = httpx.get(f"{url}/logs", headers=cluster.authorization, timeout=60).json()["logs"]
            cluster.head.log.with_suffix(".job").write_text(logs, "utf-8")
            self._api.set(name, "Complete" if status == "SUCCEEDED" else "Failed", status)
            self._log(f"    RayJob {name}: {status}")
            self._end(name)

    def _end(self, name: str) -> None:
        """Its pods go: `shutdownAfterJobFinishes`."""
        if (cluster := self._clusters.get(name)) is not None:
            cluster.end()
