"""The official openai client uploads, lists, reads and deletes files; what goes wrong on the way leaves nothing."""

from __future__ import annotations

import io
import os
import socket
import time
import zlib
from pathlib import Path

import openai
import pytest
from audit_entries import last_audit
from gateway_server import Gateway, serve
from openai.types import FileObject
from store_moves import fill

from pedro.gateway.app import GatewaySettings

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
LIMIT = 3 * 2**20


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    settings = GatewaySettings(max_file_bytes=LIMIT, max_tenant_file_bytes=8 * 2**20, max_open_uploads=2)
    with serve(tmp_path_factory.mktemp("gateway"), settings=settings) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway, request):
    """A tenant of the test's own."""
    return gateway.client(gateway.key(tenant_of(request), ("train",)))


@pytest.fixture
def http(gateway: Gateway, request):
    with gateway.http(gateway.key(tenant_of(request), ("train",))) as client:
        yield client


def tenant_of(request) -> str:
    return f"t{zlib.crc32(request.node.name.encode())}"


def stored(gateway: Gateway, tenant: str) -> list[Path]:
    return sorted((gateway.storage / "files" / tenant).glob("*"))


def scratch(gateway: Gateway) -> list[Path]:
    return sorted((gateway.storage / "files" / ".new").glob("*"))


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_file_is_uploaded_found_read_and_deleted(gateway, client, request):
    data = ROW * 20_000  # more than a block
    made = client.files.create(file=("train.jsonl", io.BytesIO(data)), purpose="fine-tune")
    assert made.id.startswith("file-")
    assert set(made.model_dump()) == set(FileObject.model_fields)
    assert made.model_dump(exclude={"id", "created_at"}) == {
        "object": "file",
        "bytes": len(data),
        "expires_at": None,
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
    }
    assert abs(made.created_at - time.time()) < 600
    assert client.files.retrieve(made.id) == client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).read() == data
    with client.files.with_streaming_response.content(made.id) as reply:
        assert reply.headers["content-length"] == str(len(data))
        assert reply.headers["content-disposition"] == "attachment; filename*=UTF-8''train.jsonl"
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.delete(made.id).model_dump() == {"id": made.id, "object": "file", "deleted": True}
    assert list(client.files.list()) == []
    assert stored(gateway, tenant_of(request)) == []
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_every_way_in_which_the_client_takes_a_file_works(client, tmp_path):
    path = tmp_path / "größe (1).jsonl"
    path.write_bytes(ROW)
    with path.open("rb") as stream:
        names = [
            client.files.create(file=file, purpose="batch").filename
            for file in (path, stream, ROW, (path.name, ROW, "application/jsonl"))
        ]
    assert names == [path.name, path.name, "upload", path.name]


def test_files_are_listed_in_pages_by_purpose_and_order(client):
    ids = [client.files.create(file=("a.jsonl", ROW), purpose="fine-tune").id for _ in range(5)]
    other = client.files.create(file=("b.jsonl", ROW), purpose="batch").id
    page = client.files.list(limit=2, purpose="fine-tune")
    assert page.has_more is True
    assert [file.id for file in page.data] == [ids[4], ids[3]]
    assert [file.id for file in client.files.list(limit=2, purpose="fine-tune")] == ids[::-1]  # of all pages
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [*ids, other]
    assert [file.id for file in client.files.list(after=ids[1], order="asc", purpose="fine-tune")] == ids[2:]
    assert [file.id for file in client.files.list(purpose="batch")] == [other]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=10001", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("purpose=vision", "purpose"),
        ("after=file-000000000000000000000000", "id"),
        ("after=%00", "id"),
        ("before=x", "before"),
    ],
)
def test_a_list_that_cannot_be_had_is_refused_by_its_parameter(http, query, param):
    reply = http.get(f"/v1/files?{query}")
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] == param


def test_a_file_of_another_tenant_is_answered_like_an_unknown_one(gateway, client):
    made = client.files.create(file=("train.jsonl", ROW), purpose="fine-tune")
    unknown = "file-" + "0" * 24
    with gateway.http(gateway.key("stranger", ("train", "infer"))) as stranger:
        for method, path in [("GET", ""), ("GET", "/content"), ("DELETE", "")]:
            foreign = stranger.request(method, f"/v1/files/{made.id}{path}")
            missing = stranger.request(method, f"/v1/files/{unknown}{path}")
            assert foreign.status_code == missing.status_code == 404
            assert foreign.text == missing.text.replace(unknown, made.id)
        assert stranger.get("/v1/files").json()["data"] == []
        assert stranger.get(f"/v1/files?after={made.id}").status_code == 404
    assert client.files.retrieve(made.id) == made


