"""What `make integration` types and runs is what the guide and the manifests say; it takes minutes, this does not."""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from integration import guide
from integration.cluster import Namespace
from integration.kubectl import Kubectl
from integration.kuberay import LocalRayCluster
from integration.pods import Known, LocalPod, image_environment
from integration.service import Service
from integration.steps import STEPS
from integration.substitutions import NOBODY_LISTENS, Here, with_ports
from k8s_render import OVERLAYS, ROOT, environment, one, pods, render

from pedro.serving.app import MAX_STARTS, STREAMS_END_S

SECRETS = {
    name: {"password": f"of-{name}"} for name in ("pedro-postgres", "pedro-database", "pedro-driver", "mlflow-database")
}
STORAGE = {"access-key": "pedro", "secret-key": "s", "endpoint": "http://minio:9000"}


@pytest.fixture
def known(tmp_path):
    here = Here(ROOT)
    here.know({"postgres", "mlflow", "minio", "pedro-serve-svc"})
    secrets = {**SECRETS, "pedro-storage": STORAGE, "pedro-seal": {"key": "k"}}
    return Known(tmp_path, here, render("dev"), secrets)


def pod_of(known, where, reach=lambda *_: True):
    (pod,) = (one for one in pods(known.objects) if one.where == where)
    return LocalPod(known, pod, "p", reach)


def test_every_command_of_the_guide_is_typed_by_a_step():
    text = guide.GUIDE.read_text("utf-8")
    typed = {section: len(guide.blocks(section)) for section in ("A laptop", "Fine-tunes", "A new release", "Watching")}
    assert typed == {"A laptop": 4, "Fine-tunes": 1, "A new release": 1, "Watching": 1}
    assert len(guide.BLOCK.findall(text)) == sum(typed.values()) + 1, "the last one checks the manifests themselves"
    assert {step.__name__ for step in STEPS} >= {
        "install",
        "make_keys",
        "forward",
        "first_answer",
        "tune_by_hand",
        "look",
    }


def test_the_guides_keys_open_what_the_guide_does_with_them():
    made = [line.split("pedro keys create ")[1].split() for line in guide.blocks("A laptop")[1].splitlines()]
    assert made == [["acme", "--scope", "infer", "--scope", "train"], ["ops", "--scope", "admin"]]


def test_kubectl_is_played_as_far_as_the_guide_needs_it(tmp_path):
    verbs = set(re.findall(r"kubectl (?:-n pedro )?([a-z-]+)", "".join(guide.BLOCK.findall(guide.GUIDE.read_text()))))
    namespace = Namespace(tmp_path, print)
    try:
        kubectl = Kubectl(namespace)
        assert verbs == {"apply", "create", "wait", "exec", "port-forward", "get", "cp", "delete"}
        secret = ["create", "secret", "generic"]
        kubectl(["-n", "pedro", *secret, "a", "--from-env-file=/dev/stdin"], b"b=c=d\nh=\n", tmp_path)
        kubectl([*secret, "e", "--from-file=f=/dev/stdin"], b"g", tmp_path)
        assert namespace.known.secrets == {"a": {"b": "c=d", "h": ""}, "e": {"f": "g"}}
        for words in (
            ["scale", "deploy/x"],
            ["-n", "other", "wait", "pod/x"],
            ["exec", "deploy/none", "--", "ls"],
            [*secret, "i", "--from-literal=j=k"],
            [*secret, "i", "--from-env-file=secrets"],
        ):
            with pytest.raises(AssertionError):
                kubectl(words, b"", tmp_path)
    finally:
        namespace.close()


def test_a_block_is_typed_into_bash_and_what_fails_there_ends_it(tmp_path):
    asked = []

    def kubectl(words, stdin, cwd):
        asked.append((words, stdin))
        assert words[0] != "wait", "it was not ready"
        return b"said\n"

    with guide.terminal(tmp_path, kubectl) as run:
        assert run(
            'kind create x; echo "$(kubectl get "a b" | cut -c1-2) $KEY 127.0.0.1:8000"', {8000: 9}, KEY="k"
        ) == ("sa k 127.0.0.1:9\n")
        run("echo text | kubectl exec -i x")
        with pytest.raises(AssertionError, match="it was not ready"):
            run("kubectl wait x\nkubectl get y")
    assert asked == [(["get", "a b"], b""), (["exec", "-i", "x"], b"text\n"), (["wait", "x"], b"")]


