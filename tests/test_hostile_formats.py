"""Formats that strangers write, beside those of `test_hostile_inputs.py`: tables, forms, manifests, sweeps, addresses,
first lines of connections, streams. Each is used, or refused by an error of ours; nothing else comes."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import itertools
import json
import socket
from contextlib import suppress
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pytest
from fuzz_targets import SEEDS, TARGETS
from fuzzing import JSON, tried
from gateway_backend import BACKBONE
from gateway_server import serve
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from pedro.adapter_directory import MANIFEST, REQUIRED, TYPES, manifest_digest, read_manifest
from pedro.data.mistakes import LineError
from pedro.data.prompt_format import PromptFormat
from pedro.data.row_reader import read_rows
from pedro.data.row_shapes import read_row
from pedro.errors import AdapterError, DataError, PedroError
from pedro.gateway.multipart import FormPart, read_form
from pedro.gateway.passed_connections import counted_as, line_for, plain, read_line
from pedro.gateway.sweep_requests import sweep_of
from pedro.gateway.webhook_addresses import Addresses, WebhookUrlError, read_url

ROW = '{"prompt": "a", "completion": "b"}'


def read_all(path):
    """Every row of a file of training data, as training reads it."""
    with suppress(DataError):  # of the file as a whole
        for number, row in read_rows(path):
            if not isinstance(row, LineError):
                with suppress(LineError):
                    read_row(row, number)


# training data of other kinds than JSON lines

PIECE = st.sampled_from(
    [ROW, "[", "]", ",", '{"data": [', "}", "prompt,completion", '"', "a,b", "\t", ";", "\n", "\r", "\0", "\ufeff", "é"]
)


@tried(200, 20)
@given(
    pieces=st.lists(PIECE, max_size=8),
    rest=st.binary(max_size=8),
    name=st.sampled_from(["a.json", "a.csv", "a.tsv", "a.jsonl", "a.parquet"]),
    packed=st.booleans(),
    cut=st.integers(0, 12),
)
def test_any_file_of_data_is_read_or_refused_whatever_it_calls_itself(
    tmp_path_factory, pieces, rest, name, packed, cut
):
    content = "".join(pieces).encode() + rest
    if packed:
        content = gzip.compress(content, mtime=0)
        content = content[: len(content) - cut]
    path = tmp_path_factory.getbasetemp() / f"{name}{'.gz' if packed else ''}"
    path.write_bytes(content)
    read_all(path)


def not_utf8():
    offsets, data = pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xff\xfe")
    return pa.StringArray.from_buffers(1, offsets, data)


COLUMNS = {
    "a time that no calendar has": lambda: pa.array([2**50], pa.timestamp("s")),
    "a zone that there is not": lambda: pa.array([0], pa.timestamp("ns", tz="Nowhere/City")),
    "a time between microseconds": lambda: pa.array([1], pa.timestamp("ns")),
    "a day that no calendar has": lambda: pa.array([2**30], pa.date32()),
    "a time of day": lambda: pa.array([1], pa.time64("ns")),
    "a length of time": lambda: pa.array([2**53], pa.duration("s")),
    "text that is none": not_utf8,
    "bytes": lambda: pa.array([b"\xff"]),
    "a number with digits": lambda: pa.array(["1.5"]).cast(pa.decimal128(5, 2)),
    "no number": lambda: pa.array([float("nan")]),
    "a map with one key twice": lambda: pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
    "words of a dictionary": lambda: pa.array(["a"]).dictionary_encode(),
    "lists of lists": lambda: pa.array([[[[["a"]]]]]),
    "nothing": lambda: pa.nulls(1),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_any_type_of_a_parquet_column_is_read_or_refused(tmp_path, column):
    for name in ("prompt", "messages", "chosen"):
        table = pa.table({name: COLUMNS[column](), "completion": pa.array(["b"])})
        parquet.write_table(table, tmp_path / "rows.parquet")
        read_all(tmp_path / "rows.parquet")


def test_a_value_that_only_parquet_can_hold_is_told_by_its_row_and_column_and_the_others_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    days = pa.array([0, 2**30, 1], pa.date32())
    parquet.write_table(pa.table({"prompt": list("abc"), "completion": list("def"), "made\x1b": days}), path)
    (_, first), (_, second), (_, third) = read_rows(path)
    assert (first["prompt"], third["prompt"]) == ("a", "c")
    assert str(second).startswith("row 2: made\\x1b: its value cannot be read (")


@tried(100, 20)
@given(at=st.integers(0, 400), put=st.binary(min_size=1, max_size=12))
@example(176, b"\x9c_U\x9d")
def test_any_damage_to_a_parquet_file_is_refused_or_does_no_harm(tmp_path_factory, at, put):
    path = tmp_path_factory.getbasetemp() / "damaged.parquet"
    parquet.write_table(pa.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), path, compression="none")
    content = path.read_bytes()
    at = min(at, len(content))
    path.write_bytes(content[:at] + put + content[at + len(put) :])
    read_all(path)


# adapters

FIELDS = [*REQUIRED, *TYPES, "manifest_digest", "weights_digest", "files"]


@tried(100, 20)
@given(
    manifest=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    whole=st.booleans(),
    signed=st.booleans(),
)
@example({"format_version": True}, True, False)
@example({"manifest_digest": ["sha256:"]}, True, False)
def test_any_manifest_of_an_adapter_is_read_or_refused(tmp_path_factory, manifest, whole, signed):
    directory = tmp_path_factory.getbasetemp()
    if isinstance(manifest, dict) and whole:
        manifest = {"format_version": 1, "digest": "sha256:", "backbone": {}, "method": {}, **manifest}
        if signed:
            manifest["manifest_digest"] = manifest_digest(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with suppress(AdapterError):
        assert isinstance(read_manifest(directory), dict)


@tried(60, 20)
@given(
    name=st.sampled_from(sorted(TARGETS)), at=st.integers(0, 200), cut=st.integers(0, 12), put=st.binary(max_size=12)
)
@example("gguf", 0, 0, b"")
@example("weights", 0, 0, b"")
@example("config", 0, 0, b"")
def test_what_is_searched_by_coverage_takes_its_seed_and_any_damage_to_it(tmp_path_factory, name, at, cut, put):
    seed = SEEDS[name]
    TARGETS[name](seed[:at] + put + seed[at + cut :], tmp_path_factory.mktemp("search"))


@tried(150, 20)
@given(
    fields=st.dictionaries(
        st.sampled_from(["id", "template", "bos_token", "head_end", "special_tokens_in_content", "x"]),
        JSON | st.sampled_from(["{{ messages[0].content }}", "{% for", "raw", [1, 2], [True]]),
        max_size=5,
    )
)
def test_any_prompt_format_of_a_manifest_is_read_or_refused(fields):
    with suppress(DataError):
        read = PromptFormat.from_dict(fields)
        assert PromptFormat.from_dict(json.loads(json.dumps(read.to_dict()))) == read
        with suppress(DataError):
            assert isinstance(read.render([{"role": "user", "content": "a"}]), str)


# sweeps over HTTP

NUMBERS = st.sampled_from([0, 1, -1, 0.1, 1e-4, 1e300, True, "1", None, 10**30])  # JSON over HTTP has no NaN
DIMENSION = st.dictionaries(
    st.sampled_from(["grid", "choice", "uniform", "loguniform", "quniform", "randint", "x"]),
    st.lists(NUMBERS, max_size=4) | st.fixed_dictionaries({"low": NUMBERS, "high": NUMBERS}) | JSON,
    max_size=2,
)
SPACE = st.dictionaries(st.sampled_from(["training.lr", "method.r", "method.name", "data.train", "a", ""]), DIMENSION)
ALGORITHM = st.sampled_from(["grid", "random", "optuna", "x"]) | JSON
SEARCH = st.fixed_dictionaries({}, optional={"algorithm": ALGORITHM, "trials": NUMBERS, "seed": NUMBERS})


@tried(200, 20)
@given(given=st.fixed_dictionaries({}, optional={"space": SPACE | JSON, "search": SEARCH, "concurrency": NUMBERS}))
@example({"space": {"training.lr": {"loguniform": [0, 1]}}})
def test_any_section_of_a_sweep_is_taken_or_refused_by_field(given):
    refused = None
    try:
        json.dumps(sweep_of(given, {}), allow_nan=False)
    except PedroError as error:
        refused = error
    assert refused is None or (refused.param.startswith("method.pedro.sweep") and "\n" not in refused.message)


# forms

FIELD = b'Content-Disposition: form-data; name="a"'
FILE = b'Content-Disposition: form-data; name="f"; filename="x"'
HEADS = [FIELD, FILE, b"Content-Disposition: attachment", b"Content-Disposition:", FIELD.replace(b"a", b"\xff"), b":"]
FORM = st.lists(
    st.sampled_from([b"--x", b"--x--", b"\r\n", b"\r\n\r\n", b"\n", b"abc", b"-", *HEADS]) | st.binary(max_size=4),
    max_size=14,
).map(b"".join)
RIGHT = b"--x\r\n%s\r\n\r\none\r\n--x\r\n%s\r\n\r\ntwo--x\r\n--x--\r\n" % (FIELD, FILE)


def parts_of(chunks):
    """The parts of a form that comes so, each with all its bytes; or the error."""

    async def stream():
        for chunk in chunks:
            yield chunk

    async def read():
        found = []
        request = SimpleNamespace(headers={"content-type": "multipart/form-data; boundary=x"}, stream=stream)
        async for event in read_form(request):
            if isinstance(event, FormPart):
                found.append((event, bytearray()))
            else:
                found[-1][1].extend(event)
        return [(part, bytes(content)) for part, content in found]

    try:
        return asyncio.run(read())
    except PedroError as error:
        return error.code


@tried(200, 20)
@given(form=FORM | st.just(RIGHT), cuts=st.lists(st.integers(0, 200), max_size=4))
@example(RIGHT, list(range(200)))
def test_a_form_in_pieces_is_the_form_as_a_whole(form, cuts):
    cuts = sorted({0, len(form), *(cut for cut in cuts if cut < len(form))})
    chunks = [form[start:end] for start, end in itertools.pairwise(cuts)]
    assert parts_of(chunks) == parts_of([form])


# addresses of webhooks

URL = st.lists(
    st.sampled_from(["https", "http", "://", ":", "//", "/", "@", "?", "#", "[", "]", "::1", "127.0.0.1", "a.example"])
    | st.sampled_from(["%31", "%", "\\", " ", "0x7f.1", "2130706433", ".", "é", "\0", "443", "99999", "user"]),
    max_size=9,
).map("".join)
PRIVATE = [ipaddress.ip_network(one) for one in ("127.0.0.0/8", "10.0.0.0/8", "169.254.0.0/16", "100.64.0.0/10")]


@tried(300, 20)
@given(text=URL | st.text(max_size=30))
def test_any_text_is_the_url_of_a_webhook_or_refused_and_what_is_sent_to_is_what_was_looked_at(text):
    with suppress(WebhookUrlError):
        url = read_url(text)
        assert url.scheme in ("http", "https")
        assert url.host
        assert (url.userinfo, url.fragment) == (b"", "")
        assert httpx.URL(str(url)).raw_host == url.raw_host


@tried(200, 20)
@given(inside=st.sampled_from(PRIVATE).flatmap(lambda own: st.ip_addresses(network=own)), form=st.integers(0, 4))
def test_no_way_to_write_an_address_inside_is_one_that_webhooks_go_to(inside, form):
    number = int(inside)
    mapped, nat64, sixtofour = 0xFFFF << 32 | number, 0x64FF9B << 96 | number, 0x2002 << 112 | number << 80
    written = str(inside) if form == 4 else str(ipaddress.IPv6Address((mapped, nat64, sixtofour, number)[form]))
    addresses = Addresses(lookup=lambda *_: [written])
    try:
        with pytest.raises(WebhookUrlError):
            asyncio.run(addresses.of("acme", read_url("https://a.example/")))
    finally:
        addresses.close()


# the first line of a connection


@tried(300, 20)
@given(
    said=st.binary(max_size=40) | st.binary(max_size=20).map(lambda rest: b"PEDRO-PASSES-ON " + rest),
    address=st.ip_addresses().map(str),
    cut=st.integers(0, 60),
)
def test_whatever_a_connection_begins_with_is_passed_on_whole_unless_it_is_a_kept_ports_line(said, address, cut):
    key = b"k" * 32
    told = read_line(said, key)
    assert told in (None, ("", said))
    line = line_for(address, key)
    assert (
        read_line(line[:cut] if cut < len(line) else line + said, key)
        == ((address, said) if cut >= len(line) else None)
        or cut == 0
    )
    assert counted_as(plain(address))


# streams of events


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("gateway")) as gateway, gateway.http(gateway.key()) as client:
        yield client


@tried(15, 10)
@given(text=st.text(min_size=1, max_size=12).filter(str.strip))
@example("a\u2028b\u0085c\rd event: x\ndata: y")
def test_a_stream_of_a_response_is_the_whole_response_an_event_a_block(http, text):
    body = {"model": BACKBONE, "input": text.encode(errors="replace").decode(), "max_output_tokens": 3}
    if not body["input"].split():
        return
    whole, stream = (http.post("/v1/responses", json={**body, "stream": stream}) for stream in (False, True))
    assert (whole.status_code, stream.status_code) == (200, 200)
    *blocks, rest = stream.content.decode().split("\n\n")
    assert rest == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said == whole.json()["output"][0]["content"][0]["text"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@tried(60, 10)
@given(said=st.binary(min_size=1, max_size=60))
def test_no_bytes_on_a_connection_are_more_than_a_bad_request(http, said):
    at = httpx.URL(http.base_url)
    with socket.create_connection((at.host, at.port), timeout=60) as line:
        line.sendall(said + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionResetError):
            while piece := line.recv(65536):
                answer += piece
    assert not answer or 200 <= int(answer.split()[1]) < 500
