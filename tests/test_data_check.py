"""What `pedro data check` finds in a file, and that it never holds one in memory."""

import json
import subprocess
import sys

import pytest

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import FORMATS, PromptFormat, check_file, shape_of, show_masks
from pedro.data.row_reader import MAX_LINE_BYTES
from pedro.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_backbone("stories260K"))


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.jsonl"):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(content)
        return path

    return write


def row(prompt, completion="yes"):
    return {"prompt": prompt, "completion": completion}


def test_a_good_file_is_usable(write, tokenizer):
    report = check_file(write([row("a"), row("be"), row("see", "no")]), tokenizer, 512)
    assert report.usable
    assert (report.shape, report.format, report.rows, report.examples) == ("completion", "raw", 3, 3)
    assert (report.truncated, report.dropped, report.duplicates, report.empty_answers) == (0, 0, 0, 0)
    assert (
        report.prompt_tokens.min <= report.prompt_tokens.median <= report.prompt_tokens.p95 <= report.prompt_tokens.max
    )
    assert json.loads(json.dumps(report.to_dict()))["usable"] is True
    assert "usable" in report.text()


def test_token_statistics_count_bos_and_eos(write, tokenizer):
    report = check_file(write([row("a", "play")]), tokenizer)
    assert (report.prompt_tokens.max, report.completion_tokens.max) == (2, 2)
    assert report.truncated is None


def test_every_bad_line_is_listed_with_its_number(write):
    report = check_file(write([row("a"), "\n", "{\n", row(3), {"text": "x"}, row("b")]))
    assert not report.usable
    assert [(e["line"], e["field"]) for e in report.errors] == [(3, "line"), (4, "prompt"), (5, "line")]
    assert report.examples == 2
    assert "line 4: prompt: expected text, got a number" in report.text()


def test_at_most_100_errors_are_kept_and_all_are_counted(write):
    report = check_file(write(["{\n"] * 250))
    assert (len(report.errors), report.error_count) == (100, 250)
    assert "and 240 more bad lines" in report.text()
    assert len(report.text().splitlines()) < 25
    assert 'a good row  {"prompt"' in report.text()


def test_an_empty_file_is_not_usable(write):
    for content in (b"", b"\n\n  \n", b"\xef\xbb\xbf"):
        report = check_file(write(content))
        assert not report.usable
        assert report.examples == 0
        assert "no examples" in report.text()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl.*No such file"):
        check_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="directory"):
        check_file(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write):
    text = json.dumps(row("naïve")) + "\r\n" + json.dumps(row("b")) + "\r\n"
    report = check_file(write(b"\xef\xbb\xbf" + text.encode()))
    assert report.usable
    assert report.examples == 2


def test_bytes_that_are_not_utf8_are_an_error_of_their_line(write):
    content = (
        json.dumps(row("a")).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n' + json.dumps(row("b")).encode()
    )
    report = check_file(write(content))
    assert [(e["line"], e["field"]) for e in report.errors] == [(2, "line")]
    assert "byte 16 (0xe9) is not UTF-8" in report.errors[0]["reason"]
    assert report.examples == 2


def test_utf16_is_recognised(write):
    report = check_file(write(json.dumps(row("a")).encode("utf-16")))
    assert "looks like UTF-16" in report.errors[0]["reason"]


def test_a_line_of_3_mb_is_an_error_and_the_next_line_is_read(write):
    report = check_file(write([row("a"), row("x" * 3_000_000), row("b")]))
    (error,) = report.errors
    assert error["line"] == 2
    assert "3,000,0" in error["reason"]
    assert f"{MAX_LINE_BYTES:,} at most" in error["reason"]
    assert report.examples == 2


def test_a_last_line_without_newline_may_be_too_long_as_well(write):
    report = check_file(write(json.dumps(row("x" * 3_000_000)).encode()))
    assert report.error_count == 1


def test_a_file_holds_one_shape(write):
    other = {"instruction": "a", "output": "b"}
    report = check_file(write([row("a"), other, row("b"), other]))
    assert [(e["line"], e["field"]) for e in report.errors] == [(2, "shape"), (4, "shape")]
    assert "this is alpaca, but line 1 is completion" in report.errors[0]["reason"]


def test_the_first_good_line_says_the_shape(write):
    assert shape_of(write(["{\n", row("a")])) == "completion"
    with pytest.raises(DataError, match="1 bad line"):
        shape_of(write(["{\n"]))
    with pytest.raises(DataError, match="no examples"):
        shape_of(write(b""))