def test_no_command_of_the_guide_has_a_key_or_a_secret_among_its_arguments(tmp_path):
    seen = []

    def kubectl(words, stdin, _cwd):
        seen.append((words, stdin))
        return b""

    with guide.terminal(tmp_path, kubectl) as run:
        for name, text in (("curl", 'exec kubectl curl "$@"'), ("openssl", 'echo "random-$3"')):
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        run(guide.blocks("A laptop")[0], CPU_WHEELS="https://wheels.example")
        run(guide.blocks("A laptop")[3], KEY="sk-pedro-x")
        run(guide.blocks("Watching")[0], KEY="sk-pedro-x")
    assert not any(secret in word for words, _ in seen for word in words for secret in ("sk-pedro-x", "random-"))
    assert [stdin for _, stdin in seen[-3:]] == [b"Authorization: Bearer sk-pedro-x\n", b"", b"sk-pedro-x"]
    made = {words[5]: stdin for words, stdin in seen if words[2:5] == ["create", "secret", "generic"]}
    assert made.pop("pedro-metrics") == b"sk-pedro-x"
    assert made.pop("pedro-storage") == b"access-key=pedro\nsecret-key=random-24\nendpoint=http://minio:9000\n"
    assert made == {
        **{name: b"password=random-24\n" for name in SECRETS},
        **{name: b"key=random-32\n" for name in ("pedro-seal", "pedro-webhook")},
    }


def test_no_document_puts_a_secret_among_the_arguments_of_kubectl():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "k8s").rglob("*")]
    assert ROOT / "k8s" / "README.md" in documents
    for document in filter(Path.is_file, documents):
        assert "--from-literal" not in document.read_text("utf-8"), f"{document}: give it on standard input"


def test_texts_of_manifests_read_as_they_must_on_this_host(known, tmp_path):
    folder, port = tmp_path / "p", known.here.port("postgres", 5432)
    for theirs, ours in (
        (
            "postgresql+psycopg://mlflow:pw@postgres:5432/mlflow",
            f"postgresql+psycopg://mlflow:pw@127.0.0.1:{port}/mlflow",
        ),
        ("http://other:5432", "http://other:5432"),
        ("cat > /tmp/spec.yaml && cd /tmp && ls", f"cat > {folder}/tmp/spec.yaml && cd {folder}/tmp && ls"),
        ("/srv/tmp/x /tmpfile", "/srv/tmp/x /tmpfile"),
        ("/etc/pedro/database/password", f"{folder}/etc/pedro/database/password"),
        ("/opt/pedro", str(ROOT)),
        ("--host=0.0.0.0", "--host=127.0.0.1"),
        ("s3://pedro/storage", "s3://pedro/storage"),
    ):
        assert known.here.text(theirs, folder, lambda *_: True) == ours
    assert known.here.text("http://mlflow:5000", folder, lambda *_: False) == f"http://{NOBODY_LISTENS}"
    assert with_ports("--port=5000", {5000: 7}) == "--port=7"
    assert with_ports("--address=:9000", {9000: 7}) == "--address=:7"
    assert with_ports("--max=15000", {5000: 7}) == "--max=15000"


def test_a_container_has_the_settings_secrets_files_and_ports_of_its_manifest(known):
    mlflow = pod_of(known, "Deployment/mlflow")
    told = mlflow.environment(mlflow.container)
    database = known.here.port("postgres", 5432)
    assert told["MLFLOW_BACKEND_STORE_URI"] == (
        f"postgresql+psycopg://mlflow:of-mlflow-database@127.0.0.1:{database}/mlflow"
    )
    assert told["MLFLOW_SERVER_ALLOWED_HOSTS"].startswith("mlflow,mlflow:5000"), "as clients call it"
    assert told["HF_HOME"] == f"{mlflow.folder}/var/lib/pedro/huggingface"
    assert mlflow.words(mlflow.container)[:4] == [
        "mlflow", "server", "--host=127.0.0.1", f"--port={known.here.port('mlflow', 5000)}",
    ]  # fmt: skip
    controller = pod_of(known, "Deployment/controller")
    told = controller.environment(controller.container)
    assert "HF_TOKEN" not in told, "there is no such Secret, and it is optional"
    file = controller.folder / "etc/pedro/database/password"
    assert told["PEDRO_DATABASE_PASSWORD_FILE"] == str(file)
    assert file.read_text() == "of-pedro-database"
    del known.secrets["pedro-seal"]
    with pytest.raises(LookupError, match="there is no Secret pedro-seal"):
        pod_of(known, "Deployment/controller")


