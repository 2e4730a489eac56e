"""Pretraining a backbone: what is read and what never is, the schedule, resuming, quality, and a whole small run."""

import bz2
import gzip
import json
import math

import numpy as np
import pytest
import torch

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data.formats import encode_completion, encode_prompt
from pedro.training.pretrain import corpus, publish
from pedro.training.pretrain.loop import CHECKPOINT, Settings, train
from pedro.training.pretrain.main import PRESETS, build, main
from pedro.training.pretrain.optimizer import orthogonal
from pedro.training.pretrain.quality import measure
from pedro.training.pretrain.schedule import Schedule
from pedro.training.pretrain.tokens import Stream, pack, train_tokenizer

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
    return Settings(Schedule(0.02, 512, tokens=tokens), rows=4, micro_rows=2, log_every=2, look_every=4)


def _train(folder, stops_after=None):
    """A tiny model on fixed ids; its state and parameters."""
    stream = Stream(np.random.default_rng(0).integers(0, 512, 20_000).astype(np.uint16), 32, seed=0)
    options = type("Options", (), {"seed": 0})
    model = build(PRESETS["tiny"], options)
    looks = iter(range(1000))
    state = train(
        model,
        stream,
        _settings(2048),
        folder,
        lambda model: {"text": 1.0},
        stopped=lambda: stops_after is not None and next(looks) >= stops_after,
        say=lambda line: None,
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


def test_a_loss_that_is_no_number_ends_the_run_with_the_remedy(tmp_path):
    stream = Stream(np.zeros(1000, dtype=np.uint16), 32, seed=0)
    model = build(PRESETS["tiny"], type("Options", (), {"seed": 0}))
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(model, stream, _settings(2048), tmp_path, lambda model: {}, say=lambda line: None)


def test_quality_counts_every_token_once_and_agrees_with_the_models_own_loss():
    backbone = resolve_backbone("stories260K")
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    text = "Once upon a time, there was a little girl who had a big red ball. She ran to the park with it."
    ids = torch.tensor([encode_prompt(tokenizer, text)])
    nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    found = measure(model, tokenizer, [text, text[:30]], 512)
    alone = measure(model, tokenizer, [text], 512)
    assert alone.tokens == ids.shape[1] - 1
    assert alone.bits_per_char == pytest.approx(nats / math.log(2) / len(text), abs=1e-5)
    assert alone.perplexity == pytest.approx(math.exp(nats / alone.tokens), rel=1e-4)
    cut = measure(model, tokenizer, [text, text[:30]], 16)
    assert (cut.tokens, cut.chars) == (found.tokens, found.chars)
    assert found.bits_per_char < cut.bits_per_char < 3 * found.bits_per_char


def test_a_small_run_publishes_a_backbone_with_its_provenance(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    result_file = tmp_path / "results" / "pretrain.json"
    arguments = ["--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--result", str(result_file)]
    assert main([*arguments, "--tokens", "45056", "--name", "small"]) == 0
    backbone = resolve_backbone(str(tmp_path / "final"))
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    result = json.loads(result_file.read_text())
    assert 45056 <= result["run"]["tokens"] < 45056 + 2 * 2048  # a step has 2,048
    assert result["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {entry["licence"] for entry in result["corpus"]["sources"]} >= {"CC BY-SA 4.0", "MIT", "CC0 1.0"}
    text = corpus.held_out(data)[1]
    again = measure(model, tokenizer, text.pieces, 512)
    assert again.bits_per_char == pytest.approx(result["quality"]["squad"]["bits_per_char"], abs=1e-4)
    assert result["curve"]["train_loss"][-1][1] < result["curve"]["train_loss"][0][1]
    page = (tmp_path / "final" / "PROVENANCE.md").read_text()
    assert "rajpurkar/SQuAD-explorer" in page
    assert "SQuAD dev" in page
    assert "CC BY-SA 4.0" in (tmp_path / "final" / "LICENSE").read_text()
    assert result_file.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a budget: --tokens or --minutes"),
        (["--minutes", "-1"], "--minutes: expected a number above 0, got -1"),
        (["--tokens", "many"], "--tokens: invalid number value: 'many'"),
        (["--tokens", "9", "--lr", "nan"], "--lr: expected a number above 0, got nan"),
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
    with pytest.raises(SystemExit, match=r"error: \w+: '.*nowhere/\w+' does not hold"):
        main(["--data", str(tmp_path / "nowhere"), *words])
    monkeypatch.setattr(publish, "LIMIT_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"error: preset: .* MB in bf16"):
        main(["--data", str(data), *words])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"error: .*file/out/data: Not a directory; check the path"):
        main(["--data", str(data), *words[:-1], str(tmp_path / "file" / "out")])
