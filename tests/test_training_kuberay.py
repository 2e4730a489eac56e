"""The controller's jobs as RayJobs of KubeRay: made from the template, watched, ended, and never two of one job."""

from __future__ import annotations

import shlex

import pytest
from k8s_render import one, render
from kubernetes_api import RayJobs, serve
from typer.testing import CliRunner

from pedro.cli import app
from pedro.config import Settings
from pedro.errors import ConfigError, UnavailableError
from pedro.store import JobStatus, Store
from pedro.training.queue.controller import Controller

pytest.importorskip("lightkube", reason="pip install 'pedro-platform[services]'")

from pedro.training.queue.kuberay import TEMPLATE, KubeRayJobs


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A namespace that holds the template of the manifests."""
    jobs = RayJobs()
    jobs.add(one(render("gpu"), "RayJob", TEMPLATE))
    with serve(jobs, tmp_path / "kubeconfig"):
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield jobs


@pytest.fixture
def settings(tmp_path):
    return Settings.from_env(
        {"PEDRO_HOME": str(tmp_path), "PEDRO_STORAGE": "s3://b/storage", "PEDRO_LAUNCHER": "kuberay"}
    )


@pytest.fixture
def store(settings):
    store = Store(settings.database_url)
    yield store
    store.close()


def queued(store, tenant="acme", **resources):
    return store.create_job(tenant, "voice", {"resources": resources}, queued=True).id


def workers(item):
    (group,) = item["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_a_job_becomes_a_rayjob_of_its_own_with_what_its_spec_asks(cluster, settings, store):
    template = cluster.items[TEMPLATE]
    template["metadata"].setdefault("annotations", {})["pedro/queue-name"] = "tuning"
    job = queued(store, workers=2, cpus_per_worker=3, gpus_per_worker=1)
    Controller(store, KubeRayJobs(settings)).round()
    made = cluster.items[job]
    assert shlex.split(made["spec"]["entrypoint"]) == [
        "python", "-m", "pedro.training.job", "--spec", f"s3://b/storage/jobs/{job}/spec.json",
        "--job-id", job, "--attempt", "1",
    ]  # fmt: skip
    assert workers(made) == (2, {"cpu": "3", "nvidia.com/gpu": "1", "memory": workers(template)[1]["memory"]})
    assert "suspend" not in made["spec"], "the template never runs, and what is made of it does"
    assert "activeDeadlineSeconds" not in made["spec"], "time that pods wait for room is no loss of a driver"
    assert template["spec"]["suspend"] is True
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "tuning"
    assert made["metadata"]["annotations"]["pedro/tenant"] == "acme"
    head, ours = (item["spec"]["rayClusterSpec"]["headGroupSpec"] for item in (template, made))
    assert ours == head, "everything else is the template's"


def test_a_job_without_gpus_asks_for_none_though_the_template_has_one(cluster, settings, store):
    job = queued(store, cpus_per_worker=0.5)
    Controller(store, KubeRayJobs(settings)).round()
    assert workers(cluster.items[job])[1].keys() == {"cpu", "memory"}
    assert workers(cluster.items[job])[1]["cpu"] == "0.5"


def test_a_sweep_becomes_a_rayjob_with_the_workers_of_the_trials_that_run_at_once(cluster, settings, store):
    spec = {"resources": {"workers": 2, "cpus_per_worker": 1}, "sweep": {"workers": 2, "at_once": 3}}
    sweep = store.create_job("acme", "voice", spec, "sweep-1", queued=True).id
    Controller(store, KubeRayJobs(settings, cpus=5)).round()
    words = shlex.split(cluster.items[sweep]["spec"]["entrypoint"])
    assert words[2:] == ["pedro.training.sweep.job", "--sweep", sweep, "--attempt", "1", "--at-once", "2"]
    assert workers(cluster.items[sweep])[0] == 4


def test_all_fine_tunes_together_hold_no_more_than_they_may(cluster, settings, store):
    first, second = queued(store, cpus_per_worker=3), queued(store, cpus_per_worker=2)
    controller = Controller(store, KubeRayJobs(settings, cpus=4))
    controller.round()
    controller.round()
    assert second not in cluster.items
    assert "waits for 2 CPU to be free" in store.get_job(second).message
    for status in (JobStatus.RUNNING, JobStatus.SUCCEEDED):
        store.update_job(first, status=status, attempt=1)
    cluster.set(first, "Complete", "SUCCEEDED")
    controller.round()
    assert second in cluster.items


def test_a_driver_that_is_lost_starts_again_under_another_name_once_the_first_has_ended(cluster, settings, store):
    job, clock = queued(store), [1_000_000.0]
    controller = Controller(store, KubeRayJobs(settings), clock=lambda: clock[0])
    controller.round()
    cluster.set(job, "Running", "RUNNING")
    controller.round()
    cluster.set(job, "Failed", "FAILED")
    controller.round()
    assert store.get_job(job).status == JobStatus.QUEUED
    clock[0] += 60
    controller.round()
    assert shlex.split(cluster.items[f"{job}-2"]["spec"]["entrypoint"])[-1] == "2"


def test_a_stopped_one_frees_its_place_when_its_pods_are_gone_and_not_before(cluster, settings, store):
    job = queued(store, cpus_per_worker=3)
    controller = Controller(store, KubeRayJobs(settings, cpus=4))
    controller.round()
    cluster.set(job, "Running", "RUNNING")
    store.ask_of_job(job, JobStatus.CANCELLED)
    controller.round()
    assert cluster.items[job]["metadata"]["deletionTimestamp"]
    waiting = queued(store, cpus_per_worker=2)
    controller.round()
    assert store.get_job(job).status != JobStatus.CANCELLED
    assert waiting not in cluster.items, "the pods of the first may still run"
    cluster.pods_gone(job)
    controller.round()
    assert store.get_job(job).status == JobStatus.CANCELLED
    controller.round()
    assert waiting in cluster.items


def test_one_that_is_there_already_is_not_made_twice(cluster, settings, store):
    job = store.get_job(queued(store))
    launcher = KubeRayJobs(settings)
    launcher.start(job, job.id)
    before = dict(cluster.items)
    launcher.start(job, job.id)
    launcher.stop("ftjob-unknown")
    assert cluster.items == before


@pytest.mark.parametrize("trouble", ["away", "forbidden"])
def test_while_kubernetes_says_no_all_wait_and_none_is_lost(cluster, settings, store, trouble):
    job = queued(store)
    launcher = KubeRayJobs(settings)
    setattr(cluster, trouble, True)
    with pytest.raises(UnavailableError, match=r"503|role in k8s"):
        Controller(store, launcher).round()
    assert store.get_job(job).status == JobStatus.QUEUED


def test_without_the_template_jobs_wait_and_the_log_says_what_to_do(cluster, settings, store):
    del cluster.items[TEMPLATE]
    job = queued(store)
    with pytest.raises(UnavailableError, match=f"RayJob {TEMPLATE} is not in namespace pedro"):
        Controller(store, KubeRayJobs(settings)).round()
    assert store.get_job(job).status == JobStatus.QUEUED


def test_jobs_that_others_made_are_none_of_ours(cluster, settings, store):
    other = {**cluster.items[TEMPLATE], "metadata": {"name": "theirs", "namespace": "pedro", "labels": {}}}
    cluster.add(other)
    view = KubeRayJobs(settings).look()
    assert not view.states
    assert view.taken["CPU"] == 0


def test_where_no_cluster_is_known_it_says_how_to_name_one(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="set KUBECONFIG"):
        KubeRayJobs(settings)


def test_options_of_the_one_launcher_are_refused_with_the_other(tmp_path):
    env = {"PEDRO_HOME": str(tmp_path), "PEDRO_LAUNCHER": "ray"}
    done = CliRunner().invoke(app, ["controller", "--cpus", "3"], env=env)
    assert done.exit_code != 0
    assert "PEDRO_LAUNCHER=kuberay" in str(done.exception) + done.output
    with pytest.raises(ConfigError, match="PEDRO_LAUNCHER: 'slurm'"):
        Settings.from_env({**env, "PEDRO_LAUNCHER": "slurm"})