def test_a_key_that_may_only_infer_has_no_files_and_one_that_may_read_changes_none(gateway, client, request):
    made = client.files.create(file=("train.jsonl", ROW), purpose="fine-tune")
    with gateway.http(gateway.key(tenant_of(request), ("infer",))) as infer:
        for path in ("", f"/{made.id}", f"/{made.id}/content"):
            assert infer.get(f"/v1/files{path}").status_code == 403
    with gateway.http(gateway.key(tenant_of(request), ("read",))) as reader:
        assert reader.get(f"/v1/files/{made.id}/content").content == ROW
        for reply in (reader.delete(f"/v1/files/{made.id}"), reader.post("/v1/files", **form(PURPOSE, FILE))):
            assert reply.status_code == 403
            assert "'train'" in reply.json()["error"]["message"]
    assert list(client.files.list()) == [made]


def test_a_key_that_is_held_to_some_adapters_has_no_files(gateway, client, request):
    made = client.files.create(file=("train.jsonl", ROW), purpose="fine-tune")
    fill(gateway.store, 1, f"{tenant_of(request)}.support")
    held = gateway.store.create_key(tenant_of(request), ("train", "read"), adapters=("support",))[1]
    with gateway.http(held) as http:
        answers = [http.get(f"/v1/files{path}") for path in ("", f"/{made.id}", f"/{made.id}/content")]
        answers += [http.delete(f"/v1/files/{made.id}"), http.post("/v1/files", **form(PURPOSE, FILE))]
    assert {answer.status_code for answer in answers} == {403}
    assert list(client.files.list()) == [made]


def test_a_file_that_has_expired_is_unknown_at_once(gateway, client, request):
    made = client.files.create(
        file=("a.jsonl", ROW), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    batch = client.files.create(file=("a.jsonl", ROW), purpose="batch")
    assert batch.expires_at == batch.created_at + 30 * 24 * 3600
    record = gateway.store.get_file(made.id)
    gateway.store.delete_file(made.id)
    gateway.store.add_file(type(record)(**{**record.__dict__, "expires": time.time() - 1}))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert [file.id for file in client.files.list()] == [batch.id]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "nonsense"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 60}}, "expires_after[seconds]"),
        ({"expires_after": {"anchor": "last_used", "seconds": 3600}}, "expires_after[anchor]"),
        ({"extra_body": {"colour": "blue"}}, "colour"),
        ({"file": ("a.jsonl", b"")}, "file"),
        ({"file": ("a.jsonl", b"\x89PNG\r\n\x1a\n")}, "file"),
        ({"file": ("../a.jsonl", ROW)}, "file"),
        ({"file": ("a\x7fb.jsonl", ROW)}, "file"),
    ],
    ids=str,
)
def test_an_upload_that_is_not_taken_names_what_is_wrong_and_leaves_nothing(gateway, client, request, asked, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(**{"file": ("a.jsonl", ROW), "purpose": "fine-tune", **asked})
    assert error.value.param == param
    assert error.value.body["message"]
    assert list(client.files.list()) == []
    assert stored(gateway, tenant_of(request)) == scratch(gateway) == []


def form(*parts: tuple[str, bytes], boundary: str = "x", end: str = "--x--\r\n") -> dict:
    body = b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + data + b"\r\n" for head, data in parts)
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return {"content": body + end.encode(), "headers": headers}


PURPOSE = ('Content-Disposition: form-data; name="purpose"', b"fine-tune")
FILE = ('Content-Disposition: form-data; name="file"; filename="a.jsonl"', ROW)


def test_the_fields_may_follow_the_file(http):
    reply = http.post("/v1/files", **form(FILE, PURPOSE))
    assert reply.status_code == 200, reply.text
    assert reply.json()["purpose"] == "fine-tune"


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (form(PURPOSE), "missing_required_parameter"),
        (form(FILE), "missing_required_parameter"),
        (form(FILE, FILE, PURPOSE), "invalid_value"),
        (form(FILE, PURPOSE, PURPOSE), "invalid_value"),
        (form(FILE, ('Content-Disposition: form-data; name="purpose"', b"x" * 2000)), "invalid_value"),
        (form(PURPOSE, ('Content-Disposition: form-data; name="file"', ROW)), "invalid_value"),
        (form(PURPOSE, FILE, end=""), "invalid_form"),
        (form(PURPOSE, FILE, end="--x"), "invalid_form"),
        (form(PURPOSE, ("Content-Type: text/plain", ROW)), "invalid_form"),
        (form(PURPOSE, (FILE[0] + "\r\nContent-Transfer-Encoding: base64", ROW)), "invalid_form"),
        (form(PURPOSE, (FILE[0] + "\r\nX: " + "y" * 9000, ROW)), "invalid_form"),
        (form(*[PURPOSE] * 20), "invalid_form"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "invalid_form"),
        ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "invalid_form"),
        ({"content": ROW, "headers": {"content-type": "multipart/form-data"}}, "invalid_form"),
        ({"json": {"file": "a", "purpose": "fine-tune"}}, "invalid_form"),
    ],
)
def test_a_form_that_is_none_is_refused_and_leaves_nothing(gateway, http, request, sent, code):
    reply = http.post("/v1/files", **sent)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code), reply.text
    assert stored(gateway, tenant_of(request)) == scratch(gateway) == []


