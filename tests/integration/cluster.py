"""The namespace `pedro` on this host: what is applied runs as processes, and comes to what was asked for on its own.

As in a cluster nothing waits for anything else: a container that fails starts again, a Job tries again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from k8s_policies import may_talk
from k8s_render import ROOT, Pod, matches, pods
from kubernetes_api import RayJobs
from kubernetes_api import serve as serve_api

from integration import images
from integration.kuberay import LocalRayCluster
from integration.pods import Known, LocalPod
from integration.ray_objects import RayJobController, RayServiceController
from integration.substitutions import Here, Reach

BACK_OFF_S = 2.0  # a cluster's is ten, and grows
LOOK_S = 0.5
GRACE_S = 10.0
OTHERS = ("postgres", "minio")  # images that are none of ours, which others stand for: they have no such probes
MADE_BY_KUBERAY = {"pedro-serve-svc": "serving"}
Log = Callable[[str], None]


class Namespace:
    """Objects, Secrets and pods of a run, in a folder of its own; `close` ends every process by its id."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.known = Known(folder, Here(ROOT))
        self.log = log
        self.api = RayJobs()
        self.pods: dict[str, LocalPod] = {}  # those that stay, by their workload's name
        self.jobs_done: dict[str, threading.Event] = {}
        self.late = 0  # tries of replicas that fail before the Job `upgrade` begins
        self.troubles: list[str] = []  # what ended that should not, and what could not begin
        self._stack, self._over, self._applying = ExitStack(), threading.Event(), threading.Lock()
        self._threads: list[threading.Thread] = []
        self._kubeconfig = folder / "kubeconfig"
        self._stack.enter_context(serve_api(self.api, self._kubeconfig))
        self.service: RayServiceController | None = None
        self._rayjobs = RayJobController(self.api, self._ray_cluster, self._plain_pod, log)
        self._spawn(self._loop, self._rayjobs.round)

    def create_secret(self, name: str, values: dict[str, str]) -> None:
        """As `kubectl create secret generic` does."""
        assert name not in self.known.secrets, f'secrets "{name}" already exists'
        self.known.secrets[name] = values

    def apply(self, objects: list[dict[str, Any]]) -> None:
        """As `kubectl apply` does: what is new begins, what has changed is changed."""
        with self._applying:
            self._apply(objects)

    def _apply(self, objects: list[dict[str, Any]]) -> None:
        new = {_key(obj): obj for obj in objects}
        before = {_key(obj): obj for obj in self.known.objects}
        self.known.objects = list({**before, **new}.values())
        services = {obj["metadata"]["name"] for obj in self.known.objects if obj["kind"] == "Service"}
        self.known.here.know(services | MADE_BY_KUBERAY.keys())
        for key, obj in new.items():
            assert not self._over.is_set(), "the namespace is being closed"
            if before.get(key) != obj:
                self._begin(obj)

    def delete_job(self, name: str) -> None:
        """A Job that is over."""
        self.known.objects = [obj for obj in self.known.objects if _key(obj) != ("Job", name)]
        self.jobs_done.pop(name, None)

    def wait(self, what: str, condition: str, limit_s: float) -> None:
        """As `kubectl wait` does. Raises AssertionError once the time is over."""
        kind, _, name = what.partition("/")
        until = time.monotonic() + limit_s
        while not self._holds(kind, name, condition):
            assert time.monotonic() < until, f"{what} is not {condition} after {limit_s:g} s: {self.state()}"
            time.sleep(LOOK_S)

    def state(self) -> str:
        """For people: what is not as it should be."""
        ours = {name: pod for name, pod in self.pods.items() if name not in OTHERS}
        said = [f"{name}: {pod.last_words(600)}" for name, pod in ours.items() if pod.fails("readinessProbe")]
        if self.service is not None:
            said.append(f"rayservice: {self.service.told}")
        return "\n".join([*said, *self.troubles[-5:]])

    def close(self) -> None:
        """End all; twice, since a thread may have been about to start something."""
        self._over.set()
        with self._applying:  # what is begun there is known from here on
            threads = list(self._threads)
        self._end_all()
        for thread in threads:
            thread.join(60)
        self._end_all()
        if self.service is not None:
            self.service.close()
        self._stack.close()

    def _end_all(self) -> None:
        self._rayjobs.end()
        if self.service is not None:
            self.service.end()
        for pod in list(self.pods.values()):
            pod.end(GRACE_S)

    def reach(self, pod: Pod) -> Reach:
        """Whether the network policies let a pod talk to a Service."""

        def may(service: str, port: int) -> bool:
            policies = [obj["spec"] for obj in self.known.objects if obj["kind"] == "NetworkPolicy"]
            if component := MADE_BY_KUBERAY.get(service):
                target = {"app.kubernetes.io/component": component, "ray.io/node-type": "worker"}
                return may_talk(policies, pod.labels, target, port)
            (found,) = (
                obj for obj in self.known.objects if obj["kind"] == "Service" and obj["metadata"]["name"] == service
            )
            selector = {"matchLabels": found["spec"]["selector"]}
            targets = [each for each in pods(self.known.objects) if matches(selector, each.labels)]
            return any(may_talk(policies, pod.labels, target.labels, port) for target in targets)

        return may

    def _holds(self, kind: str, name: str, condition: str) -> bool:
        if kind == "job":
            assert condition == "Complete"
            return name in self.jobs_done and self.jobs_done[name].is_set()
        assert condition == "Ready", f"{condition} of {kind} is not played"
        if kind == "rayservice":
            return self.service is not None and self.service.ready
        return name in self.pods and not self.pods[name].fails("readinessProbe")

    def _begin(self, obj: dict[str, Any]) -> None:
        kind, name = obj["kind"], obj["metadata"]["name"]
        if kind in ("Deployment", "StatefulSet"):
            self._workload(obj)
        elif kind == "Job":
            self.jobs_done[name] = threading.Event()
            self._spawn(self._job, obj)
        elif kind == "RayService":
            if self.service is None:
                port = self.known.here.port("pedro-serve-svc", 8000)
                self.service = RayServiceController(port, self._ray_cluster, self.log)
            self._spawn(self.service.change, obj)
        elif kind == "RayJob":
            self.api.items.pop(name, None)
            self.api.add(obj)

    def _workload(self, obj: dict[str, Any]) -> None:
        name = obj["metadata"]["name"]
        if (before := self.pods.pop(name, None)) is not None:
            assert name not in OTHERS, f"{name} changed: its data would be lost"
            before.end(GRACE_S)
        (pod,) = pods([obj])
        try:
            made = self._plain_pod(pod, name)
        except LookupError as error:
            self.troubles.append(str(error))
            raise
        self.pods[name] = made
        if name == "postgres":
            self._stack.enter_context(images.postgres(made))
        elif name == "minio":
            self._stack.enter_context(images.s3(made))
        else:
            self._spawn(self._keep, made)

    def _plain_pod(self, pod: Pod, name: str) -> LocalPod:
        added = {"KUBECONFIG": str(self._kubeconfig)} if pod.spec.get("automountServiceAccountToken") else {}
        return LocalPod(self.known, pod, name, self.reach(pod), added)

    def _ray_cluster(self, owner: str, spec: dict[str, Any]) -> LocalRayCluster:
        return LocalRayCluster(self.known, owner, spec, self.reach, self.log)

    def _keep(self, pod: LocalPod) -> None:
        """Init containers, each until it succeeds; then the container, which starts again when it ends."""
        for container in pod.pod.spec.get("initContainers", []):
            while not self._over.is_set() and (done := pod.run(container)).returncode:
                self.troubles.append(f"{pod.name}/{container['name']}: {done.stderr[-500:].decode(errors='replace')}")
                self._over.wait(BACK_OFF_S)
        while not self._over.is_set() and self.pods.get(pod.name) is pod:
            pod.start()
            while not pod.ended and not self._over.wait(LOOK_S):
                pass
            if not self._over.is_set() and self.pods.get(pod.name) is pod:
                pod.restarts += 1
                self.troubles.append(f"{pod.name} ended: {pod.last_words(500)}")
                self._over.wait(BACK_OFF_S)

    def _job(self, obj: dict[str, Any]) -> None:
        name = obj["metadata"]["name"]
        (pod,) = pods([obj])
        while self.late and (self.service is None or self.service.failed_starts < self.late):
            if self._over.wait(LOOK_S):
                return
        made = self._plain_pod(pod, f"{name}-{int(time.monotonic())}")
        for _ in range(obj["spec"]["backoffLimit"] + 1):
            done = made.run(made.container)
            if done.returncode == 0:
                self.log(f"    job/{name}: {done.stdout.decode().strip().replace(chr(10), '; ')}")
                self.jobs_done[name].set()
                return
            self.troubles.append(f"job/{name}: {done.stderr[-500:].decode(errors='replace')}")
            if self._over.wait(BACK_OFF_S):
                return

    def _loop(self, work: Callable[[], None]) -> None:
        while not self._over.wait(LOOK_S):
            work()

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            try:
                target(*arguments)
            except Exception as error:  # noqa: BLE001 (told with what was waited for)
                self.troubles.append(f"{target.__name__}: {error!r}")

        thread = threading.Thread(target=run, name=target.__name__, daemon=True)
        self._threads.append(thread)
        thread.start()


def _key(obj: dict[str, Any]) -> tuple[str, str]:
    return obj["kind"], obj["metadata"]["name"]
