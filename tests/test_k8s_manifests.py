"""The manifests of every overlay, rendered as kubectl renders them and checked offline."""

from __future__ import annotations

import functools
import gzip
import importlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from k8s_render import OVERLAYS, ROOT, environment, matches, one, pods, render, settings_of
from typer.testing import CliRunner

import pedro
from pedro.cli import app
from pedro.cluster import LEAN_HEAD
from pedro.config import NOT_FOR_WORKERS, Settings
from pedro.gateway.connections import ConnectionLimits
from pedro.serving.config import ServeConfig
from pedro.spec_reader import validate_spec
from pedro.training.queue.kuberay import TEMPLATE

SCHEMAS = Path(__file__).parent / "fixtures" / "kuberay" / "schemas.json.gz"
PLATFORM_IMAGE = f"pedro-platform:{pedro.__version__}"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|CREDENTIAL")
URL_PASSWORD = re.compile(r"://[^/@:\s]+:(?!\$\()[^@/\s]+@")
PINNED = re.compile(r"(:[\w.-]*\d+\.\d+[\w.-]*|:RELEASE\.[\w-]+|@sha256:[0-9a-f]{64})$")
OTHERS_READ = re.compile(r"^(AWS|POSTGRES|MINIO|HF|RAY)_[A-Z_]+$|^PGDATA$|^HOME$")
DASHBOARD_READS = {"PEDRO_DASHBOARD_REQUIRE_KEY", "PEDRO_GATEWAY_URL"}


@functools.cache
def ray_schemas() -> dict[str, Any]:
    return json.loads(gzip.decompress(SCHEMAS.read_bytes()))


