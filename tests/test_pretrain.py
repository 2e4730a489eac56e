"""Pretraining a backbone: what is read and what never is, the schedule, resuming, quality, and a whole small run."""

import bz2
import gzip
import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch

from jobs.pretrain import corpus, publish
from jobs.pretrain.command_line import PRESETS, build_model, caught_signals, main
from jobs.pretrain.optimizer import orthogonal
from jobs.pretrain.prepare import RUN, prepare_data
from jobs.pretrain.pretrain_loop import CHECKPOINT, PretrainSettings, pretrain
from jobs.pretrain.quality import measure_quality
from jobs.pretrain.schedule import Schedule
from jobs.pretrain.token_windows import Stream, pack, train_tokenizer
from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data.prompt_format import encode_completion, encode_prompt
from pedro.errors import ConfigError, DataError, TrainingError

TALE = "the cat sat on a mat and the dog ran to an old red barn where it slept all day long"
WORDS = TALE.split()


def _sentences(count, start=0):
    return [" ".join(WORDS[(i * 3 + j) % len(WORDS)] for j in range(9)) + f" {i}." for i in range(start, start + count)]


def _squad(texts):
    asked = [{"question": "Who sat?", "id": "q", "answers": [{"text": "the cat", "answer_start": 0}]}]
    paragraphs = [{"context": text, "qas": asked} for text in texts]
    return gzip.compress(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}).encode())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few rows of every source, in its published form."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("public")
    sql = 'SELECT TABLEalias0.NOTES_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.A_FIELD = "var0" ;'

    def query(text):
        asked = {"question-split": "train", "text": text, "variables": {"var0": "B"}, "table-id": "1"}
        return json.dumps([{"sentences": [asked], "sql": [sql], "variables": [{"name": "var0", "example": "B"}]}])

    def write(name, content):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def snips(intent, texts):
        return json.dumps({intent: [{"data": [{"text": text}]} for text in texts]})

    write("squad/train-v1.1.json.gz", _squad(_sentences(60)))
    write("squad/dev-v1.1.json.gz", _squad(_sentences(4, 100)))
    for part, start in {"valid": 200, "test": 300}.items():
        lines = [f" {' '.join(_sentences(3, start + 3 * i))} \n" for i in range(4)]
        write(f"wikitext2/{part}.txt", " = Title = \n" + "".join(lines))
    write("wikisql/wikisql.json.bz2", bz2.compress(query("notes of var0").encode()))
    write("advising/advising.json", query("which notes has var0"))
    for part in ("train", "test"):
        write(f"gsm8k/{part}.jsonl", json.dumps({"question": "1 and 1?", "answer": "It is <<1+1=2>>2.\n#### 2"}) + "\n")
    for part in ("dev", "val", "test"):
        write(f"mmlu/{part}/anatomy_{part}.csv", f"Which {part}?,a,b,c,d,B\n")
    write("snips/train_PlayMusic.json", snips("PlayMusic", ["play jazz", "Said in both!", "play rock"]))
    write("snips/validate_PlayMusic.json", snips("PlayMusic", ["said in both", "play a waltz"]))
    found = {"train": [["my card", "balance"]], "val": [["pay a bill", "balance"]], "test": [["a loan", "balance"]]}
    write("clinc150/data_full.json", json.dumps(found))
    write("clinc150/domains.json", json.dumps({"banking": ["balance"]}))
    write("banking77/train.csv", "text,category\nwhere is my card,card_arrival\n")
    write("banking77/test.csv", "text,category\nit has not come,card_arrival\n")
    return root


def test_no_published_validation_or_test_row_is_read(data):
    found = corpus.documents(data)
    texts = [text for documents in found.values() for text in documents]
    assert set(found) == {source.name for source in corpus.SOURCES}
    assert all(found.values())
    assert found["snips"] == ["play jazz", "play rock"]  # what a validation row says is left out of the training part
    for held in corpus.held_out(data):
        assert held.pieces
        assert not set(held.pieces) & set(texts)
    assert not any("Which val" in text or "Which test" in text for text in texts)


def test_a_passage_comes_with_its_questions_and_answers(data):
    assert corpus.documents(data)["squad"][0].endswith("\nQuestion: Who sat?\nAnswer: the cat")


def test_wikitext_is_read_as_plain_prose():
    spaced = " The \" big \" <unk> of 1 @,@ 000 co @-@ op ( see it ) , wasn 't Lee 's . "
    assert corpus.plain(spaced) == "The \"big\" unknown of 1,000 co-op (see it), wasn't Lee's."


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(_sentences(200), 300)


def test_the_tokenizer_gives_back_what_it_was_given(tokenizer):
    for text in ("the cat", " two  spaces", "naïve – 日本\n\tx", ""):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id


