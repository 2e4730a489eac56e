"""Files as the world has them: what each kind is read as, or the one line that says what to do."""

import gzip
import json
import os
import random
import sys
import zipfile
from pathlib import Path

import pytest

from pedro.data import LineError, check_file, data_digest, scan
from pedro.data.lines import kind, parse_fields
from pedro.data.row_reader import CHUNK, MAX_LINE_BYTES, read_rows
from pedro.errors import ConfigError, DataError

CASES = Path(__file__).parent / "fixtures" / "cases"
QUESTIONS = [(f"question {n}", f"answer {n}") for n in range(3)]

READ = {  # file: what its last messages and answers are
    "array_oneline.jsonl": QUESTIONS,
    "array_pretty.json": QUESTIONS,
    "data_wrapper.json": QUESTIONS,
    "csv_as_jsonl.csv": [("a", "b")],
    "data.parquet": [("a", "c"), ("b", "d")],
    "data.jsonl.gz": QUESTIONS,
    "trl_pc.jsonl": [("a", "b")],
    "sharegpt_rolecontent.jsonl": [("a", "b")],
    "sharegpt_chatgpt.jsonl": [("a", "b")],
    "role_bot.jsonl": [("x", "y")],
    "tool_calls_null.jsonl": [("x", "y")],
    "tool_calls.jsonl": [("weather?", ""), ("weather?", "", "sunny", "It is sunny.")],
    "sharegpt_system.jsonl": [("You are a pirate.", "a", "b")],
    "alpaca_history.jsonl": [("You are a pirate", "q", "a", "do", "y")],
    "pc_label_int.jsonl": [("review", "1")],
    "lone_surrogate_key.jsonl": [("a", "ok")],
    "dpo_openai.jsonl": [("a", "b")],
    "special_in_user.jsonl": [("ignore </s> me <s> again", "b")],
}
REFUSED = {  # file: the field at fault, and what the reader is told
    "function_call.jsonl": ("messages[1].function_call", "OpenAI's form alone"),
    "sharegpt_tool.jsonl": ("conversations[1].from", "function_call: tool calls are read in OpenAI's form alone"),
    "sharegpt_toolrole.jsonl": ("conversations[2].from", "tool: tool calls are read in OpenAI's form alone"),
    "row_weight.jsonl": ("weight", "other than 1 is not supported"),
    "dup_keys.jsonl": ("completion", "given twice"),
    "cr_only.jsonl": ("line", "tr '\\r' '\\n'"),
    "space_keys.jsonl": ("'prompt '", "--fields 'prompt=prompt '"),
    "uppercase_keys.jsonl": ("'Prompt'", "--fields 'prompt=Prompt,completion=Completion'"),
    "question_answer.jsonl": ("line", "--fields prompt=A,completion=B"),
    "dolly.jsonl": ("output", "--fields instruction=A,input=B,output=C"),
    "openai_batch.jsonl": ("custom_id", "batch API"),
}


def texts(path, fields=None):
    """What each example holds: the texts of its messages, and its answer."""
    parsed = list(scan(path, fields))
    assert not [item for item in parsed if isinstance(item, LineError)]
    return [
        (*(message["content"] for message in example.messages), example.completion)
        for item in parsed
        for example in item.examples
    ]


def test_every_case_is_in_the_table():
    assert {path.name for path in CASES.iterdir()} == READ.keys() | REFUSED.keys() | {"data.zst"}


@pytest.mark.parametrize("name", READ)
def test_what_real_files_hold_is_read(name):
    assert texts(CASES / name) == READ[name]
    report = check_file(CASES / name)
    assert report.usable
    assert report.text().isprintable() or all(line.isprintable() for line in report.text().splitlines())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learnt_is_one_error_that_says_what_it_is(name):
    report = check_file(CASES / name)
    field, reason = REFUSED[name]
    (error,) = report.errors
    assert (error["line"], error["field"]) == (1, field)
    assert reason in error["reason"]
    assert not report.usable
    assert report.examples == 0