def problems(obj: dict[str, Any]) -> list[str]:
    """What KubeRay's schema, with unknown fields refused, says about a ray.io object."""
    validator = jsonschema.Draft202012Validator(ray_schemas()[obj["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(obj)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_and_has_no_unknown_field(overlay):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kinds = set()
    for obj in render(overlay):
        kinds.add(obj["kind"])
        if obj["apiVersion"].startswith("ray.io/"):
            assert problems(obj) == []
        else:
            kubernetes_validate.validate(obj, kubernetes_validate.latest_version(), strict=True)
    assert kinds & {"RayService", "RayJob"}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_the_schema_knows_every_kind_of_ray(kind):
    assert ray_schemas()[kind]["properties"]["spec"]["additionalProperties"] is False


def test_a_misspelt_field_of_a_ray_object_is_refused():
    service = one(render("dev"), "RayService")
    service["spec"]["rayClusterSpec"] = service["spec"].pop("rayClusterConfig")
    assert any("rayClusterSpec" in problem for problem in problems(service))
    job = one(render("dev"), "RayJob")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    assert any("imagePullPolice" in problem for problem in problems(job))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_in_the_namespace_and_says_that_it_is_part_of_pedro(overlay):
    for obj in render(overlay):
        assert obj["metadata"]["labels"]["app.kubernetes.io/part-of"] == "pedro"
        if obj["kind"] != "Namespace":
            assert obj["metadata"]["namespace"] == "pedro", obj["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_is_pinned_and_ours_carries_the_version_of_the_package(overlay):
    for pod in pods(render(overlay)):
        for container in pod.containers:
            image = container["image"]
            assert PINNED.search(image), f"{pod.where}: {image}"
            if image.startswith("pedro-platform"):
                assert image == PLATFORM_IMAGE


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_unprivileged_and_writes_only_where_it_may(overlay):
    for pod in pods(render(overlay)):
        assert pod.spec["securityContext"]["runAsNonRoot"] is True, pod.where
        assert pod.spec["securityContext"]["runAsUser"] >= 999, pod.where
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        assert pod.spec["automountServiceAccountToken"] is (pod.where == "Deployment/controller"), pod.where
        assert pod.spec["enableServiceLinks"] is False, f"{pod.where}: Service variables would reach MLflow's CLI"
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, pod.where
            assert context["readOnlyRootFilesystem"] is True, pod.where
            assert context["capabilities"] == {"drop": ["ALL"]}, pod.where
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts <= volumes | {"data"}, f"{pod.where}: {mounts - volumes} is no volume of the pod"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_has_resources_and_every_one_that_stays_has_probes(overlay):
    for pod in pods(render(overlay)):
        for container in pod.containers:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), pod.where
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), pod.where
        for container in pod.spec["containers"]:
            names = {port["name"] for port in container.get("ports", [])}
            for probe in ("readinessProbe", "livenessProbe"):
                assert pod.ends or probe in container, f"{pod.where}: no {probe}"
                target = container.get(probe, {}).get("httpGet", {}).get("port")
                assert not isinstance(target, str) or target in names, f"{pod.where}: {probe} of port {target}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_value_is_in_the_manifests(overlay):
    objects = render(overlay)
    assert not [obj for obj in objects if obj["kind"] == "Secret"]
    for text in yaml.safe_dump_all(objects).splitlines():
        assert not URL_PASSWORD.search(text), text
    for pod in pods(objects):
        for container in pod.containers:
            for entry in container.get("env", []):
                assert not (SECRET_NAME.search(entry["name"]) and "value" in entry), f"{pod.where}: {entry['name']}"


@pytest.mark.parametrize("platform", OVERLAYS)
def test_every_secret_that_is_referred_to_is_one_that_the_readme_creates(platform):
    readme = (ROOT / "k8s" / "README.md").read_text("utf-8")
    for pod in pods(render(platform)):
        named = [volume["secret"]["secretName"] for volume in pod.spec.get("volumes", []) if "secret" in volume]
        for container in pod.containers:
            for entry in container.get("env", []):
                secret = entry.get("valueFrom", {}).get("secretKeyRef")
                if secret:
                    named.append(secret["name"])
                    assert re.search(rf"generic {secret['name']} --from-env-file[^`]*?\b{secret['key']}=", readme), (
                        secret
                    )
        for name in named:
            assert f"secret generic {name} " in readme


@pytest.mark.parametrize("platform", OVERLAYS)
def test_each_secret_is_read_by_those_who_need_it_alone(platform):
    readers: dict[str, set[str]] = {}
    for pod in pods(render(platform)):
        for volume in pod.spec.get("volumes", []):
            if "secret" in volume:
                readers.setdefault(volume["secret"]["secretName"], set()).add(pod.where)
        for container in pod.containers:
            for entry in container.get("env", []):
                if secret := entry.get("valueFrom", {}).get("secretKeyRef"):
                    readers.setdefault(secret["name"], set()).add(pod.where)
    assert readers["pedro-postgres"] == {"StatefulSet/postgres"}, "the superuser's"
    assert readers["mlflow-database"] == {"StatefulSet/postgres", "Deployment/mlflow"}
    assert readers["pedro-driver"] == {"StatefulSet/postgres", "RayJob/finetune-template/head"}
    assert "RayJob/finetune-template/head" not in readers["pedro-database"], "it has a role of its own"
    trainers = {name for name, where in readers.items() if "RayJob/finetune-template/trainers" in where}
    assert trainers == {"pedro-storage", "pedro-hub"}, "what workers need: data and checkpoints, and gated backbones"
    assert "Deployment/mlflow" not in readers["pedro-database"] | readers["pedro-seal"]
    assert not any("RayService" in where or "dashboard" in where for where in readers["pedro-seal"])


@pytest.mark.parametrize("platform", OVERLAYS)
def test_the_controller_alone_talks_to_kubernetes_and_may_do_what_it_does_and_no_more(platform):
    objects = render(platform)
    role, binding = one(objects, "Role"), one(objects, "RoleBinding")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "list", "create", "delete"]}
    ]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "controller", "namespace": "pedro"}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert {pod.where for pod in pods(objects) if pod.spec["serviceAccountName"] == "controller"} == {
        "Deployment/controller"
    }
    assert not [obj for obj in objects if obj["kind"] in ("ClusterRole", "ClusterRoleBinding")]


@pytest.mark.parametrize("platform", OVERLAYS)
def test_every_scratch_volume_is_bounded(platform):
    for pod in pods(render(platform)):
        for volume in pod.spec.get("volumes", []):
            assert "emptyDir" not in volume or volume["emptyDir"].get("sizeLimit"), f"{pod.where}: {volume['name']}"


@pytest.mark.parametrize("platform", OVERLAYS)
def test_no_password_of_the_platforms_database_is_in_an_environment(platform):
    for pod in pods(render(platform)):
        for container in pod.containers:
            for entry in container.get("env", []):
                secret = entry.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
                assert pod.where == "StatefulSet/postgres" or secret not in ("pedro-database", "pedro-driver"), (
                    pod.where
                )


@pytest.mark.parametrize("platform", OVERLAYS)
def test_workers_of_fine_tunes_are_told_where_files_are_and_nothing_that_opens_the_platform(platform):
    objects = render(platform)
    (worker,) = (pod for pod in pods(objects) if pod.where == "RayJob/finetune-template/trainers")
    variables = environment(worker.spec["containers"][0], objects)
    assert not variables.keys() & {*NOT_FOR_WORKERS}
    (head,) = (pod for pod in pods(objects) if pod.where == "RayJob/finetune-template/head")
    drivers = settings_of(head.spec["containers"][0], objects)
    told = {name: value for name, value in drivers.env_of_workers().items() if value}
    assert told.items() <= variables.items(), "what the driver tells them is what their pod has"


