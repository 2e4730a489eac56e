"""Whatever stands in a file or a field of a tenant: it is used, or refused by an error of ours; nothing else comes."""

from __future__ import annotations

import io
import json
import struct
from contextlib import suppress
from dataclasses import asdict

import numpy as np
import pytest
import yaml
from fuzzing import JSON, tried
from gateway_backend import BACKBONE
from gateway_server import serve
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pedro.adapter_check import check_adapter
from pedro.adapter_directory import CONFIG, WEIGHTS, weights_digest, write_manifest
from pedro.data.mistakes import LineError
from pedro.data.row_reader import read_rows
from pedro.data.row_shapes import read_row
from pedro.data.templates import TooLongError, render
from pedro.errors import AdapterError, ConfigError, DataError, PedroError
from pedro.gateway.batch_rows import RowMistake
from pedro.gateway.batch_rows import read_rows as read_batch
from pedro.gateway.tool_answers import CallReader
from pedro.methods.adapter_files import read_config
from pedro.spec_reader import parse_yaml, validate_spec
from pedro.training.spec import FineTuneSpec

MANIFEST = {
    "backbone": {"id": "tiny", "digest": "sha256:a", "tokenizer_digest": "sha256:t"},
    "method": {"name": "pedro", "options": {}},
    "prompt_format": {"id": "x", "template": "x"},
}


# training data

FIELDS = ["prompt", "completion", "messages", "role", "content", "chosen", "rejected", "instruction", "output"]
FIELDS += ["conversations", "from", "value", "tools", "tool_calls", "weight", "system", "history", "input"]
VALUES = JSON | st.sampled_from(["user", "assistant", "tool", "human", "gpt"])
OBJECT = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)
ROW = st.dictionaries(st.sampled_from(FIELDS), VALUES | OBJECT | st.lists(OBJECT, max_size=3), max_size=4)
LINE = ROW.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40) | st.just(b"[" * 3000)


@tried(20, 20)
@given(lines=st.lists(LINE, max_size=3), end=st.sampled_from([b"\n", b"\r\n", b"\r", b"", b"\xef\xbb\xbf"]))
def test_any_file_of_rows_is_read_or_refused_line_by_line(tmp_path_factory, lines, end):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(end.join(lines) + end)
    with suppress(DataError):  # of the file as a whole
        for number, row in read_rows(path):
            if isinstance(row, LineError):
                assert number >= 1
                continue
            with suppress(LineError):
                read_row(row, number)


# batches

BATCH_FIELDS = ["custom_id", "method", "url", "body", "model", "stream", "prompt"]
BATCH_VALUES = JSON | st.sampled_from(["POST", "/v1/completions", "\ud800"])
BATCH_LINE = st.dictionaries(st.sampled_from(BATCH_FIELDS), BATCH_VALUES, max_size=5)