def test_the_commonest_answers_are_listed_with_their_counts(write):
    rows = [row(str(n), "yes" if n % 3 else "no") for n in range(30)] + [row(f"x{n}", f"{n}") for n in range(2000)]
    report = check_file(write(rows))
    assert (len(report.answers), report.answers[:2]) == (5, (("yes", 20), ("no", 10)))
    assert "commonest: 'yes' 20×, 'no' 10×" in report.text()


def test_duplicates_repeat_prompt_and_answer(write):
    report = check_file(write([row("a"), row("a"), row("a", "no"), row("b"), row("a")]))
    assert report.duplicates == 2


def test_a_boundary_moved_between_prompt_and_answer_is_no_duplicate(write):
    assert check_file(write([row("ab", "c"), row("a", "bc")])).duplicates == 0


def test_empty_answers_are_counted(write):
    report = check_file(write([row("a", ""), row("b", " \n"), row("c")]))
    assert report.empty_answers == 2
    assert report.usable


def test_leakage_counts_prompts_that_validation_has_too(write):
    train = write([row("a"), row("b"), row("b", "no"), row("c")])
    validation = write([row("b", "maybe"), row("c"), row("d"), "{\n"], "validation.jsonl")
    report = check_file(train, validation=validation)
    assert (report.leaked, report.validation_examples, report.validation_errors) == (2, 3, 1)
    assert check_file(train).leaked is None


def test_truncations_and_drops_are_counted(write, tokenizer):
    path = write([row("a"), row("a", "play " * 20), row("play " * 20)])
    report = check_file(path, tokenizer, max_length=10)
    assert (report.truncated, report.dropped) == (1, 1)
    assert "1 answers truncated, 1 examples dropped at 10 tokens" in report.text()


def test_a_file_of_which_nothing_fits_is_not_usable(write, tokenizer):
    report = check_file(write([row("play " * 20)]), tokenizer, max_length=10)
    assert report.error_count == 0
    assert not report.usable


def test_fields_that_are_not_learnt_from_are_counted(write):
    report = check_file(write([{**row("a"), "id": 1}, {**row("b"), "id": 2, "tag": "x"}]))
    assert report.ignored == {"id": 2, "tag": 1}


def test_field_names_without_end_do_not_fill_the_report(write):
    report = check_file(write([{**row("a"), f"field {n}" + "x" * 100: n} for n in range(50)]))
    assert len(report.ignored) == 21
    assert report.ignored["other fields"] == 30
    assert max(map(len, report.ignored)) <= 40


def test_a_template_that_refuses_a_row_is_an_error_of_its_line(write):
    picky = PromptFormat("chat", "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}x")
    answer = {"role": "assistant", "content": "b"}
    user = {"role": "user", "content": "a"}
    report = check_file(write([{"messages": [user, answer]}, {"messages": [user, user, answer]}]), format=picky)
    (error,) = report.errors
    assert error["line"] == 2
    assert "one turn only" in error["reason"]


def test_masks_hide_the_prompt_and_supervise_the_end(write, tokenizer):
    path = write([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "play"}]}] * 5)
    shown = show_masks(path, tokenizer, 3)
    assert len(shown) == 3
    first = shown[0]
    assert first.prompt == FORMATS["chat"].render([{"role": "user", "content": "Hi"}])
    assert first.tokens[first.prompt_len :] == ("▁play", tokenizer.eos_token)
    assert first.supervised == (False,) * first.prompt_len + (True, True)
    assert first.token_ids[: first.prompt_len].count(tokenizer.bos_token_id) == 1
    assert first.text().endswith(f"[▁play][{tokenizer.eos_token}]")


def test_masks_of_a_bad_file_say_what_is_wrong(write, tokenizer):
    with pytest.raises(DataError, match="line 1: line: not JSON"):
        show_masks(write(["{\n"]), tokenizer)
    with pytest.raises(DataError, match="no examples"):
        show_masks(write(b""), tokenizer)


MEASURE = """
import resource, sys
import numpy
from pedro.data import check_file
check_file(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = check_file(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.examples, report.duplicates, after - before)
"""


@pytest.mark.slow
def test_50_mb_are_checked_in_a_few_mb_of_memory(write, tmp_path):
    small = write([row("a")], "small.jsonl")
    path = tmp_path / "big.jsonl"
    with path.open("w") as stream:
        for number in range(50_000):
            stream.write(json.dumps(row(f"{number} " + "lorem ipsum " * 80)) + "\n")
    assert path.stat().st_size > 48_000_000
    done = subprocess.run([sys.executable, "-c", MEASURE, path, small], capture_output=True, text=True, check=True)
    examples, duplicates, grown_kb = map(int, done.stdout.split())
    assert (examples, duplicates) == (50_000, 0)
    assert grown_kb < 16_000