@pytest.mark.parametrize(
    ("name", "fields", "wanted"),
    [
        ("question_answer.jsonl", "prompt=question,completion=answer", ("a", "b")),
        ("dolly.jsonl", "instruction=instruction,input=context,output=response", ("do", "y")),
        ("uppercase_keys.jsonl", "prompt=Prompt,completion=Completion", ("a", "b")),
        ("space_keys.jsonl", "prompt=prompt ", ("a", "b")),
    ],
)
def test_other_column_names_are_mapped(name, fields, wanted):
    assert texts(CASES / name, parse_fields(fields)) == [wanted]


def test_a_mapping_to_a_column_that_is_not_there_is_told_so(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "question": "q", "completion": "b"}\n')
    absent, beside = scan(path, {"prompt": "question"})
    assert absent.reason == "given, but fields name a column that is not here, question, which stands for it; keep one"
    assert beside.reason == "given beside question, which stands for it; keep one"


@pytest.mark.parametrize("fields", ["prompt", "prompts=a", "prompt=", "prompt=a,completion=a"])
def test_a_mapping_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ConfigError, match="fields: "):
        parse_fields(fields)


def test_integer_labels_are_told_once_with_the_command(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f'{{"prompt": "p{n}", "completion": {n % 2}}}\n' for n in range(6)))
    report = check_file(path)
    assert (report.usable, report.numbers, report.answers) == (True, 6, (("0", 3), ("1", 3)))
    assert report.text().count("jq -c '.completion |= tostring'") == 1


def test_a_file_of_alpaca_rows_is_a_conversation_where_any_of_them_has_a_history(tmp_path):
    rows = [
        {"instruction": "a", "output": "b", "history": []},
        {"instruction": "c", "output": "d", "history": [["x", "y"]]},
    ]
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.shape for item in scan(path)] == ["messages"] * 2
    assert texts(path) == [("a", "b"), ("x", "y", "c", "d")]


def strange_rows():
    """Rows with everything that a scanner of brackets and quotes may stumble over."""
    dice = random.Random(0)
    parts = ['"', "\\", "[", "]", "{", "}", ",", "é", "🙂", "\n", "word ", '\\"']
    return [
        {"prompt": "p" + "".join(dice.choices(parts, k=dice.randrange(200))), "completion": str(n), "x": [{"y": [n]}]}
        for n in range(2000)
    ]


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_an_array_is_cut_where_its_elements_end(tmp_path, layout):
    rows = strange_rows()
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, **layout))
    assert path.stat().st_size > 2 * CHUNK
    assert list(read_rows(path)) == list(enumerate(rows, 1))
    path.write_text(json.dumps({"data": rows}, **layout))
    assert list(read_rows(path)) == list(enumerate(rows, 1))


def test_mistakes_in_an_array_are_told_by_row(tmp_path):
    path = tmp_path / "rows.json"
    good, long = '{"prompt": "a", "completion": "b"}', json.dumps({"prompt": "x" * 3_000_000})
    path.write_text(f'[{good}, {{"prompt": "a" "b"}}, {long}, 3, {good}, {{"prompt": "a"}}]')
    report = check_file(path)
    assert [e["line"] for e in report.errors] == [2, 3, 4, 6]
    assert (report.examples, report.kind) == (2, "JSON array")
    assert "row 2: row: not JSON" in report.text()
    assert f"{MAX_LINE_BYTES:,} at most" in report.errors[1]["reason"]
    for text, reason in ((f"[{good}, {good}", "cut short"), (f"[{good}]\n{good}", "more after the array's end")):
        path.write_text(text)
        (error,) = check_file(path).errors
        assert reason in error["reason"]
    path.write_text("[]")
    assert check_file(path).examples == 0


def test_an_object_over_many_lines_is_told_once(tmp_path):
    path = tmp_path / "pretty.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}, indent=2) * 20)
    (error,) = check_file(path).errors
    assert "jq -c . FILE > NEW" in error["reason"]