@tried(40, 20)
@given(lines=st.lists(BATCH_LINE | st.binary(max_size=40), max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_any_line_of_a_batch_is_a_row_or_one_mistake_that_can_be_told(lines, end):
    content = end.join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    for one in read_batch(io.BytesIO(content), "/v1/completions", 10_000):
        if isinstance(one, RowMistake):
            assert one.line is not None
            assert "\n" not in one.message
        else:
            assert one.custom_id
            json.loads(one.body)
        json.dumps(asdict(one), default=bytes.decode).encode()


# specs

KEYS = [*FineTuneSpec.model_fields, *FineTuneSpec.model_fields["training"].annotation.model_fields, "<<", "&a", "*a"]
SPEC = st.dictionaries(
    st.sampled_from(KEYS), JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3), max_size=4
)


@tried(40, 20)
@given(spec=SPEC)
def test_any_mapping_is_a_spec_or_one_error_with_every_mistake(spec):
    with suppress(ConfigError):
        validate_spec(spec, FineTuneSpec)


@tried(40, 20)
@given(text=st.text(max_size=40) | SPEC.map(yaml.safe_dump) | st.text("-:{}[]&*a!|>'\"\n \t#%@`", max_size=30))
def test_any_text_is_yaml_or_refused_in_one_line(text):
    told = ""
    try:
        parse_yaml(text)
    except ValueError as error:
        told = str(error)
    assert "\n" not in told


# adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    tensors = {f"base_model.model.{name}": np.ones((2, 3), np.float32) for name in "ab"}
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    write_manifest(directory, MANIFEST)
    check_adapter(directory)
    return directory


def with_header(content: bytes, change) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


@tried(60, 20)
@given(field=st.sampled_from(["dtype", "shape", "data_offsets", ""]), value=JSON | st.lists(st.floats(), min_size=2))
@example("data_offsets", [0.0, 24.0])
@example("data_offsets", [False, True])
@example("shape", "ab")
@example("shape", [2, None])
@example("dtype", ["F32"])
def test_any_header_of_weights_is_the_one_that_was_saved_or_refused(adapter, field, value):
    file, good = adapter / WEIGHTS, weights_digest(adapter)
    content = file.read_bytes()

    def change(header):
        name = min(header)
        header[name] = {**header[name], field: value} if field else value
        return header

    file.write_bytes(with_header(content, change))
    try:
        check_adapter(adapter)
        assert weights_digest(adapter) == good
    except AdapterError:
        pass
    finally:
        file.write_bytes(content)


@tried(40, 20)
@given(at=st.integers(0, 200), cut=st.integers(0, 20), put=st.binary(max_size=20))
def test_any_damage_to_weights_is_found(adapter, at, cut, put):
    file, good = adapter / WEIGHTS, weights_digest(adapter)
    content = file.read_bytes()
    file.write_bytes(content[:at] + put + content[at + cut :])
    try:
        check_adapter(adapter)
        assert weights_digest(adapter) == good
    except AdapterError:
        pass
    finally:
        file.write_bytes(content)


OPTIONS = ["peft_type", "r", "target_modules", "lora_alpha", "bias", "rank_pattern", "auto_mapping", "layers_pattern"]


@tried(40, 20)
@given(config=JSON | st.dictionaries(st.sampled_from(OPTIONS), JSON, max_size=4))
def test_any_config_of_an_adapter_is_read_or_refused(tmp_path_factory, config):
    directory = tmp_path_factory.getbasetemp()
    kind = {"peft_type": "LORA"} if isinstance(config, dict) else {}
    (directory / CONFIG).write_text(json.dumps({**kind, **config} if isinstance(config, dict) else config))
    with suppress(PedroError):
        read_config(directory)


# prompt formats

WORDS = ["{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if ", " endif ", "messages", "[0]", ".content"]
WORDS += ["|tojson", "|length", "loop.index", " set x = ", "namespace()", "''", "~", "x", "__class__", ".__mro__", "7"]


@tried(80, 20)
@given(words=st.lists(st.sampled_from(WORDS), max_size=8))
def test_any_template_renders_or_is_refused(words):
    turns = [{"role": "user", "content": "a"}]
    with suppress(DataError, TooLongError):
        written = render("".join(words), {"messages": turns}, 10_000)
        assert "<class" not in written


# answers that may call tools

CALL = '{"name": "f", "arguments": {"a": "é"}}'
PIECES = [
    CALL,
    f"[{CALL}, {CALL}]",
    "<tool_call>",
    "</tool_call>",
    "<tool",
    "_call>",
    "[TOOL_CALLS]",
    "{",
    "[",
    "x",
    " ",
]
PIECES += [
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "parameters": {"a": "\\ud800"}}',
    '{"name": "g"}',
    "\n",
]


@tried(150, 20)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), parallel=st.booleans())
def test_an_answer_in_pieces_has_the_calls_and_the_text_of_the_whole_one(pieces, parallel):
    def read(parts):
        reader, texts, calls = CallReader(["f"], parallel), [], []
        for number, part in enumerate(parts, 1):
            text, more = reader.feed(part, number == len(parts))
            texts.append(text)
            calls += more
        assert [call["index"] for call in calls] == list(range(len(calls)))
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
        return "".join("".join(texts).split()), [call["function"] for call in calls]

    assert read(pieces) == read(["".join(pieces)])


# streams


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("gateway")) as gateway, gateway.http(gateway.key()) as client:
        yield client


PROMPT = st.text(min_size=1, max_size=12).filter(str.strip)


@tried(15, 10)
@given(prompt=PROMPT)
@example("a\u2028b\u0085c\rd data: [DONE] e")
def test_a_stream_of_any_text_is_the_whole_answer_an_event_a_line(http, prompt):
    prompt = prompt.encode(errors="replace").decode()
    if not prompt.split():
        return
    events, whole = streamed(http, "/v1/completions", {"prompt": prompt, "max_tokens": 3})
    assert "".join(chunk["choices"][0]["text"] for chunk in events) == whole["choices"][0]["text"]
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 3}
    events, whole = streamed(http, "/v1/chat/completions", chat)
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in events)
    assert said == whole["choices"][0]["message"]["content"]


def streamed(http, path, body):
    """The events of a stream, and the same answer whole."""
    whole, stream = (http.post(path, json={"model": BACKBONE, **body, "stream": stream}) for stream in (False, True))
    assert (whole.status_code, stream.status_code) == (200, 200)
    *events, done, rest = stream.content.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events], whole.json()
