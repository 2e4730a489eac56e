"""Rows on disk: what they hold, how they are cut, cached, split and collated."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import FORMATS, collate, data_digest, encode_completion, encode_prompt, load_rows, row_counts, split
from pedro.errors import DataError

RAW = FORMATS["raw"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_backbone("stories260K"))


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(path, max_length=512, form=RAW):
        return load_rows(path, tokenizer, form, max_length, tmp_path / "cache")

    return load


def rows(count, repeat=1):
    return [{"prompt": f"question {n // repeat}", "completion": f"answer {n}"} for n in range(count)]


def test_a_row_is_prompt_then_answer(write, load, tokenizer):
    dataset = load(write(rows(3)))
    row = dataset[1]
    prompt, completion = encode_prompt(tokenizer, "question 1"), encode_completion(tokenizer, "answer 1")
    assert row["input_ids"] == prompt + completion
    assert (row["prompt_len"], row["completion"], row["line"]) == (len(prompt), "answer 1", 2)
    assert 0 <= row["split_hash"] < 1


def test_rows_keep_the_order_of_the_file(write, load):
    dataset = load(write(rows(2500)))
    assert list(dataset["line"]) == list(range(1, 2501))


def test_a_long_answer_loses_its_end_and_a_long_prompt_its_row(write, load, tokenizer, caplog):
    short, long = {"prompt": "a", "completion": "b"}, "play " * 30
    path = write([short, {"prompt": "a", "completion": long}, {"prompt": long, "completion": "b"}])
    dataset = load(path, max_length=12)
    counts = row_counts(dataset)
    assert (counts.examples, counts.rows, counts.truncated, counts.dropped) == (3, 2, 1, 1)
    assert list(dataset["line"]) == [1, 2]
    whole = encode_prompt(tokenizer, "a") + encode_completion(tokenizer, long)
    assert dataset[1]["input_ids"] == whole[:12]
    assert "1 of 3 answers are cut short and 1 examples left out" in caplog.text


def test_a_prompt_with_room_for_one_answer_token_is_kept(write, load, tokenizer):
    path = write([{"prompt": "play play", "completion": "play"}])
    room = len(encode_prompt(tokenizer, "play play"))
    assert len(load(path, max_length=room + 1)[0]["input_ids"]) == room + 1
    with pytest.raises(DataError, match=f"fits into max_length {room}"):
        load(path, max_length=room)


def test_bad_lines_stop_the_load_and_are_all_counted(write, load, tmp_path):
    path = write([*rows(3), {"prompt": 1, "completion": "x"}, *[{"x": 1}] * 8])
    with pytest.raises(DataError, match=r"9 bad line.*line 4: prompt: expected text.*and 4 more.*pedro data check"):
        load(path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_empty_file_cannot_be_loaded(write, load):
    with pytest.raises(DataError, match="no examples"):
        load(write([]))


def test_a_row_that_its_format_refuses_names_its_line(write, load):
    path = write([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}])
    with pytest.raises(DataError, match=r"line 1: messages: .*takes one user message"):
        load(path, form=FORMATS["alpaca"])


def test_a_long_file_tells_how_far_it_is(write, tokenizer, tmp_path, monkeypatch):
    path, told = write(rows(1100)), []
    monkeypatch.setattr("pedro.data.dataset.TELL_EVERY_S", 0)
    for _ in range(2):  # the second finds what the first made
        load_rows(path, tokenizer, RAW, 512, tmp_path / "cache", tell=told.append)
        assert told == ["1,000 examples tokenised", "1,100 examples tokenised"]


def test_the_cache_is_used_again(write, load, tmp_path):
    path = write(rows(5))
    load(path)
    (entry,) = (tmp_path / "cache").iterdir()
    stamp = (entry / "rows.arrow").stat().st_mtime_ns
    load(path)
    assert (entry / "rows.arrow").stat().st_mtime_ns == stamp


def test_whatever_the_rows_depend_on_makes_a_new_cache_entry(write, load, tmp_path, tokenizer):
    path = write(rows(5))
    load(path)
    load(path, max_length=100)
    load(path, form=FORMATS["chat"])
    load(write(rows(6)))
    other = load_tokenizer(resolve_backbone("stories260K"))
    other.add_tokens(["question"])
    load_rows(path, other, RAW, 512, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_the_same_content_elsewhere_is_the_same_entry(write, load, tmp_path):
    load(write(rows(5)))
    load(write(rows(5), "copy.jsonl"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_half_written_entry_is_never_read(write, load, tmp_path):
    path = write(rows(5))
    load(path)
    (entry,) = (tmp_path / "cache").iterdir()
    half = entry.with_name(f".{entry.name}-killed")
    entry.rename(half)
    (half / "rows.arrow").write_bytes(b"half")
    assert len(load(path)) == 5


def test_what_killed_processes_left_is_removed_a_day_later(write, load, tmp_path):
    old, fresh = tmp_path / "cache" / ".rows-x-old", tmp_path / "cache" / ".rows-x-fresh"
    old.mkdir(parents=True)
    fresh.mkdir()
    os.utime(old, (0, 0))
    load(write(rows(5)))
    assert not old.exists()
    assert fresh.exists()


def _load_in_child(path, cache, barrier, queue):
    tokenizer = load_tokenizer(resolve_backbone("stories260K"))
    barrier.wait()
    dataset = load_rows(path, tokenizer, RAW, 512, cache)
    queue.put((len(dataset), sum(map(sum, dataset["input_ids"]))))


@pytest.mark.slow
def test_two_processes_may_load_one_file_at_once(write, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    arguments = (write(rows(3000)), tmp_path / "cache", barrier, queue)
    children = [context.Process(target=_load_in_child, args=arguments) for _ in range(2)]
    for child in children:
        child.start()
    first, second = (queue.get(timeout=600) for _ in children)
    for child in children:
        child.join()
    assert first == second
    assert first[0] == 3000
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_digest_is_that_of_the_bytes(write):
    path = write(rows(3))
    assert data_digest(path) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_equal_prompts_fall_on_one_side(write, load):
    parts = split(load(write(rows(2000, repeat=4))), theta=0.2, validation=0.2)
    prompts = [
        {line // 4 for line in (n - 1 for n in part["line"])} for part in (parts.train, parts.theta, parts.validation)
    ]
    assert sum(len(p) for p in prompts) == 500
    assert len(set.union(*prompts)) == 500
    sizes = [len(part) / 2000 for part in (parts.train, parts.theta, parts.validation)]
    assert sizes == pytest.approx([0.6, 0.2, 0.2], abs=0.06)


def test_rows_that_were_picked_by_a_plain_hash_are_cut_evenly(write, load):
    def plain(row):
        return hashlib.sha256(row["prompt"].encode()).digest()

    parts = split(load(write(sorted(rows(8000), key=plain)[:1000])), theta=0.1, validation=0.1)
    assert len(parts.train) == pytest.approx(800, abs=50)


def test_a_row_stays_on_its_side_when_the_file_grows(write, load):
    def validation_prompts(count):
        parts = split(load(write(rows(count), f"{count}.jsonl")))
        return {row["line"] for row in parts.validation if row["line"] <= 300}

    assert validation_prompts(300) == validation_prompts(600)


def test_a_share_of_0_is_an_empty_part(write, load):
    parts = split(load(write(rows(50))), theta=0, validation=0)
    assert (len(parts.train), len(parts.theta), len(parts.validation)) == (50, 0, 0)


@pytest.mark.parametrize(
    ("theta", "validation", "reason"),
    [
        (-0.1, 0.1, "data.theta: expected a share"),
        (0.1, 1.0, "data.validation: expected a share"),
        (0.5, 0.5, "nothing"),
    ],
)
def test_impossible_shares_are_refused(write, load, theta, validation, reason):
    with pytest.raises(DataError, match=reason):
        split(load(write(rows(50))), theta=theta, validation=validation)


def test_a_share_that_catches_no_row_is_refused(write, load):
    with pytest.raises(DataError, match=r"data\.\w+: its share of 2 rows holds none"):
        split(load(write(rows(2))))


def test_a_batch_is_padded_on_the_right_and_masked(write, load, tokenizer):
    dataset = load(write([{"prompt": "a", "completion": "play"}, {"prompt": "a a", "completion": "a play"}]))
    batch = collate([dataset[0], dataset[1]], pad_id=0)
    first, second = dataset[0]["input_ids"], dataset[1]["input_ids"]
    pad = len(second) - len(first)
    assert batch["input_ids"] == [first + [0] * pad, second]
    assert batch["attention_mask"] == [[1] * len(first) + [0] * pad, [1] * len(second)]
    assert batch["prompt_lens"] == [2, 3]
    assert batch["labels"] == [[-100, -100, *first[2:]] + [-100] * pad, [-100] * 3 + second[3:]]
    assert batch["labels"][1][-1] == tokenizer.eos_token_id
    assert collate(dataset[0:2], pad_id=0) == batch


STREAM = """
import resource, sys, json
from pathlib import Path
import numpy
from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import FORMATS, load_rows, row_counts
tokenizer = load_tokenizer(resolve_backbone("stories260K"))
def peak(path, cache):
    dataset = load_rows(path, tokenizer, FORMATS["raw"], 512, cache)
    return len(dataset), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, before = peak(sys.argv[1], sys.argv[3])
count, after = peak(sys.argv[2], sys.argv[3])
print(count, after - before)
"""


@pytest.mark.slow
def test_50_mb_become_rows_without_being_held_in_memory(write, tmp_path):
    def big(count):
        return (
            {"prompt": f"{n} " + "play with the big friend " * 8, "completion": "happy day " * 8} for n in range(count)
        )

    small, large = write(big(4_000), "small.jsonl"), write(big(160_000), "large.jsonl")
    assert large.stat().st_size > 48_000_000
    command = [sys.executable, "-c", STREAM, small, large, tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, grown_kb = map(int, done.stdout.split())
    assert count == 160_000
    assert grown_kb < 30_000