def test_a_pod_reaches_what_its_network_policies_let_it_reach_and_nothing_else(tmp_path):
    namespace = Namespace(tmp_path, print)
    try:
        namespace.known.objects = render("dev")
        at = {pod.where: pod for pod in pods(namespace.known.objects)}
        assert namespace.reach(at["Job/upgrade"])("postgres", 5432)
        assert not namespace.reach(at["Job/upgrade"])("minio", 9000)
        assert namespace.reach(at["RayService/pedro/engines"])("minio", 9000)
        assert not namespace.reach(at["RayJob/finetune-template/trainers"])("mlflow", 5000)
        assert namespace.reach(at["Deployment/dashboard"])("pedro-serve-svc", 8000)
    finally:
        namespace.close()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_worker_that_is_drained_has_time_for_its_streams_before_it_is_killed(overlay):
    (group,) = one(render(overlay), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    worker = group["template"]["spec"]
    told = environment(worker["containers"][0], render(overlay))
    drain_s = float(told["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert STREAMS_END_S < drain_s < worker["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_tries_to_start_replicas_for_as_long_as_an_upgrade_may_take(overlay):
    """By default it gives an application with one replica up for good after three tries, which takes half a minute."""
    service = one(render(overlay), "RayService")["spec"]["rayClusterConfig"]
    told = environment(service["headGroupSpec"]["template"]["spec"]["containers"][0], render(overlay))
    assert min(int(told["RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT"]), MAX_STARTS) >= 100


def test_the_images_environment_is_that_of_its_dockerfile():
    told = image_environment()
    assert told == {
        "HOME": "/var/lib/pedro",
        "PYTHONPATH": "/opt/pedro",
        "PEDRO_HOME": "/var/lib/pedro",
        "HF_HOME": "/var/lib/pedro/huggingface",
    }


def test_a_ray_cluster_that_has_ended_starts_nothing_more(known, monkeypatch):
    start, failed, started = LocalPod.start, [], threading.Event()

    def asleep(pod, _words=None):
        start(pod, ["sleep", "120"])
        started.set()

    def run():
        try:
            cluster.start()
        except AssertionError as error:
            failed.append(str(error))

    monkeypatch.setattr(LocalPod, "start", asleep)
    spec = one(known.objects, "RayService")["spec"]["rayClusterConfig"]
    cluster = LocalRayCluster(known, "serve", spec, lambda _: lambda *_: True, print)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60)
    finally:
        cluster.end()
    thread.join(60)
    assert failed == [f"RayCluster {cluster.name} has ended"]
    assert cluster.head.ended
    with pytest.raises(AssertionError, match="has ended"):
        cluster.add_worker()
    assert not list(cluster.workers[-1].processes())


def test_a_service_leads_new_connections_to_who_is_ready_and_leaves_the_others_where_they_are():
    def say(peer, word):
        peer.sendall(word + peer.recv(9))

    def answer(server, word):
        while True:
            try:
                peer = server.accept()[0]
            except OSError:
                return
            threading.Thread(target=say, args=(peer, word), daemon=True).start()

    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    for server, word in zip(servers, (b"1", b"2"), strict=True):
        threading.Thread(target=answer, args=(server, word), daemon=True).start()
    ports = [server.getsockname()[1] for server in servers]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    service = Service(port)
    try:
        service.backends = ports[:1]
        old = socket.create_connection(("127.0.0.1", port), 30)
        until = time.monotonic() + 30
        while not service.connected:
            assert time.monotonic() < until, "the connection was not led to a pod"
            time.sleep(0.01)
        service.backends = ports[1:]
        new = socket.create_connection(("127.0.0.1", port), 30)
        for peer, said in ((new, b"2x"), (old, b"1x")):
            peer.sendall(b"x")
            assert peer.recv(9) == said
        service.backends = []
        with socket.create_connection(("127.0.0.1", port), 30) as nobody, suppress(ConnectionResetError):
            assert nobody.recv(1) == b""
        assert service.refused == 1
    finally:
        service.close()
        for server in servers:
            server.close()