def test_tables_are_read_under_the_names_of_their_header(tmp_path):
    text = 'prompt,completion,system\n"two\nlines, quoted",yes,\n\nplain,no,Be brief.\n'
    for name, content in (
        ("a.csv", text),
        ("a.csv.txt", text),
        ("b.tsv", text.replace(",", "\t")),
        ("c.csv", text.replace(",", ";")),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        first, second = texts(tmp_path / name)
        assert first[1:] == ("yes",)
        assert second == ("Be brief.", "plain", "no")
    packed = tmp_path / "d.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert len(texts(packed)) == 2


def test_mistakes_in_a_table_are_told_by_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",yes\na,b,c\nd,\n"never closed,x\n')
    report = check_file(path)
    assert [(e["line"], e["reason"][:20]) for e in report.errors] == [
        (4, "3 cells where the he"),
        (5, "missing or null: a l"),
        (6, "not CSV: unexpected "),
    ]
    path.write_text("prompt,prompt\na,b\n")
    assert "two columns" in check_file(path).errors[0]["reason"]
    path.write_bytes(b"prompt,completion\ncaf\xe9,x\n")
    assert "not UTF-8" in check_file(path).errors[0]["reason"]


def test_zstd_and_parquet_are_read_by_content(tmp_path):
    pa = pytest.importorskip("pyarrow.parquet") and pytest.importorskip("pyarrow")
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(300)
    ]
    table = pa.Table.from_pylist([{**row, "response": None, "weight": None} for row in rows])
    pa.parquet.write_table(table, tmp_path / "rows.data")
    assert len(texts(tmp_path / "rows.data")) == 300
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with pa.output_stream(tmp_path / "rows.jsonl", compression="zstd") as stream:
        stream.write(lines.encode())
    assert texts(tmp_path / "rows.jsonl") == texts(tmp_path / "rows.data")


def test_a_parquet_row_is_bounded_as_a_line_is(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    prompts = ["a", "x" * (MAX_LINE_BYTES + 1), *"bcdefghijklm"]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, "completion": ["y"] * len(prompts)}), path)
    report = check_file(path)
    assert (report.examples, report.error_count) == (13, 1)
    assert (report.errors[0]["line"], report.errors[0]["field"]) == (2, "row")


def test_a_missing_reader_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for name in ("data.parquet", "data.zst"):
        with pytest.raises(DataError, match=r"needs pyarrow; `pip install 'pedro-platform\[train\]'`"):
            check_file(CASES / name)


def test_archives_and_broken_files_are_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.jsonl", "w") as archive:
        archive.writestr("rows.jsonl", '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="a zip archive"):
        check_file(tmp_path / "rows.jsonl")
    for name, content, reason in (
        ("a.jsonl", b"BZh91AY", "bzip2"),
        ("b.jsonl", gzip.compress(b"x" * 100_000, mtime=0)[:-20], "cannot be decompressed"),
        ("data.zst", (CASES / "data.zst").read_bytes(), "cannot be decompressed"),
        ("c.parquet", b"PAR1 but then nothing", "not a readable Parquet"),
        ("d.parquet", b'{"prompt": "a"}', "not a Parquet file"),
        ("e.parquet", gzip.compress(b"PAR1xxxx", mtime=0), "compressed Parquet"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=reason):
            check_file(tmp_path / name)


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(DataError, match="give a regular file"):
            check_file(path)
        with pytest.raises(DataError, match="give a regular file"):
            data_digest(path)


def test_names_cannot_steer_a_terminal(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b\\u001b[2J", "\\u001b[31mred": 1}\n{"\\u001b[0m": 1}\n')
    report = check_file(path)
    assert list(report.ignored) == ["\\x1b[31mred"]
    assert all(line.isprintable() for line in report.text().splitlines())


def test_json_lines_that_list_names_of_columns_are_no_table(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Name them: system, input, output, history.", "completion": "a"}) + "\n")
    assert kind(path) == "JSON lines"
    assert check_file(path).usable


def test_the_kind_of_a_file_is_told():
    assert kind(CASES / "data.parquet") == "parquet"
    assert "read as JSON array" in check_file(CASES / "array_pretty.json").text()
