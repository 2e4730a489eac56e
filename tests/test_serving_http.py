"""One real deployment on a local Ray head, asked over HTTP as tenants ask: the official client, and raw requests."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest
import torch
from audit_entries import last_audit
from otlp_collector import collector
from ray._private.authentication_test_utils import reset_auth_token_state
from safetensors.torch import load_file, save_file
from serving_adapters import OTHER_BACKBONE, backbone, make_adapter, register, settings_at, tokenizer

from jobs.benchmarks.hot_swap import swap
from pedro import cluster
from pedro.errors import BackboneError, ConfigError, ConflictError, UnavailableError
from pedro.gateway.passed_connections import line_for, shared_key
from pedro.registry import Registry
from pedro.serving.config import ServeConfig
from pedro.serving.deploy import deploy, find
from pedro.store import Store
from pedro.training.queue.process import ControllerKeeper, end_controller

pytestmark = pytest.mark.slow  # the server takes as long to start as all of these take
BACKBONE = "stories260K"
GUARD_S = 300  # against a wait without end; the benchmark `swap` says how soon things are seen
PROMPT = "Once upon a time, there was a little girl"
EVERYWHERE = "::" if cluster.port_is_free(0, "::1") else "0.0.0.0"
OUTSIDE = ("PEDRO_STORAGE", "PEDRO_DATABASE_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(scope="module")
def here():
    """The process as it was: connecting to a cluster sets variables and a global connection."""
    environment = dict(os.environ)
    for name in OUTSIDE:
        os.environ.pop(name, None)
    folder = Path(tempfile.mkdtemp(prefix="pedro-"))
    try:
        yield folder
    finally:
        import ray

        ray.shutdown()
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def traces():
    """What the server sends its spans to."""
    with collector() as collecting:
        yield collecting


@pytest.fixture(scope="module")
def served(here, traces):
    """The server, with acme.faq (1 and 2, the champion), acme.alien of another backbone and globex.faq."""
    settings = settings_at(here / "home")
    registry, store = Registry.open(settings), Store(settings.database_url)
    models = {}

    def add(name, seed, *, promote=True, **options):
        directory = here / f"{name}-{seed}"
        models[name, seed] = make_adapter(directory, seed, **options)
        return register(registry, directory, name, promote=promote)

    add("acme.faq", 1), add("acme.faq", 2), add("globex.faq", 3, shape="completion")
    add("acme.alien", 4, digest=OTHER_BACKBONE)
    os.environ["PEDRO_HTTP_HEADERS_TIMEOUT_S"] = "3"
    os.environ |= {"OTEL_EXPORTER_OTLP_ENDPOINT": traces.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    cluster.prepare_environment(settings)
    reset_auth_token_state()  # Ray reads mode and token once a process, and another test may have met it first
    try:
        running = deploy(settings, ServeConfig(max_batch=16, watch_interval_s=0.3), EVERYWHERE, port=0)
        keys = {name: store.create_key(name, ("infer",))[1] for name in ("acme", "globex")}
        keys["admin"] = store.create_key("ops", ("admin",))[1]
        yield SimpleNamespace(
            url=running.url, settings=settings, registry=registry, store=store, keys=keys, models=models, add=add
        )
    finally:
        cluster.stop_head(settings)
        store.close()


@pytest.fixture(scope="module")
def client(served):
    """The official client of a tenant, made once: each one reads certificates anew."""

    @cache
    def client(tenant="acme"):
        return openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.keys[tenant], max_retries=0, timeout=GUARD_S)

    return client


def http(served, tenant="acme", **headers):
    if tenant is not None:
        headers["authorization"] = f"Bearer {served.keys[tenant]}"
    return httpx.Client(base_url=served.url, headers=headers, timeout=GUARD_S)


def connection(served, host=None):
    """A connection by itself."""
    at = httpx.URL(served.url)
    return socket.create_connection((host or at.host, at.port), timeout=GUARD_S)


def complete(client, model, prompt=PROMPT, **fields):
    return client.completions.create(**{"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 24, **fields})


@torch.no_grad()
def reference(model, prompt=PROMPT, count=24):
    """PEFT's greedy answer to a raw prompt."""
    ids = tokenizer()(prompt).input_ids
    out = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=0)
    whole = tokenizer().decode(out[0], skip_special_tokens=True)
    return whole[len(tokenizer().decode(ids, skip_special_tokens=True)) :]


