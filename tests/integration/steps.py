"""What `make integration` does, one step after the other. Each raises AssertionError, and says what it saw."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from k8s_render import ROOT, one
from kustomize import rendered
from steady_clients import SteadyClients

from integration import guide
from integration.cluster import Namespace
from integration.kubectl import Kubectl

DEV, BASE = "k8s/overlays/dev", "k8s/base/platform"
DEMO = ROOT / "platform" / "pedro" / "assets" / "demo" / "acme"
BACKBONE = "stories260K"
ROWS, TEST_ROWS = 200, 40
SPEC = {
    "tenant": "acme",
    "adapter": "by-hand",
    "backbone": BACKBONE,
    "data": {"train": "train.jsonl", "validation": 0.1},
    "training": {"max_steps": 4, "batch_size": 8, "lr": 1e-2, "eval_every": 4, "eval_rows": 16},
    "gate": {"max_rows": 16, "min_gain": -1},
    "resources": {"cpus_per_worker": 1},
}
METHOD = {
    "type": "supervised",
    "supervised": {"hyperparameters": {"batch_size": 8, "learning_rate_multiplier": 7}},
    "pedro": {"training": {"max_steps": 4, "bilevel": False}, "gate": {"max_rows": 16, "min_gain": -1}},
}
JOB_S = 600.0
CLIENTS, TOKENS, PAUSE_S = 4, 256, 1.0  # this host has to start the next cluster beside them
DASHBOARD = """
import json, os, sys
sys.path.insert(0, "dashboard")
from streamlit.testing.v1 import AppTest
shown = AppTest.from_file(os.path.abspath("dashboard/app.py"), default_timeout=300).run()
assert not shown.exception, shown.exception
assert [field.label for field in shown.text_input] == ["Key"], shown
shown.text_input[0].set_value(sys.stdin.read())
shown.button[0].click().run()
assert not shown.exception, shown.exception
print(json.dumps([[one.value for one in shown.error], [field.label for field in shown.text_input] != ["Key"]]))
"""


@dataclass
class Walk:
    """What one step leaves for the next."""

    folder: Path
    namespace: Namespace
    kubectl: Kubectl
    run: Callable[..., str]
    log: Callable[[str], None]
    tenant: str = ""  # its key
    operator: str = ""
    model: str = BACKBONE  # what steady clients ask for
    said: list[tuple[str, str]] = field(default_factory=list)
    """What was seen, for the summary."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.kubectl.forwarded[8000]}"

    def client(self) -> openai.OpenAI:
        """The official client, as a tenant has it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.tenant, timeout=300)

    def note(self, what: str, seen: Any) -> None:
        self.said.append((what, str(seen)))
        self.log(f"    {what}: {seen}")


@contextmanager
def walk(folder: Path, log: Callable[[str], None]) -> Iterator[Walk]:
    """A namespace with nothing in it, and a terminal."""
    namespace = Namespace(folder, log)
    kubectl = Kubectl(namespace)
    try:
        with guide.terminal(folder, kubectl) as run:
            yield Walk(folder, namespace, kubectl, run, log)
    finally:
        namespace.close()


def install(walk: Walk) -> None:
    """The guide's first block: Secrets, the overlay, and two waits."""
    began = time.monotonic()
    walk.run(guide.blocks("A laptop")[0], CPU_WHEELS="none")
    walk.note("from nothing to a RayService that is ready", f"{time.monotonic() - began:.0f} s")
    for name, pod in walk.namespace.pods.items():
        if name not in ("postgres", "minio"):  # the images of others
            walk.namespace.wait(f"pod/{name}", "Ready", 300)
            assert not pod.fails("livenessProbe"), pod.fails("livenessProbe")
    walk.note("pods that stay, ready by their own probes", ", ".join(sorted(walk.namespace.pods)))


def make_keys(walk: Walk) -> None:
    """A tenant's and an operator's."""
    walk.tenant, walk.operator = walk.run(guide.blocks("A laptop")[1]).split()
    assert walk.tenant.startswith("sk-pedro-")


def forward(walk: Walk) -> None:
    """The three ways in, and what is behind each."""
    walk.run(guide.blocks("A laptop")[2])
    pages = {8000: "/health", 8501: "/_stcore/health", 5000: "/health"}
    assert walk.kubectl.forwarded.keys() == pages.keys()
    assert {port: walk.kubectl.answers(port, path) for port, path in pages.items()} == dict.fromkeys(pages, 200)