@pytest.mark.parametrize("platform", OVERLAYS)
def test_every_variable_is_one_that_somebody_reads(platform):
    read: set[str] = set()

    class Recorder(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    Settings.from_env(Recorder({"PEDRO_DATABASE_URL": "postgresql://pedro@postgres/pedro"}))
    ConnectionLimits.from_env(Recorder())
    objects = render(platform)
    script = one(objects, "ConfigMap", "postgres-init")["data"]["databases.sh"]
    for pod in pods(objects):
        known = read | (DASHBOARD_READS if pod.where == "Deployment/dashboard" else set())
        for container in pod.containers:
            variables = environment(container, objects)
            used = " ".join([*variables.values(), script if pod.where == "StatefulSet/postgres" else ""])
            unknown = {
                name
                for name in variables
                if name not in known
                and not OTHERS_READ.match(name)
                and not name.startswith("MLFLOW_")
                and f"$({name})" not in used
                and f"${name}" not in used
            }
            assert not unknown, f"{pod.where}: nothing reads {sorted(unknown)}"


@pytest.mark.parametrize("platform", OVERLAYS)
def test_ray_pods_get_settings_that_work_across_hosts(platform):
    objects = render(platform)
    ray_pods = [pod for pod in pods(objects) if "ray.io/node-type" in pod.labels]
    assert len(ray_pods) == 4
    for pod in ray_pods:
        settings = settings_of(pod.spec["containers"][0], objects)
        if pod.where == "RayJob/finetune-template/trainers":  # it knows no database and no MLflow
            assert "://" in settings.storage
        else:
            assert settings.single_host() == [], pod.where
        mounts = [mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"]]
        assert str(settings.home) in mounts, f"{pod.where}: PEDRO_HOME is not writable"


@pytest.mark.parametrize("platform", OVERLAYS)
def test_serve_is_set_up_as_on_a_local_head_by_variables_that_it_knows(platform):
    objects = render(platform)
    known = (Path(find_spec("ray").origin).parent / "serve" / "_private" / "constants.py").read_text()
    serve = {name: value for name, value in LEAN_HEAD.items() if name.startswith("RAY_SERVE_")}
    assert [name for name in serve if f'"{name}"' not in known] == []
    nodes = [pod for pod in pods(objects) if pod.where.startswith("RayService/")]
    assert len(nodes) == 2
    for pod in nodes:
        variables = environment(pod.containers[0], objects)
        assert serve.items() <= variables.items(), pod.where


@pytest.mark.parametrize("platform", OVERLAYS)
def test_every_service_selects_a_pod_that_has_its_port(platform):
    objects = render(platform)
    for service in (obj for obj in objects if obj["kind"] == "Service"):
        chosen = [pod for pod in pods(objects) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert chosen, service["metadata"]["name"]
        for pod in chosen:
            names = {port["name"] for container in pod.containers for port in container.get("ports", [])}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


@pytest.mark.parametrize("platform", OVERLAYS)
def test_workloads_select_their_own_pods_and_budgets_guard_pods_that_exist(platform):
    objects = render(platform)
    for obj in objects:
        if obj["kind"] in ("Deployment", "StatefulSet"):
            assert matches(obj["spec"]["selector"], obj["spec"]["template"]["metadata"]["labels"])
    budgets = [obj for obj in objects if obj["kind"] == "PodDisruptionBudget"]
    assert {budget["metadata"]["name"] for budget in budgets} == {"engines", "postgres"}
    for budget in budgets:
        guarded = [pod for pod in pods(objects) if matches(budget["spec"]["selector"], pod.labels)]
        if any("ray.io/node-type" in pod.labels for pod in guarded):  # they have no scale subresource
            assert isinstance(budget["spec"]["minAvailable"], int), budget["metadata"]["name"]
            assert "maxUnavailable" not in budget["spec"]
            group = one(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
            assert budget["spec"]["minAvailable"] < group["replicas"], "a node could never be drained"
        assert any(matches(budget["spec"]["selector"], pod.labels) for pod in pods(objects)), budget["metadata"]["name"]


@pytest.mark.parametrize("platform", OVERLAYS)
def test_fine_tunes_are_made_from_a_job_that_never_runs_by_the_controller_of_the_same_image(platform):
    objects = render(platform)
    template = one(objects, "RayJob", TEMPLATE)
    assert template["spec"]["suspend"] is True
    assert template["spec"]["shutdownAfterJobFinishes"] is True, "or Kueue takes none"
    controller = one(objects, "Deployment", "controller")["spec"]["template"]["spec"]
    (container,) = controller["containers"]
    assert container["command"] == ["pedro", "controller"]
    assert CliRunner().invoke(app, [*container["command"][1:], "--help"]).exit_code == 0
    settings = settings_of(container, objects)
    assert settings.launcher == "kuberay"
    (head,) = (pod for pod in pods([template]) if pod.labels.get("ray.io/node-type") == "head")
    theirs = settings_of(head.spec["containers"][0], objects)
    assert (theirs.storage, theirs.tracking_uri) == (settings.storage, settings.tracking_uri)
    (upgrade,) = one(objects, "Job", "upgrade")["spec"]["template"]["spec"]["containers"]
    role = next(word for word in upgrade["command"] if word.startswith("--driver-role=")).partition("=")[2]
    assert theirs.database_url == settings.database_url.replace("//pedro:", f"//{role}:")
    mounted = {mount["name"]: mount["mountPath"] for mount in head.spec["containers"][0]["volumeMounts"]}
    assert str(settings.own_seal_file).startswith(f"{mounted['seal']}/")
    beat = Settings.from_env({"PEDRO_HOME": str(settings.home)}).home / "ray" / "controller.pid"
    assert str(beat) in container["livenessProbe"]["exec"]["command"][-1]


@pytest.mark.parametrize("platform", OVERLAYS)
def test_ray_clusters_ask_for_a_token_and_name_the_pinned_version(platform):
    pin = re.search(r"^ray(?:\[[^\]]*\])?==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pin, "constraints.txt pins no ray"
    for kind, field in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        cluster = one(render(platform), kind)["spec"][field]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == pin[1]


@pytest.mark.parametrize("platform", OVERLAYS)
def test_the_serve_config_is_one_that_serve_and_pedro_accept_and_its_engines_fit_the_workers(platform):
    schema = pytest.importorskip("ray.serve.schema")
    service = one(render(platform), "RayService")["spec"]
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    wanted = validate_spec(application.args, ServeConfig)
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert wanted.replicas == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert 0 < wanted.num_cpus <= int(limits["cpu"])
    assert wanted.replicas == 1 or 2 * wanted.num_cpus > int(limits["cpu"]), "one engine a worker"
    assert service["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert wanted.gateway_num_cpus > 0, "or one may land on the head"
    assert wanted.num_cpus + wanted.gateway_num_cpus * wanted.gateways / wanted.replicas <= int(limits["cpu"])
    assert wanted.num_gpus == int(limits.get("nvidia.com/gpu", 0))
    assert (wanted.device == "cuda") == (wanted.num_gpus > 0)


@pytest.mark.parametrize("platform", OVERLAYS)
def test_schemas_are_upgraded_by_commands_that_there_are_with_the_settings_of_the_pods_that_need_them(platform):
    objects = render(platform)
    (container,) = one(objects, "Job", "upgrade")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["pedro", "db", "upgrade", "--driver-role=pedro_driver"]
    assert CliRunner().invoke(app, [*container["command"][1:], "--help"]).exit_code == 0
    ours = settings_of(container, objects)
    assert ours.database_url == "postgresql+psycopg://pedro:%3Csecret%3E@postgres:5432/pedro"
    serving = [pod for pod in pods(objects) if pod.where.startswith("RayService/")]
    assert {settings_of(pod.spec["containers"][0], objects).database_url for pod in serving} == {ours.database_url}
    mlflow = one(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]
    (first,), (server,) = mlflow["initContainers"], mlflow["containers"]
    assert first["command"] == ["mlflow", "db", "upgrade", "$(MLFLOW_BACKEND_STORE_URI)"]
    stores = {environment(container, objects)["MLFLOW_BACKEND_STORE_URI"] for container in (first, server)}
    assert len(stores) == 1


def test_mlflow_accepts_its_command_line():
    cli = pytest.importorskip("mlflow.cli")
    variables = pytest.importorskip("mlflow.environment_variables")
    objects = render("dev")
    (container,) = one(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    context = cli.server.make_context("server", list(container["args"]), resilient_parsing=False)
    assert context.params["artifacts_destination"] == "s3://pedro/mlflow"
    options = {option.envvar for option in cli.server.params}
    for name in environment(container, objects):
        if name.startswith("MLFLOW_"):
            assert name in options or hasattr(variables, name), f"MLflow reads no {name}"


def test_the_image_is_pinned_runs_as_the_user_of_the_manifests_and_installs_the_pinned_versions():
    lines = (ROOT / "Dockerfile").read_text("utf-8")
    assert PINNED.search(re.search(r"^FROM (\S+)", lines, re.MULTILINE)[1])
    users = {
        pod.spec["securityContext"]["runAsUser"]
        for pod in pods(render("gpu"))
        if any(container["image"] == PLATFORM_IMAGE for container in pod.containers)
    }
    assert users == {int(re.search(r"^USER (\d+)", lines, re.MULTILINE)[1])}
    assert "-c constraints.txt '.[all]'" in lines