def engine_stats():
    """Of the one replica."""
    from ray import serve

    return serve.get_deployment_handle("engine", "pedro").stats.remote().result(timeout_s=GUARD_S)


def wait_for(condition, guard_s=GUARD_S):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < guard_s, "it did not happen in time"
        time.sleep(0.1)  # many conditions are a request, and what is waited for wants the cores


def fingerprint(version):
    return f"{version.ref}#{version.digest}"


# the API


def test_probes_need_no_key_and_say_only_yes(served):
    with http(served, None) as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        assert plain.get("/ready").json() == {"status": "ready"}
        assert plain.get("/v1/models").status_code == 401


def test_half_sent_headers_are_closed_by_serves_own_proxy_while_others_are_answered(served):
    with connection(served) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert http(served, None).get("/health").status_code == 200
        assert line.recv(4096).startswith(b"HTTP/1.1 408")


def test_the_server_answers_at_both_kinds_of_addresses_and_knows_who_comes_by_the_kept_port(served):
    """Its proxy, which Ray starts, has the key that `pedro serve` has."""
    hosts = ["127.0.0.1", "::1"] if EVERYWHERE == "::" else ["127.0.0.1"]
    for host in hosts:
        assert httpx.get(f"{cluster.url_of(host, httpx.URL(served.url).port)}/health").status_code == 200
        stranger, forged = (line_for("203.0.113.1", key) for key in (shared_key(), b"guessed"))
        for said, status in ((b"", 200), (stranger, 401), (forged, 400)):
            with connection(served, host) as line:
                line.sendall(said + b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
                assert int(line.recv(4096).split()[1]) == status, "the document is for this machine and for operators"


def test_a_collector_gets_a_request_as_one_trace_of_two_processes_and_is_not_waited_for(client, traces):
    def asked(trace):
        complete(client(), "acme.faq", max_tokens=3, extra_headers={"traceparent": f"00-{trace}-{'1' * 16}-01"})
        return lambda: {span.name: span for span in traces.spans() if span.trace == trace}

    traces.goes_on.clear()
    of_trace = [asked(f"{number:032x}") for number in range(1, 5)]
    assert not any(found() for found in of_trace), "they are answered, and it has not answered yet"
    traces.goes_on.set()
    for found in of_trace:
        wait_for(lambda found=found: len(found()) == 5)
        spans = found()
        request, engine = spans.pop("POST /v1/completions"), spans.pop("engine")
        assert (request.service, request.parent) == ("pedro-gateway", "1" * 16)
        assert (engine.service, engine.parent) == ("pedro-engine", request.id)
        assert {(span.service, span.parent) for span in spans.values()} == {("pedro-engine", engine.id)}


def test_the_client_lists_the_backbone_and_the_tenants_own_champions(client):
    assert [model.id for model in client().models.list()] == [BACKBONE, "acme.faq"]
    assert [model.id for model in client("globex").models.list()] == [BACKBONE, "globex.faq"]
    assert [model.id for model in client("admin").models.list()] == [BACKBONE, "acme.faq", "globex.faq"]
    assert client().models.retrieve("acme.faq").id == "acme.faq"
    assert client().models.retrieve("acme.faq:1").version == 1
    assert client().models.retrieve(BACKBONE).owned_by == "pedro"


@pytest.mark.parametrize(("model", "seed"), [("acme.faq", 2), ("acme.faq@champion", 2), ("acme.faq:1", 1)])
def test_a_completion_is_what_peft_generates_with_that_version(served, client, model, seed):
    answer = complete(client(), model)
    assert answer.choices[0].text == reference(served.models["acme.faq", seed])
    assert answer.system_fingerprint.startswith(f"acme.faq:{seed}#sha256:")
    assert answer.model == model


def test_the_backbone_answers_under_its_own_name(served, client):
    answer = complete(client(), BACKBONE)
    with served.models["acme.faq", 1].disable_adapter():
        assert answer.choices[0].text == reference(served.models["acme.faq", 1])
    assert answer.system_fingerprint == f"{BACKBONE}#{backbone().digest}"


def test_a_chat_is_rendered_as_the_adapter_was_trained_and_streams_the_same_text(client):
    messages = [{"role": "user", "content": "Tell me a story"}]
    fields = {"model": "acme.faq", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = client().chat.completions.create(**fields)
    raw = complete(client(), "acme.faq", prompt="user: Tell me a story\nassistant:", max_tokens=40)
    text = raw.choices[0].text.removeprefix(" ")  # which the tokenizer puts between prompt and answer
    assert whole.choices[0].message.content == text
    chunks = list(client().chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    read_anew = {"prompt_tokens_details"}  # less, where the same prompt was read before
    assert chunks[-1].usage.model_dump(exclude=read_anew) == whole.usage.model_dump(exclude=read_anew)
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_a_response_is_what_the_chat_answers_and_streams_the_same_text(client):
    fields = {"model": "acme.faq", "temperature": 0}
    chat = client().chat.completions.create(messages=[{"role": "user", "content": PROMPT}], max_tokens=12, **fields)
    fields |= {"input": PROMPT, "max_output_tokens": 12}
    whole = client().responses.create(**fields)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.system_fingerprint == chat.system_fingerprint
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    with client().responses.stream(**fields) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == whole.output_text


def test_embeddings_are_of_the_adapter_that_is_named(served, client):
    texts = [PROMPT, "The dog", PROMPT]
    own, bare = (client().embeddings.create(model=name, input=texts) for name in ("acme.faq", BACKBONE))
    ids = [tokenizer()(text).input_ids for text in texts]
    assert own.usage.prompt_tokens == sum(map(len, ids))
    model = served.models["acme.faq", 2]
    with torch.no_grad():
        lens = torch.tensor([len(ids[0])])
        hidden = model(input_ids=torch.tensor([ids[0]]), prompt_lens=lens, output_hidden_states=True).hidden_states[-1]
    wanted = torch.nn.functional.normalize(hidden[0, -1], dim=0)
    made = [torch.tensor(one.embedding) for one in own.data]
    torch.testing.assert_close(made[0], wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(made[2], made[0], atol=1e-4, rtol=0)
    assert (made[1] - made[0]).abs().max() > 0.01
    assert (torch.tensor(bare.data[0].embedding) - made[0]).abs().max() > 0.01


def test_completions_stream_echo_score_and_give_several_choices(client):
    whole = complete(client(), "acme.faq")
    chunks = list(complete(client(), "acme.faq", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    echoed = complete(client(), "acme.faq", echo=True, logprobs=2)
    assert echoed.choices[0].text == PROMPT + whole.choices[0].text
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    two = complete(client(), "acme.faq", n=2, temperature=1.0, seed=5)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text != two.choices[1].text
    several = complete(client(), "acme.faq", prompt=[PROMPT, "One day"], seed=5)
    assert several.choices[0].text == whole.choices[0].text
    stop = whole.choices[0].text[4:7]
    stopped = complete(client(), "acme.faq", stop=stop).choices[0]
    assert (stopped.finish_reason, stop in stopped.text) == ("stop", False)


def test_a_request_id_comes_once_and_a_client_may_choose_it(served):
    body = {"model": "acme.faq", "prompt": "Hi", "max_tokens": 2}
    with http(served) as tenant, http(served, **{"x-request-id": "mine-1"}) as named:
        for request in (body, {**body, "stream": True}, {**body, "model": "acme.none"}, {"nonsense": 1}):
            assert len(tenant.post("/v1/completions", json=request).headers.get_list("x-request-id")) == 1
        assert named.post("/v1/completions", json=body).headers.get_list("x-request-id") == ["mine-1"]
        assert len(named.get("/nowhere").headers.get_list("x-request-id")) == 1


def test_a_prompt_that_is_too_long_is_a_400_that_names_the_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client(), "acme.faq", prompt="word " * 600, max_tokens=7)
    assert "512" in caught.value.message
    assert "max_tokens = 7" in caught.value.message
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client(), "acme.faq", prompt="word " * 100_000)
    assert "500,000 characters" in caught.value.message
    assert complete(client(), "acme.faq", prompt="word " * 100, max_tokens=1).usage.completion_tokens == 1


def test_what_could_only_be_refused_is_refused_before_it_costs_anything(served):
    asked = {
        "/v1/completions": [
            ({"prompt": "x" * 2_000_000}, 413, "bytes"),
            ({"prompt": [5] * 100_000}, 400, "100,000 tokens"),
            ({"prompt": [5] * 512}, 400, "512"),
        ],
        "/v1/chat/completions": [({"messages": [{"role": "user", "content": ""}] * 5000}, 400, "5000")],
    }
    with http(served) as acme:
        for path, cases in asked.items():
            for body, status, named in cases:
                reply = acme.post(path, json={"model": "acme.faq", **body})
                assert reply.status_code == status
                assert named in reply.json()["error"]["message"]


# tenants


@pytest.mark.parametrize("suffix", ["", "@champion", ":1", ":77", "@none"])
def test_a_foreign_name_and_an_unknown_one_get_byte_identical_answers(served, suffix):
    bodies = {}
    with http(served) as acme:
        for name in ("globex.faq", "globex.nix"):
            model = name + suffix
            replies = [
                acme.post("/v1/completions", json={"model": model, "prompt": "Hi"}),
                acme.post("/v1/completions", json={"model": model, "prompt": "Hi", "stream": True}),
                acme.post(
                    "/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": "?"}]}
                ),
                acme.get(f"/v1/models/{model}"),
            ]
            assert [reply.status_code for reply in replies] == [404] * len(replies)
            bodies[name] = [reply.content.replace(name.encode(), b"NAME") for reply in replies]
    assert bodies["globex.faq"] == bodies["globex.nix"]
    assert json.loads(bodies["globex.nix"][0])["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["", "acme", "acme.none", "gpt-4", "../etc/passwd", "stories260k", "acme.faq.x", "*"])
def test_an_unknown_model_is_never_answered_by_the_bare_backbone(served, name):
    with http(served) as acme:
        reply = acme.post("/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 1})
        assert reply.status_code == (404 if name else 400)
        assert "choices" not in reply.json()


def test_tenants_keys_open_no_operator_surface(served):
    with http(served) as acme:
        assert acme.get("/v1/adapters").status_code == 403
        assert acme.post("/v1/adapters/acme.faq/promote", json={"version": 1}).status_code == 403
        assert acme.post("/v1/adapters/globex.faq/rollback").status_code == 403


def test_a_revoked_key_is_refused_as_soon_as_the_gateway_hears_of_it(served):
    record, secret = served.store.create_key("acme", ("infer",))
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {secret}"}) as acme:
        assert acme.get("/v1/models").status_code == 200
        served.store.revoke_key(record.id)
        wait_for(lambda: acme.get("/v1/models").status_code != 200)
        refused = acme.get("/v1/models")
        unknown = acme.get("/v1/models", headers={"authorization": "Bearer sk-pedro-unknown"})
    assert (refused.status_code, refused.content) == (401, unknown.content)


def test_an_adapter_of_another_backbone_is_a_clear_error(client):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client(), "acme.alien")
    assert OTHER_BACKBONE in caught.value.message
    assert backbone().digest in caught.value.message


def test_a_new_version_of_one_tenant_leaves_anothers_answers_unchanged_to_the_bit(served, client):
    def answers():
        asked = [complete(client("globex"), "globex.faq", prompt=p, logprobs=3, max_tokens=16) for p in (PROMPT, "One")]
        sampled = complete(client("globex"), "globex.faq", temperature=1.0, seed=9, logprobs=0)
        return [choice.to_dict() for answer in (*asked, sampled) for choice in answer.choices]

    before = answers()
    version = served.add("acme.new", 7)
    wait_for(lambda: "acme.new" in [model.id for model in client().models.list()])
    assert complete(client(), "acme.new").system_fingerprint == fingerprint(version)
    assert answers() == before


# hot swap


def test_swaps_under_load_fail_nothing_mix_nothing_and_are_seen_by_whoever_asks_next(served, client):
    old, new = served.add("acme.swap", 11), served.add("acme.swap", 12, promote=False)
    wait_for(lambda: "acme.swap" in [model.id for model in client().models.list()])
    slow, quick = swap(
        served.url,
        served.keys["acme"],
        served.keys["admin"],
        "acme.swap",
        [old.version, new.version],
        streams=8,
        phases=((1.0, 3.0), (0.3, 1.5)),
        within_s=0.0,  # there is one gateway, which knows of a move before it says that it is made
    )["phases"]
    for phase in (slow, quick):
        print(phase)
        assert phase["answers"] >= 8
        assert (phase["failed"], phase["mixed"], phase["stale"]) == (0, 0, 0), phase
        assert phase["last_version_wins"], phase


def test_an_operator_promotes_and_rolls_back_over_http(served, client):
    with http(served, "admin") as admin:
        card = admin.post("/v1/adapters/acme.faq/promote", json={"version": 1}).json()
        assert card["aliases"] == {"champion": 1, "previous": 2}
        assert complete(client(), "acme.faq").system_fingerprint.startswith("acme.faq:1#")  # at once where it was asked
        assert admin.post("/v1/adapters/acme.faq/rollback").json()["aliases"] == {"champion": 2, "previous": 1}
        assert complete(client(), "acme.faq").system_fingerprint.startswith("acme.faq:2#")
        assert admin.post("/v1/adapters/acme.none/promote", json={"version": 1}).status_code == 404
        assert admin.post("/v1/adapters/acme.faq/promote", json={"version": 99}).status_code == 404
    entries = last_audit(served.store, "acme", limit=2)
    assert [entry.action for entry in entries] == ["adapter.rollback", "adapter.promote"]
    assert all(entry.actor.startswith("key:ops/key_") and entry.request_id for entry in entries)


def test_an_adapter_deleted_while_it_answers_ends_its_stream_whole_and_is_then_gone(served, client):
    served.add("acme.brief", 13)
    wait_for(lambda: "acme.brief" in [model.id for model in client().models.list()])
    options = {"max_tokens": 300, "extra_body": {"ignore_eos": True}}
    whole = complete(client(), "acme.brief", **options).choices[0].text
    stream = complete(client(), "acme.brief", stream=True, **options)
    text = next(stream).choices[0].text
    served.registry.delete("acme.brief")
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole

    def gone():
        try:
            complete(client(), "acme.brief", max_tokens=1)
        except openai.NotFoundError:
            return True
        return False

    wait_for(gone)


# the server itself


def test_a_client_that_goes_away_frees_its_slot(served):
    body = {"model": "acme.faq", "prompt": "Hi", "max_tokens": 450, "stream": True, "ignore_eos": True}
    with http(served) as acme:
        for _ in range(3):
            with acme.stream("POST", "/v1/completions", json=body) as reply:
                next(reply.iter_raw())
        wait_for(lambda: engine_stats()["running"] == 0)
    stats = engine_stats()
    assert stats["slots_free"] == stats["slots"]


def test_a_file_comes_through_serves_proxy_whole_and_one_that_is_cut_leaves_nothing(served):
    key = served.store.create_key("uploader", ("train",))[1]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=GUARD_S)
    data = os.urandom(8).hex().encode() * 10**6  # 16 MB
    made = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert client.files.content(made.id).read() == data
    scratch = Path(served.settings.storage) / "files" / ".new"
    with connection(served) as line:
        head = (
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 1000000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf of it'
        line.sendall(head.encode() + part.encode())
        wait_for(lambda: any(scratch.iterdir()))
    wait_for(lambda: not any(scratch.iterdir()))
    assert [file.id for file in client.files.list()] == [made.id]
    client.files.delete(made.id)


def test_many_requests_at_once_all_get_their_own_answer(client):
    prompts = [f"There was a {word}" for word in ("cat", "dog", "bird", "girl")]
    models = ["acme.faq", "acme.faq:1", BACKBONE]
    jobs = [(model, prompt) for prompt in prompts for model in models]
    tenant = client()
    alone = {job: complete(tenant, *job).choices[0].text for job in jobs}
    with ThreadPoolExecutor(len(jobs) * 2) as pool:
        together = list(pool.map(lambda job: complete(tenant, *job).choices[0].text, jobs * 2))
    assert together == [alone[job] for job in jobs * 2]


def test_the_engine_tells_prometheus_and_an_operator_where_adapters_are(served, client):
    complete(client(), "acme.faq", max_tokens=2)
    with http(served, "admin") as admin, http(served) as acme:
        (pinned,) = admin.post("/v1/adapters/acme.faq/pin").json()["residence"]
        assert (pinned["version"], pinned["pinned"], pinned["state"]) == (2, True, "ready")
        text = admin.get("/metrics").text
        assert (
            f'pedro_requests_total{{adapter="acme.faq",finish_reason="length",replica="{pinned["replica"]}"}}' in text
        )
        assert f'pedro_adapters_pinned{{replica="{pinned["replica"]}"}} 1.0' in text
        assert acme.get("/metrics").status_code == 403
        assert acme.post("/v1/adapters/acme.faq/unpin").status_code == 403
        (unpinned,) = admin.post("/v1/adapters/acme.faq/unpin").json()["residence"]
        assert not unpinned["pinned"]
        told = acme.post("/tokenize", json={"model": "acme.faq", "prompt": PROMPT}).json()
        assert told["tokens"] == tokenizer()(PROMPT).input_ids


class Traffic:
    """Streams of one tenant, one after the other on each of several threads, until left."""

    def __init__(self, client, model, threads=4):
        self.answers, self.errors = [], []
        self._client, self._model, self._threads = client, model, threads
        self._stop = threading.Event()

    def __enter__(self):
        self._pool = ThreadPoolExecutor(self._threads)
        self._runs = [self._pool.submit(self._run) for _ in range(self._threads)]
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._pool.shutdown()

    def _run(self):
        options = {"stream": True, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
        while not self._stop.is_set():
            try:
                chunks = list(complete(self._client, self._model, **options))
                self.answers.append("".join(chunk.choices[0].text for chunk in chunks))
                assert chunks[-1].choices[0].finish_reason == "length"
            except Exception as error:  # noqa: BLE001 - counted, whatever it is
                self.errors.append(error)
            self._stop.wait(0.1)  # a replica that starts wants the cores, too


def test_replicas_come_and_go_and_die_while_a_hot_adapter_streams_and_no_client_notices(served, client):
    def scale(replicas):
        config = ServeConfig(max_batch=16, watch_interval_s=0.3, replicas=replicas)
        serve.run(build_app(config.model_dump()), name="pedro", route_prefix="/", blocking=False)

    def served_by(admin):
        """The replicas that answered with the hot adapter so far, and how many tokens each gave."""
        lines = [line for line in admin.get("/metrics").text.splitlines() if "pedro_completion_tokens_total{" in line]
        return {line.partition('replica="')[2].partition('"')[0]: line for line in lines if "acme.faq" in line}

    from ray import serve

    from pedro.serving.app import build_app

    with http(served, "admin") as admin, Traffic(client(), "acme.faq") as traffic:

        def wait_for_answers():
            so_far = len(traffic.answers)
            wait_for(lambda: len(traffic.answers) > so_far + 8)

        wait_for_answers()
        first = served_by(admin).keys()
        scale(2)
        wait_for(lambda: len(served_by(admin)) == 2 and not served_by(admin).keys() & first)
        second = served_by(admin).keys()
        kill_replica(served)
        wait_for(lambda: len(served_by(admin)) == 2 and served_by(admin).keys() != second)
        scale(1)
        wait_for(lambda: len(served_by(admin)) == 1)
        wait_for_answers()
    assert not traffic.errors
    other = next((answer for answer in traffic.answers if answer != traffic.answers[0]), None)
    assert other is None, f"whoever answered, and whoever took over:\n{traffic.answers[0]}\n{other}"


def test_a_replica_killed_mid_answer_is_replaced_and_the_client_sees_no_seam(served, client):
    options = {"max_tokens": 400, "extra_body": {"ignore_eos": True}, "temperature": 1.0, "seed": 4, "echo": True}
    whole = complete(client(), "acme.faq:1", **options)
    chunks = complete(client(), "acme.faq:1", stream=True, **options)
    received = [next(chunks)]
    kill_replica(served)
    received += chunks
    assert "".join(chunk.choices[0].text for chunk in received) == whole.choices[0].text
    assert {chunk.system_fingerprint for chunk in received} == {whole.system_fingerprint}
    assert received[-1].choices[0].finish_reason == "length"
    assert complete(client(), "acme.faq").choices[0].text == reference(served.models["acme.faq", 2])


def test_a_batch_answers_each_row_once_though_a_replica_and_then_the_gateway_are_killed(served):
    key = served.store.create_key("acme", ("infer", "train"))[1]
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=GUARD_S)
    bodies = {
        f"row{number}": {
            "model": "acme.faq",
            "prompt": f"{PROMPT} of {number}",
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
        }
        for number in range(100)
    }
    rows = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body} for name, body in bodies.items()
    ]
    data = "\n".join(map(json.dumps, rows)).encode()
    file = client.files.create(file=("rows.jsonl", data), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

    def now():
        return served.store.get_batch(made.id, "acme")

    wait_for(lambda: now().completed >= 5)
    kill_replica(served)
    at_first = now().completed
    wait_for(lambda: now().completed > at_first)
    kill_replica(served, "gateway")
    assert now().completed < len(rows), "it was all over before"
    wait_for(lambda: now().status.final)
    assert (now().status, now().completed, now().failed) == ("completed", len(rows), 0)
    wait_for(lambda: httpx.get(f"{served.url}/ready").status_code == 200)
    answers = [json.loads(line) for line in client.files.content(now().output_file_id).text.splitlines()]
    assert [answer["custom_id"] for answer in answers] == list(bodies)
    for answer in answers[::20]:
        asked = bodies[answer["custom_id"]]
        direct = client.post("/completions", body=asked, cast_to=object)
        assert answer["response"]["body"]["choices"] == direct["choices"]


RATED = ("train_reward_accuracy", "train_reward_margin", "valid_reward_accuracy", "valid_reward_margin")


class Learner:
    """A tenant with a file, a batch and a fine-tuning job of its own, all by the official client."""

    def __init__(self, served, tenant, kind):
        key = served.store.create_key(tenant, ("infer", "train"))[1]
        self.client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=GUARD_S)
        self.kind, self.model = kind, f"{tenant}.own"
        self.asked, good, bad = (
            [{"role": role, "content": text}]
            for role, text in (("user", "Is it?"), ("assistant", "yes"), ("assistant", "no"))
        )
        row = {"input": {"messages": self.asked}, "preferred_output": good, "non_preferred_output": bad}
        self.file = self.upload([row if kind == "dpo" else {"messages": self.asked + good}] * 24, "fine-tune")
        body = {"model": BACKBONE, "prompt": PROMPT, "max_tokens": 2}
        rows = self.upload([{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}], "batch")
        batches = self.client.batches
        self.batch = batches.create(input_file_id=rows, endpoint="/v1/completions", completion_window="24h").id
        method = {
            "type": kind,
            kind: {"hyperparameters": {"batch_size": 4, "learning_rate_multiplier": 7}},
            "pedro": {"training": {"max_steps": 8, "bilevel": False}, "gate": {"min_gain": -1}},
        }
        jobs = self.client.fine_tuning.jobs
        self.job = jobs.create(
            model=BACKBONE, training_file=self.file, validation_file=self.file, suffix="own", method=method
        ).id

    def upload(self, rows, purpose):
        data = "\n".join(map(json.dumps, rows)).encode()
        return self.client.files.create(file=("rows.jsonl", data), purpose=purpose).id

    def learn(self):
        """Follow the job to its end and ask what it made; the lines of its result file."""
        jobs, chats = self.client.fine_tuning.jobs, self.client.chat.completions
        wait_for(lambda: jobs.retrieve(self.job).status not in ("validating_files", "queued", "running"))
        done = jobs.retrieve(self.job)
        told = [event.message for event in jobs.list_events(self.job, limit=100)]
        assert done.status == "succeeded", [done.error, told]
        assert (done.method.type, done.fine_tuned_model.partition(":")[0]) == (self.kind, self.model)
        assert (told[0], told[-1]) == ("The job has successfully completed", f"Created fine-tuning job: {self.job}")
        models = {checkpoint.fine_tuned_model_checkpoint for checkpoint in jobs.checkpoints.list(self.job)}
        assert done.fine_tuned_model in models
        for model in (self.model, *models):
            answer = chats.create(model=model, messages=self.asked, max_tokens=2, temperature=0)
            assert answer.system_fingerprint.startswith(model if ":" in model else done.fine_tuned_model)
        wait_for(lambda: self.client.batches.retrieve(self.batch).status == "completed")
        return [line.split(",") for line in self.client.files.content(done.result_files[0]).text.split()]

    def is_apart_from(self, other):
        """No list has anything of the other's, and its ids are answered like those of nothing."""
        files, jobs, batches, models = self.everything()
        listed, theirs = ({one.id for each in who.everything() for one in each.list()} for who in (self, other))
        assert {self.file, self.job, self.batch} <= listed
        assert listed & theirs == {BACKBONE}
        for asks, known, unknown in (
            ((files.retrieve, files.content, files.delete), other.file, "file-" + "0" * 24),
            ((jobs.retrieve, jobs.list_events, jobs.checkpoints.list), other.job, "ftjob-" + "0" * 24),
            ((jobs.cancel, jobs.pause, jobs.resume), other.job, "ftjob-" + "0" * 24),
            ((batches.retrieve, batches.cancel), other.batch, "batch_" + "0" * 24),
            ((models.retrieve, models.delete), f"{other.model}:1", f"{other.model}-none:1"),
        ):
            for ask in asks:
                said = []
                for name in (known, unknown):
                    with pytest.raises(openai.NotFoundError) as refused:
                        ask(name)
                    said.append(refused.value.response.text.replace(name, "NAME"))
                assert said[0] == said[1]

    def everything(self):
        return self.client.files, self.client.fine_tuning.jobs, self.client.batches, self.client.models