def test_an_answer_apart_from_its_prompt_is_the_word_that_would_have_followed(tokenizer):
    apart = [*encode_prompt(tokenizer, "the cat sat"), *encode_completion(tokenizer, "on a mat")]
    assert apart == [*tokenizer("the cat sat on a mat").input_ids, tokenizer.eos_token_id]


def test_every_document_is_packed_once_between_its_marks(tokenizer):
    groups = [_sentences(5), _sentences(3, 50)]
    ids, counts = pack(tokenizer, groups, seed=1)
    assert len(ids) == sum(counts)
    texts = tokenizer.decode(ids.tolist()).split("<s>")
    assert sorted(text.removesuffix("</s>").strip() for text in texts if text) == sorted([*groups[0], *groups[1]])


def test_windows_are_a_function_of_the_seed_and_an_epoch_has_each_once():
    stream = Stream(np.arange(101, dtype=np.uint16), context=10, seed=3)
    epoch = torch.cat([stream.batch(first, 5) for first in (0, 5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert torch.equal(epoch[:, 1:-1], epoch[:, :-2] + 1)
    assert torch.equal(Stream(stream.ids, 10, 3).batch(5, 5), epoch[5:])
    assert not torch.equal(stream.batch(10, 10), epoch)


def test_the_rate_rises_holds_and_falls_to_nothing_at_the_end_of_the_budget():
    schedule = Schedule(lr=1.0, warmup_tokens=10, decay=0.25, tokens=100)
    assert schedule.rate(4, None) == 0.5
    assert schedule.rate(50, None) == 1.0
    assert not schedule.decay_is_due(74, 0, 0)
    assert schedule.decay_is_due(75, 0, 0)
    assert schedule.rate(88, 75) == pytest.approx(0.48)
    assert not schedule.is_over(99, 75)
    assert schedule.is_over(100, 75)


def test_the_decay_begins_so_that_it_ends_within_the_time():
    schedule = Schedule(lr=1.0, warmup_tokens=10, decay=0.5, seconds=100)
    assert not schedule.decay_is_due(450, 45, 10)  # 450 tokens more take 45 s
    assert schedule.decay_is_due(500, 50, 10)


def test_an_update_of_muon_has_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def _settings(tokens):
    return PretrainSettings(Schedule(0.02, 512, tokens=tokens), rows=4, micro_rows=2, log_every=2, look_every=4)


def _train(folder, stops_after=None):
    """A tiny model on fixed ids; its state and parameters."""
    stream = Stream(np.random.default_rng(0).integers(0, 512, 20_000).astype(np.uint16), 32, seed=0)
    options = type("Options", (), {"seed": 0})
    model = build_model(PRESETS["tiny"], options)
    looks = iter(range(1000))
    state = pretrain(
        model,
        stream,
        _settings(2048),
        folder,
        lambda model: {"text": 1.0},
        stopped=lambda: stops_after is not None and next(looks) >= stops_after,
        log=lambda line: None,
    )
    return state, [parameter.detach().clone() for parameter in model.parameters()]


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_run(tmp_path):
    whole, parameters = _train(tmp_path / "whole")
    assert (whole.tokens, whole.decay_from) == (2048, 1536)
    halfway, _ = _train(tmp_path / "cut", stops_after=5)
    assert halfway.step == 5
    resumed, again = _train(tmp_path / "cut")
    assert all(torch.equal(one, other) for one, other in zip(parameters, again, strict=True))
    assert json.dumps([resumed.losses, resumed.looks]) == json.dumps([whole.losses, whole.looks])
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [CHECKPOINT]


def _diverged():
    model = build_model(PRESETS["tiny"], type("Options", (), {"seed": 0}))
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    return model


def test_a_loss_that_is_no_number_ends_the_run_with_the_remedy(tmp_path, tokenizer):
    stream = Stream(np.zeros(1000, dtype=np.uint16), 32, seed=0)
    with pytest.raises(TrainingError, match="loss: it is nan at step 1; start again with a lower --lr"):
        pretrain(_diverged(), stream, _settings(2048), tmp_path, lambda model: {}, log=lambda line: None)
    with pytest.raises(TrainingError, match="loss: it is nan on held-out text; start again with a lower --lr"):
        measure_quality(_diverged(), tokenizer, ["the cat sat"], 512)


def test_a_damaged_checkpoint_is_told_with_the_remedy(tmp_path):
    _train(tmp_path, stops_after=1)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"checkpoint: '.*' is damaged \(.*\); delete it to begin again"):
        _train(tmp_path)


def test_stop_signals_are_caught_within_training_alone():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert sorted(caught) == [signal.SIGINT, signal.SIGTERM]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_quality_counts_every_token_once_and_agrees_with_the_models_own_loss():
    backbone = resolve_backbone("stories260K")
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    text = "Once upon a time, there was a little girl who had a big red ball. She ran to the park with it."
    ids = torch.tensor([encode_prompt(tokenizer, text)])
    nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    found = measure_quality(model, tokenizer, [text, text[:30]], 512)
    alone = measure_quality(model, tokenizer, [text], 512)
    assert alone.tokens == ids.shape[1] - 1
    assert alone.bits_per_char == pytest.approx(nats / math.log(2) / len(text), abs=1e-5)
    assert alone.perplexity == pytest.approx(math.exp(nats / alone.tokens), rel=1e-4)
    cut = measure_quality(model, tokenizer, [text, text[:30]], 16)
    assert (cut.tokens, cut.chars) == (found.tokens, found.chars)
    assert found.bits_per_char < cut.bits_per_char < 3 * found.bits_per_char


def _words(data, out):
    """The command line of a small run."""
    result = out / "results" / "pretrain.json"
    return ["--data", str(data), "--out", str(out), "--preset", "tiny", "--tokens", "45056", "--result", str(result)]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a small run that is over."""
    out = tmp_path_factory.mktemp("finished")
    assert main([*_words(data, out), "--name", "small"]) == 0
    return out


def test_a_small_run_publishes_a_backbone_with_its_provenance(data, finished):
    result_file = finished / "results" / "pretrain.json"
    backbone = resolve_backbone(str(finished / "final"))
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    result = json.loads(result_file.read_text())
    assert 45056 <= result["run"]["tokens"] < 45056 + 2 * 2048  # a step has 2,048
    assert result["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {entry["licence"] for entry in result["corpus"]["sources"]} >= {"CC BY-SA 4.0", "MIT", "CC0 1.0"}
    text = corpus.held_out(data)[1]
    again = measure_quality(model, tokenizer, text.pieces, 512)
    assert again.bits_per_char == pytest.approx(result["quality"]["squad"]["bits_per_char"], abs=1e-4)
    assert result["curve"]["train_loss"][-1][1] < result["curve"]["train_loss"][0][1]
    page = (finished / "final" / "PROVENANCE.md").read_text()
    assert "rajpurkar/SQuAD-explorer" in page
    assert "SQuAD dev" in page
    assert "CC BY-SA 4.0" in (finished / "final" / "LICENSE").read_text()
    assert result_file.with_suffix(".png").stat().st_size > 10_000
    assert not list(finished.rglob("*.new"))


def test_a_finished_run_says_that_it_is_over_and_publishes_the_same_model(data, finished, capsys):
    digest = resolve_backbone(str(finished / "final")).digest
    tokens = json.loads((finished / "results" / "pretrain.json").read_text())["run"]["tokens"]
    assert main([*_words(data, finished), "--tokens", "99999", "--name", "renamed"]) == 0
    assert f"is over after {tokens:,} tokens; for another one use a new --out" in capsys.readouterr().out
    assert resolve_backbone(str(finished / "final")).digest == digest


def test_publishing_that_fails_leaves_the_former_backbone_whole(finished, tmp_path):
    result = json.loads((finished / "results" / "pretrain.json").read_text())
    backbone = resolve_backbone(str(shutil.copytree(finished / "final", tmp_path / "final")))
    model = build_model(PRESETS["tiny"], type("Options", (), {"seed": 1}))
    with pytest.raises(KeyError):
        publish.publish(model, load_tokenizer(backbone), backbone.directory, {**result, "run": {}})
    assert resolve_backbone(str(backbone.directory)).digest == backbone.digest
    publish.publish(model, load_tokenizer(backbone), backbone.directory, result)
    assert resolve_backbone(str(backbone.directory)).digest != backbone.digest
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


MADE_WITH = {"preset": "tiny", "seed": 0, "lr": 0.02, "decay": 0.25}


def _prepare(data, out, context=512, **others):
    return prepare_data(data, out, {**MADE_WITH, "data": str(data.resolve()), **others}, 512, context)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--preset", "cpu"], "preset 'tiny', not preset 'cpu'"),
        (["--seed", "1", "--lr", "0.5"], "seed 0, lr 0.02, not seed 1, lr 0.5"),
        (["--decay", "0.5"], "decay 0.25, not decay 0.5"),
    ],
)
def test_a_folder_goes_on_only_with_what_it_was_made_with(data, tmp_path, words, told):
    _prepare(data, tmp_path)
    with pytest.raises(SystemExit, match=rf"error: out: '.*' was made with {told}; use a new --out"):
        main([*_words(data, tmp_path), *words])
    other = shutil.copytree(data, tmp_path / "other")
    with pytest.raises(SystemExit, match=r"was made with data '.*', not data '.*other'; use a new --out"):
        main(_words(other, tmp_path))


def test_what_was_left_half_made_is_made_again_and_what_is_damaged_is_told(data, tmp_path):
    ids = np.array(_prepare(data, tmp_path).ids)
    (tmp_path / RUN).unlink()
    (tmp_path / "data" / "ids.npy").write_bytes(b"")
    assert np.array_equal(_prepare(data, tmp_path).ids, ids)
    (tmp_path / "data" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"out: '.*' is damaged \(.*\); use a new --out"):
        _prepare(data, tmp_path)
    (tmp_path / RUN).write_text("")
    with pytest.raises(DataError, match=r"out: '.*' is damaged \(.*\); use a new --out"):
        _prepare(data, tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_told_in_one_line(data, tmp_path):
    (tmp_path / f"{CHECKPOINT}.new").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*; check the path and the room on its disk"):
        main([*_words(data, tmp_path), "--tokens", "1"])


def test_a_checkpoint_of_unknown_settings_is_not_gone_on_from(data, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds a checkpoint, but no run\.json"):
        _prepare(data, tmp_path)


def test_text_of_less_than_a_window_is_refused_and_leaves_no_mark(data, tmp_path):
    with pytest.raises(DataError, match=r"has \d+ tokens, but a window takes 1000001; give more text"):
        _prepare(data, tmp_path, context=1_000_000)
    assert not (tmp_path / RUN).exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("banking77/train.csv", b"words,category\na,b\n", r"banking77 under .* \(KeyError: 'text'\); fetch it again"),
        ("wikitext2/valid.txt", b"\xff" * 100, r"wikitext2 under .* \(UnicodeDecodeError: .*\); fetch it again"),
        ("wikitext2/valid.txt", b"", "wikitext2 under .* holds no document; fetch it again"),
    ],
)
def test_a_source_in_another_form_is_told_in_one_line(data, tmp_path, name, content, told):
    root = shutil.copytree(data, tmp_path / "public")
    (root / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        corpus.documents(root)


def test_a_question_without_answers_is_told_in_one_line(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "public")
    whole = gzip.decompress((root / "squad/train-v1.1.json.gz").read_bytes())
    bare = whole.replace(json.dumps([{"text": "the cat", "answer_start": 0}]).encode(), b"[]")
    (root / "squad/train-v1.1.json.gz").write_bytes(gzip.compress(bare))
    with pytest.raises(DataError, match=r"squad under .* is missing or not as published \(IndexError: .*\)"):
        corpus.documents(root)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_an_unusable_held_out_text_is_told_before_anything_is_made(data, tmp_path, content):
    root = shutil.copytree(data, tmp_path / "public")
    (root / "wikitext2/test.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: data: .*fetch it again"):
        main(_words(root, tmp_path / "out"))
    assert not (tmp_path / "out" / RUN).exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("r.png", "is where the figure goes; give it another suffix, such as .json"),
        ("", "cannot be written: Is a directory; choose another path"),
        ("file/r.json", "cannot be written: .*; choose another path"),
    ],
)
def test_a_result_that_cannot_be_written_is_told_before_anything_is_made(data, tmp_path, name, told):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"error: result: '.*' {told}"):
        main([*_words(data, tmp_path / "out"), "--result", str(tmp_path / name)])
    assert not (tmp_path / "out" / RUN).exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a budget: --tokens or --minutes"),
        (["--minutes", "-1"], "--minutes: expected a number above 0, got -1"),
        (["--tokens", "many"], "--tokens: invalid number value: 'many'"),
        (["--tokens", "9", "--lr", "nan"], "--lr: expected a number above 0, got nan"),
        (["--tokens", "9", "--seed", "-1"], "--seed: expected a whole number from 0 and below 2**63, got -1"),
        (["--tokens", "9", "--seed", str(2**70)], "--seed: expected a whole number from 0 and below 2**63"),
        (["--tokens", "9", "--decay", "1"], "--decay: expected a share from 0 and below 1, got 1"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(tmp_path, capsys, words, told):
    with pytest.raises(SystemExit) as caught:
        main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_missing_sources_and_a_model_that_is_too_large_are_told_before_any_training(data, tmp_path, monkeypatch):
    words = ["--preset", "tiny", "--tokens", "9", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"error: data: \w+ under '.*nowhere' is missing"):
        main(["--data", str(tmp_path / "nowhere"), *words])
    monkeypatch.setattr(publish, "LIMIT_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"error: preset: .* MB in bf16"):
        main(["--data", str(data), *words])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: out: '.*file/out/run.json' cannot be written: Not a directory"):
        main(["--data", str(data), *words[:-1], str(tmp_path / "file" / "out")])
