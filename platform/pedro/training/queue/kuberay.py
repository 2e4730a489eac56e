"""Drivers as RayJobs of KubeRay: each fine-tune or sweep has its own Ray cluster, created and deleted with it.

A suspended RayJob in the namespace is the template, like a CronJob for `kubectl create job --from`: it determines
image, settings, memory and security. The job determines name, entrypoint, number of workers and their CPUs and GPUs.
With the annotation `pedro/queue-name` on the template, Kueue admits the RayJobs.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError, UnavailableError
from pedro.store import JobStatus
from pedro.training.queue.launcher import RESOURCES, Claim, ClusterView, driver_arguments
from pedro.training.queue.prepare import prepare

if TYPE_CHECKING:
    from lightkube import Client
    from lightkube.generic_resource import GenericNamespacedResource

    from pedro.config import Settings
    from pedro.store import JobRecord

TEMPLATE = "finetune-template"
OURS = {"app.kubernetes.io/managed-by": "pedro-controller"}
JOB, TENANT, ADAPTER = "pedro/job", "pedro/tenant", "pedro/adapter"
QUEUE, KUEUE = "pedro/queue-name", "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
TIMEOUT_S = 20.0
UNBOUNDED = 1e9
ENDED = ("Complete", "Failed", "ValidationFailed")
"""Values of `status.jobDeploymentStatus` (KubeRay 1.7, ray-operator/apis/ray/v1/rayjob_types.go)."""
ENDS = {"SUCCEEDED": JobStatus.SUCCEEDED, "STOPPED": JobStatus.CANCELLED}
"""Values of `status.jobStatus`; any other final one is a failure."""


class KubeRayJobs:
    """A `Launcher`. `cpus` and `gpus` limit all fine-tunes together; with None the cluster's scheduler, autoscaler or
    Kueue keeps pods pending."""

    def __init__(
        self,
        settings: Settings,
        *,
        template: str = TEMPLATE,
        namespace: str | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
    ) -> None:
        """Raises ConfigError if the Kubernetes client is not installed, or no cluster is configured."""
        self._settings, self._template = settings, template
        self._node = {"CPU": UNBOUNDED if cpus is None else cpus, "GPU": UNBOUNDED if gpus is None else gpus}
        self._client, self._kind = _connect(namespace)

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        return prepare(job, self._settings)

    def look(self) -> ClusterView:
        with _answers():
            self._read_template()  # without a template no job could start: all wait, none is lost
            items: Any = self._client.list(self._kind, labels=dict(OURS))
            found = [item.to_dict() for item in items]
        states = {item["metadata"]["name"]: _state(item) for item in found}
        held = {item["metadata"]["name"]: _held(item) for item in found}
        open_ones = [amounts for name, amounts in held.items() if not states[name].final]
        taken = {name: sum(amounts[name] for amounts in open_ones) for name in RESOURCES}
        return ClusterView(states, [self._node], taken, held)

    def start(self, job: JobRecord, submission_id: str) -> None:
        with _answers(but=409):  # it already exists
            body = rayjob(self._read_template(), job, submission_id, self._settings)
            self._client.create(self._kind.from_dict(body))

    def stop(self, submission_id: str) -> None:
        from lightkube.types import CascadeType

        with _answers(but=404):  # deleted only after its pods, so that no second driver runs beside them
            self._client.delete(self._kind, submission_id, cascade=CascadeType.FOREGROUND)

    def _read_template(self) -> Mapping[str, Any]:
        from lightkube import ApiError

        try:
            found: Any = self._client.get(self._kind, self._template)
        except ApiError as error:
            if error.response.status_code != 404:
                raise
            raise UnavailableError(
                f"RayJob {self._template} is not in namespace {self._client.namespace}; "
                "apply the platform's manifests, or name yours with --template"
            ) from error
        fields: dict[str, Any] = found.to_dict()
        return fields


def rayjob(template: Mapping[str, Any], job: JobRecord, submission_id: str, settings: Settings) -> dict[str, Any]:
    """The RayJob for a job's driver, from the template. Raises UnavailableError unless that has one worker group."""
    spec = copy.deepcopy(dict(template["spec"]))
    groups = spec.get("rayClusterSpec", {}).get("workerGroupSpecs", [])
    if len(groups) != 1:
        raise UnavailableError(
            f"RayJob {template['metadata']['name']}: a template must have one worker group, not {len(groups)}"
        )
    claim = Claim.of(job.spec)
    groups[0].update(dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), claim.workers))
    resources = groups[0]["template"]["spec"]["containers"][0].setdefault("resources", {})
    for side in ("requests", "limits"):
        asked = resources.setdefault(side, {})
        asked["cpu"] = f"{claim.cpus:g}"
        asked.pop(GPU, None)
        if claim.gpus:
            asked[GPU] = f"{claim.gpus:g}"
    spec.pop("suspend", None)
    spec["jobId"] = submission_id
    spec["entrypoint"] = shlex.join(["python", "-m", *driver_arguments(job, settings)])
    about = template["metadata"]
    labels = {**about.get("labels", {}), **OURS, JOB: job.id}
    if queue := about.get("annotations", {}).get(QUEUE):
        labels[KUEUE] = queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": submission_id,
            "namespace": about["namespace"],
            "labels": labels,
            "annotations": {TENANT: job.tenant, ADAPTER: job.adapter},  # not labels, whose values are more restricted
        },
        "spec": spec,
    }