def test_two_tenants_fine_tune_at_once_and_neither_sees_what_is_the_others(served):
    acme, globex = Learner(served, "acme", "supervised"), Learner(served, "globex", "dpo")
    acme.is_apart_from(globex), globex.is_apart_from(acme)
    ControllerKeeper(served.settings).ensure()
    try:
        with ThreadPoolExecutor(2) as pool:
            answers, preferences = pool.map(Learner.learn, (acme, globex))
    finally:
        end_controller(served.settings)
    acme.is_apart_from(globex), globex.is_apart_from(acme)
    columns = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert (answers[0], preferences[0]) == (columns, [*columns, *RATED])
    for _, row in (answers, preferences):
        assert row[0] == "8"
        assert min(float(row[1]), float(row[3])) > 0  # the losses


def kill_replica(served, of="engine"):
    """kill -9 of the engine's process, or the gateway's."""
    home = str(served.settings.home)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"ServeReplica:pedro:{of}" in " ".join(process.cmdline()) and process.environ()["PEDRO_HOME"] == home:
                process.kill()
                return
    raise AssertionError(f"no replica of the {of} found")


def test_serving_twice_from_one_home_is_refused_and_disturbs_nothing(served, client):
    with pytest.raises(ConflictError, match=re.escape(served.url)):
        deploy(served.settings, ServeConfig(), port=0)
    assert complete(client(), "acme.faq", max_tokens=1)
    assert find(served.settings).url == served.url