def test_a_file_over_the_limit_is_refused_whether_its_length_was_said_or_not(gateway, client, http, request):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("a.jsonl", ROW * 60_000), purpose="fine-tune")
    assert (error.value.status_code, error.value.code) == (413, "file_too_large")
    sent = form(PURPOSE, ('Content-Disposition: form-data; name="file"; filename="a"', b"x" * (LIMIT + 1)))
    pieces = (sent["content"][start : start + 65536] for start in range(0, len(sent["content"]), 65536))
    reply = http.post("/v1/files", content=pieces, headers=sent["headers"])
    assert reply.status_code == 413
    assert stored(gateway, tenant_of(request)) == scratch(gateway) == []


def test_a_tenant_keeps_no_more_bytes_than_it_may_and_gets_room_by_deleting(client):
    data = b"x" * (LIMIT - 1)
    ids = [client.files.create(file=("a.jsonl", data), purpose="fine-tune").id for _ in range(2)]
    with pytest.raises(openai.BadRequestError) as error:
        client.files.create(file=("a.jsonl", data), purpose="fine-tune")
    assert error.value.code == "file_quota_exceeded"
    client.files.delete(ids[0])
    client.files.create(file=("a.jsonl", data), purpose="fine-tune")


def begin_upload(
    gateway: Gateway, key: str, body: bytes = form(PURPOSE, FILE)["content"], sent: int = -30
) -> socket.socket:
    """A connection on which a part of a file was sent."""
    host, port = gateway.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=60)
    line.sendall(
        f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode()
        + body[:sent]
    )
    return line


def test_what_came_is_stored_while_the_rest_is_still_to_come(gateway, client, request):
    data = b"x" * (LIMIT - 1)
    body = form(PURPOSE, (FILE[0], data))["content"]
    split = len(body) - 1000
    with begin_upload(gateway, gateway.key(tenant_of(request), ("train",)), body, split) as line:
        until(lambda: any(file.stat().st_size >= 2 * 2**20 for file in scratch(gateway)))
        assert list(client.files.list()) == []
        line.sendall(body[split:])
        assert b" 200 " in line.recv(65536).split(b"\r\n")[0]
    (made,) = client.files.list()
    assert client.files.content(made.id).read() == data


def test_an_upload_that_is_cut_leaves_nothing_and_too_many_at_once_are_refused(gateway, http, request):
    key = http.headers["authorization"].removeprefix("Bearer ")
    lines = [begin_upload(gateway, key) for _ in range(2)]
    until(lambda: len(scratch(gateway)) == 2)
    reply = http.post("/v1/files", **form(PURPOSE, FILE))
    assert reply.status_code == 429
    assert "2 of your uploads" in reply.json()["error"]["message"]
    with gateway.http(gateway.key("another", ("train",))) as another:
        assert another.post("/v1/files", **form(PURPOSE, FILE)).status_code == 200
    for line in lines:
        line.close()
    until(lambda: scratch(gateway) == [])
    assert stored(gateway, tenant_of(request)) == []
    assert http.get("/v1/files").json()["data"] == []
    until(lambda: http.post("/v1/files", **form(PURPOSE, FILE)).status_code == 200)


def test_an_upload_that_trickles_is_ended(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(upload_timeout_s=0.3)) as gateway:
        line = begin_upload(gateway, gateway.key(scopes=("train",)))
        answer = line.recv(65536)
        line.close()
        assert b" 408 " in answer.split(b"\r\n")[0]
        until(lambda: scratch(gateway) == [])


def test_what_a_killed_gateway_left_is_removed_at_the_next_start(tmp_path):
    left = tmp_path / "storage" / "files" / ".new" / "left"
    left.parent.mkdir(parents=True)
    left.write_bytes(ROW)
    os.utime(left, (0, 0))
    with serve(tmp_path):
        until(lambda: not left.exists())


def test_the_audit_names_the_key_that_made_and_deleted_a_file(gateway):
    record, secret = gateway.store.create_key("audited", ("train",))
    client = gateway.client(secret)
    made = client.files.create(file=("a.jsonl", ROW), purpose="fine-tune")
    client.files.delete(made.id)
    entries = [entry for entry in last_audit(gateway.store, "audited") if entry.subject == made.id]
    assert [entry.action for entry in entries] == ["file.delete", "file.create"]
    assert {entry.actor for entry in entries} == {f"key:audited/{record.id}"}
    assert all(entry.request_id for entry in entries)