def first_answer(walk: Walk) -> None:
    """The guide's curl, then the official client, whole and as a stream."""
    said = json.loads(walk.run(guide.blocks("A laptop")[3], walk.kubectl.forwarded, KEY=walk.tenant))
    assert said["usage"]["completion_tokens"] == 20, said
    walk.note("the first answer", repr(said["choices"][0]["text"]))
    client = walk.client()
    asked: dict[str, Any] = {"model": BACKBONE, "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    parts = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True) if chunk.choices]
    assert "".join(parts) == whole
    assert [model.id for model in client.models.list()] == [BACKBONE]


def tune_over_http(walk: Walk) -> None:
    """As tenants do: a file, a job, an answer of the adapter."""
    client, began = walk.client(), time.monotonic()
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in map(json.loads, (DEMO / "train.jsonl").read_text("utf-8").splitlines()[:ROWS])
    ]
    content = "\n".join(json.dumps({"messages": messages}) for messages in chats)
    file = client.files.create(file=("train.jsonl", content.encode()), purpose="fine-tune").id
    method: Any = METHOD
    job = client.fine_tuning.jobs.create(
        model=BACKBONE, training_file=file, validation_file=file, suffix="over-http", method=method
    )
    made = _ended(walk, job.id)
    assert made.fine_tuned_model, made
    walk.note("a fine-tune over HTTP", f"{made.fine_tuned_model} after {time.monotonic() - began:.0f} s")
    reply = client.chat.completions.create(
        model="acme.over-http", messages=[{"role": "user", "content": "play some jazz"}], max_tokens=8
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 0
    assert reply.model.startswith("acme.over-http"), reply
    walk.model = "acme.over-http"
    events = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert events[0] == "The job has successfully completed", events


def _ended(walk: Walk, job_id: str) -> Any:
    client, until = walk.client(), time.monotonic() + JOB_S
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < until, f"{job}\n{walk.namespace.state()}"
        time.sleep(1)
    logs = [path.read_text("utf-8")[-3000:] for path in walk.folder.glob("*.job")]
    assert job.status == "succeeded", f"{job.error}\n{logs[-1:]}"
    return job


def tune_by_hand(walk: Walk) -> None:
    """As operators do: files copied into the controller, `pedro submit` there."""
    place = walk.folder / "typed"
    place.mkdir()
    (place / "train.jsonl").write_text(
        "\n".join((DEMO / "train.jsonl").read_text("utf-8").splitlines()[:ROWS]), "utf-8"
    )
    (place / "spec.yaml").write_text(yaml.safe_dump(SPEC), "utf-8")
    said = walk.run(guide.blocks("Fine-tunes")[0], cwd=place)
    job = re.search(r"ftjob-\w+", said)
    assert job is not None, said
    _ended(walk, job[0])
    reply = walk.client().completions.create(model="acme.by-hand", prompt="play", max_tokens=4)
    assert reply.model.startswith("acme.by-hand")


def look(walk: Walk) -> None:
    """The dashboard by both keys, MLflow by its Service's name, and what Prometheus reads."""
    pod = walk.namespace.pods["dashboard"]
    for key, welcome in ((walk.operator, True), (walk.tenant, True), ("sk-pedro-wrong", False)):
        done = pod.run(pod.container, ["python", "-c", DASHBOARD], key.encode())  # where `ps` shows none
        assert done.returncode == 0, done.stderr[-3000:].decode(errors="replace")
        errors, opened = json.loads(done.stdout.splitlines()[-1])
        assert opened is welcome, errors
    port = walk.kubectl.forwarded[5000]
    for host, status in (("mlflow:5000", 200), ("evil.example", 403)):
        reply = httpx.get(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0", headers={"host": host}
        )
        assert reply.status_code == status, f"MLflow answers {host} with {reply.status_code}: {reply.text[:300]}"
    key = walk.run(guide.blocks("Watching")[0].splitlines()[0]).strip()
    walk.run("\n".join(guide.blocks("Watching")[0].splitlines()[1:]), KEY=key)
    given = walk.namespace.known.secrets["pedro-metrics"]["key"]
    scrape = next(yaml.safe_load_all((ROOT / "k8s/components/monitoring/scrape.yaml").read_text("utf-8")))["spec"]
    reply = httpx.get(f"{walk.url}{scrape['metricsPath']}", headers={"authorization": f"Bearer {given}"}, timeout=60)
    assert reply.status_code == 200, reply.text
    assert "pedro_gateway_requests_total" in reply.text
    assert "pedro_steps_total" in reply.text
    assert httpx.get(f"{walk.url}{scrape['metricsPath']}", timeout=60).status_code == 401


@contextmanager
def _steady(walk: Walk) -> Iterator[SteadyClients]:
    """Stock clients that ask all the while, none of which may fail, hear something else, or be cut short."""
    pod = walk.namespace.pods["controller"]
    more = ["pedro", "tenants", "set", "acme", "--requests-per-minute", "1000000", "--tokens-per-day", "100000000"]
    done = pod.run(pod.container, more)
    assert done.returncode == 0, done.stderr
    with SteadyClients(walk.url, walk.tenant, walk.model, CLIENTS, TOKENS, PAUSE_S) as clients:
        clients.go_on(2 * CLIENTS)
        yield clients
        clients.go_on(2 * CLIENTS)
    assert not clients.failures, clients.failures[:3]
    assert not clients.wrong, clients.wrong[:3]
    assert not clients.cut, f"{clients.cut} streams were cut short"


def two_workers(walk: Walk) -> None:
    """A release with another RayCluster, of two workers as `base` has them: the Service turns to it under load."""
    _roll_out(walk, with_two_workers(), "another RayCluster (two workers) under load")


def with_two_workers() -> list[dict[str, Any]]:
    """The overlay of a laptop with the serving cluster of `base`."""
    objects = [obj for obj in rendered(ROOT / DEV) if obj["kind"] != "RayService"]
    return [*objects, one(rendered(ROOT / BASE), "RayService")]


def change_in_place(walk: Walk) -> None:
    """A setting of the server alone: Serve replaces engines and gateways one after the other, under load."""
    objects = list(walk.namespace.known.objects)
    service = json.loads(json.dumps(one(objects, "RayService")))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["applications"][0]["args"]["max_batch"] = 16
    service["spec"]["serveConfigV2"] = yaml.safe_dump(config)
    _roll_out(walk, [service], "a setting of the server, in place, under load")


def _roll_out(walk: Walk, objects: list[dict[str, Any]], what: str) -> None:
    controller = walk.namespace.service
    assert controller is not None
    before, began = controller.replicas(), time.monotonic()
    with _steady(walk) as clients:
        walk.namespace.apply(objects)
        _until(lambda: _all_new(controller.replicas(), before), what, walk)
        took = time.monotonic() - began
    walk.note(what, f"{took:.0f} s, {len(clients.answers)} answers, 0 failed, 0 cut, 0 other")


def _all_new(now: dict[str, set[str]], before: dict[str, set[str]]) -> bool:
    """Whether every replica that runs is one that did not before, and there are some of each kind."""
    return all(now.get(name) and not now[name] & before[name] for name in before)


def drain(walk: Walk) -> None:
    """SIGTERM of a worker while streams run."""
    controller = walk.namespace.service
    assert controller is not None
    assert controller.active is not None
    worker = controller.active.workers[0]
    grace_s = worker.pod.spec["terminationGracePeriodSeconds"]
    with _steady(walk) as clients:
        took, other = controller.replace_worker(worker, grace_s)
        _until(lambda: not other.fails("readinessProbe"), "the other worker is ready", walk)
    assert took < grace_s, f"the worker did not end within its {grace_s} s and was killed"
    walk.note("a drain of one worker", f"ended after {took:.0f} s, {len(clients.answers)} answers, 0 failed, 0 cut")


def new_release(walk: Walk) -> None:
    """The guide's commands, with the overlay of a laptop in place of the other."""
    walk.kubectl.overlays["k8s/overlays/gpu"] = list(walk.namespace.known.objects)
    walk.run(guide.blocks("A new release")[0])
    walk.note("a new release of the same schema", "its Job is complete")


def _until(holds: Callable[[], bool], what: str, walk: Walk, limit_s: float = 600.0) -> None:
    until = time.monotonic() + limit_s
    while not _answers(holds):
        assert time.monotonic() < until, f"{what}: not after {limit_s:g} s\n{walk.namespace.state()}"
        time.sleep(0.5)


def _answers(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except (httpx.HTTPError, KeyError):
        return False


STEPS: tuple[Callable[[Walk], None], ...] = (
    install,
    make_keys,
    forward,
    first_answer,
    tune_over_http,
    tune_by_hand,
    look,
    two_workers,
    change_in_place,
    drain,
    new_release,
)