def test_a_limit_of_connections_that_is_no_number_is_told_and_nothing_is_started(here, monkeypatch):
    monkeypatch.setenv("PEDRO_HTTP_CONNECTIONS_PER_CLIENT", "many")
    with pytest.raises(ConfigError, match="PEDRO_HTTP_CONNECTIONS_PER_CLIENT"):
        deploy(settings_at(here / "numbers"), ServeConfig(), port=0)
    assert cluster.find_head(settings_at(here / "numbers")) is None


def test_a_port_in_use_is_told_and_nothing_is_started(here):
    settings = settings_at(here / "second")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"{port}.*--port"):
            deploy(settings, ServeConfig(), port=port)
    with pytest.raises(ConfigError, match=r"host: '203\.0\.113\.1' is no address of this machine"):
        deploy(settings, ServeConfig(), "203.0.113.1", port=0)
    with pytest.raises(BackboneError, match="nothere"):
        deploy(settings, ServeConfig(backbone="nothere"), port=0)
    with pytest.raises(ConfigError, match="device: 'cuda:99' cannot be used"):
        deploy(settings, ServeConfig(device="cuda:99"), port=0)
    broken = shutil.copytree(backbone().directory, here / "broken")
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BackboneError, match="tokenizer"):
        deploy(settings, ServeConfig(backbone=str(broken)), port=0)
    assert cluster.find_head(settings) is None
    assert sorted(path.name for path in settings.home.iterdir()) == ["mlflow.db"]


def test_what_only_a_replica_can_find_wrong_is_told_in_its_own_line(tmp_path):
    broken = shutil.copytree(backbone().directory, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    environment = {name: value for name, value in os.environ.items() if name not in OUTSIDE}
    environment |= {"PEDRO_HOME": tempfile.mkdtemp(prefix="pedro-")}
    environment |= {"RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"}  # Serve's default is to try three times

    def pedro(*words):
        command = [sys.executable, "-m", "pedro.cli", *words]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)

    try:
        failed = pedro("serve", "--backbone", "./broken", "--port", "0")
    finally:
        pedro("down")
        shutil.rmtree(environment["PEDRO_HOME"], ignore_errors=True)
    error = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1
    assert error.startswith(f"error: backbone: '{broken}' contains numbers in model.norm.weight that are not finite")