def _state(item: Mapping[str, Any]) -> JobStatus:
    """The state of a driver. One being deleted counts as running until its pods are gone."""
    status = item.get("status") or {}
    if item["metadata"].get("deletionTimestamp") or status.get("jobDeploymentStatus") not in ENDED:
        return JobStatus.RUNNING if status.get("jobStatus") else JobStatus.QUEUED
    return ENDS.get(status.get("jobStatus", ""), JobStatus.FAILED)


def _held(item: Mapping[str, Any]) -> dict[str, float]:
    """The CPUs and GPUs of a RayJob's workers, as set by `rayjob`."""
    (group,) = item["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return {name: group["replicas"] * float(limits.get(key, 0)) for name, key in (("CPU", "cpu"), ("GPU", GPU))}


def _connect(namespace: str | None) -> tuple[Client, type[GenericNamespacedResource]]:
    try:
        import httpx2
        from lightkube import Client
        from lightkube.core.exceptions import ConfigError as NoCluster
        from lightkube.generic_resource import create_namespaced_resource
    except ImportError as error:
        raise ConfigError(
            "PEDRO_LAUNCHER=kuberay needs the Kubernetes client: pip install 'pedro-platform[services]'"
        ) from error
    try:
        client = Client(namespace=namespace, timeout=httpx2.Timeout(TIMEOUT_S), field_manager="pedro-controller")
    except NoCluster as error:
        raise ConfigError(
            f"PEDRO_LAUNCHER=kuberay: no cluster is configured ({error}); run it in a pod with a service account, or "
            "set KUBECONFIG"
        ) from error
    return client, create_namespaced_resource("ray.io", "v1", "RayJob", "rayjobs")


@contextmanager
def _answers(but: int | None = None) -> Iterator[None]:
    """Turn errors of the Kubernetes API, except the status `but`, and timeouts into UnavailableError."""
    import httpx2
    from lightkube import ApiError

    try:
        yield
    except ApiError as error:
        code = error.response.status_code
        if code == but:
            return
        remedy = "; its service account needs the role in k8s/base/platform/controller.yaml" if code == 403 else ""
        raise UnavailableError(f"Kubernetes refuses ({code}): {error.status.message or error}{remedy}") from error
    except httpx2.HTTPError as error:
        raise UnavailableError(f"the Kubernetes API does not answer: {error or type(error).__name__}") from error
