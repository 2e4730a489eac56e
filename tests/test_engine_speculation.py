"""Drafts by prompt lookup: answers stay what they are, to each token and figure; what does not pay is left alone."""

import copy

import pytest
import torch
from cli_commands import command_runner
from engine_models import (
    VOCABULARY,
    Letters,
    drain,
    make_adapter,
    make_engine,
    prompt,
    random_backbone,
    request,
    run,
    stories,
)
from pydantic import ValidationError
from test_engine_masks import Cycle

from pedro.engine import EngineConfig, Request, SamplingParams
from pedro.engine import runner as runner_module
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.engine.sequence import Sequence
from pedro.engine.speculation import REMEASURED, RICH, DraftCosts, DraftHistory, Speculator, first_cost
from pedro.errors import BackboneError, ConfigError
from pedro.methods.servable import read_adapter
from pedro.serving.config import ServeConfig

KINDS = {"pedro": "pedro", "ia3": "ia3", "red": "red", "lora": "lora"}


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """A directory of adapters by kind, of the backbone `model`."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, method) in enumerate(KINDS.items()):
        make_adapter(model, folder / name, seed=number, method=method)
    return folder


class Cheap(DraftCosts):
    """Rows of drafts cost next to nothing, however long steps take here."""

    def of(self, rows):
        return 0.01

    def of_search(self, rows, seconds):
        return 0.0


def speculating(model, tokenizer=None, load=None, **config):
    engine = make_engine(model, tokenizer, load, **{"speculate": "ngram", **config})
    engine._speculator.costs = Cheap()
    return engine


def repeating(length, seed, period=7):
    """A prompt in which tokens follow each other again and again, now and then otherwise."""
    ids = (prompt(period, seed) * length)[:length]
    ids[length // 2] = 2 + seed % 90
    return ids


def assert_equal(made, expected):
    """The same outputs: tokens, one an output, texts, reasons, counts; log-probabilities as near as arithmetic is."""
    assert made.keys() == expected.keys()
    for name, answer in expected.items():
        fields = ("token_ids", "text", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens")
        for left, right in zip(made[name].outputs, answer.outputs, strict=True):
            assert [getattr(left, field) for field in fields] == [getattr(right, field) for field in fields], name
        assert [one.token_id for one in made[name].logprobs] == [one.token_id for one in answer.logprobs]
        for left, right in zip(made[name].logprobs, answer.logprobs, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
            assert [token for token, _ in left.top] == [token for token, _ in right.top]


def both(model, *requests, **options):
    """The engine that drafts, after it answered as one that does not."""
    engine = speculating(model, **options)
    made = run(engine, *requests)
    options.pop("num_speculative_tokens", None)
    assert_equal(made, run(make_engine(model, **options), *requests))
    return engine


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("drafted", [1, 5, 20])
def test_every_adapter_kind_answers_the_same_in_one_batch(kernel, drafted, model, adapters):
    asked = [
        request(f"{name}-{i}", repeating(20 + 13 * i, 3 * i + len(str(name))), 60, adapter=name, logprobs=2 * i or None)
        for i in range(2)
        for name in (None, *KINDS)
    ]
    options = {"max_batch": 6, "kernel": kernel, "num_speculative_tokens": drafted}
    engine = both(model, *asked, load=lambda ref: adapters / ref, **options)
    counts = engine.stats()["speculation"]
    assert counts["draft_tokens"] > counts["accepted_tokens"] > 50, "some were right and some wrong"
    assert engine.stats()["completion_tokens"] == 600


def test_sampled_answers_are_drawn_by_the_same_numbers(model, adapters):
    ways = [
        {"temperature": 0.4, "seed": 1},
        {"temperature": 0.7, "top_p": 0.8, "seed": 2, "logprobs": 1},
        {"temperature": 0.5, "top_k": 5, "seed": 3, "n": 3},
        {"temperature": 0.3, "seed": 4, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
        {"logit_bias": {9: 4.0, 11: -50.0}, "logprobs": 3},
        {"frequency_penalty": 0.6},
        {"min_p": 0.1, "temperature": 0.6, "seed": 5, "min_tokens": 20, "stop_token_ids": tuple(range(30))},
    ]
    asked = [
        request(f"r{i}", repeating(30, i), 50, adapter=("pedro", None, "lora")[i % 3], **way)
        for i, way in enumerate(ways)
    ]
    engine = both(model, *asked, load=lambda ref: adapters / ref, max_batch=10)
    assert engine.stats()["speculation"]["accepted_tokens"] > 0


def test_an_answer_ends_where_it_would_though_its_draft_goes_on():
    model, tokenizer, _ = stories()
    ids = tokenizer("Once upon a time, there was a little girl named Lily. Once upon a time, there was a").input_ids
    whole = run(make_engine(model, tokenizer), request("r", ids, 60))["r"]
    ends = [{"max_tokens": n} for n in (1, 2, 9, 17)]
    ends += [{"stop": (whole.text[at : at + 4],)} for at in (9, 22, 40)]
    ends += [{"stop_token_ids": (whole.token_ids[at],)} for at in (5, 11)]
    ends += [{"stop_token_ids": (whole.token_ids[3],), "min_tokens": 12}]
    asked = [request(f"r{i}", ids, **{"max_tokens": 60, **end}) for i, end in enumerate(ends)]
    engine = both(model, *asked, tokenizer=tokenizer, max_batch=8, prefix_bytes=1 << 20)
    assert engine.stats()["speculation"]["accepted_tokens"] > 20


def test_masked_answers_and_beams_are_not_guessed_and_do_not_keep_others_from_it(model):
    def asked(mask):
        held = request("held", repeating(20, 1), 30, new_mask=mask)
        return held, request("beams", repeating(20, 2), 20, num_beams=3), request("free", repeating(40, 3), 40)

    engine = speculating(model, max_batch=6)
    made = run(engine, *asked(lambda: Cycle([(3, 40, 95), (7, 31, 32)])))
    assert_equal(made, run(make_engine(model, max_batch=6), *asked(lambda: Cycle([(3, 40, 95), (7, 31, 32)]))))
    alone = speculating(model, max_batch=6)
    run(alone, *asked(lambda: Cycle([(3, 40, 95)]))[:2])
    assert alone.stats()["speculation"]["drafts"] == 0
    assert engine.stats()["speculation"]["accepted_tokens"] > 0


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_preempted_resumed_and_kept_answers_go_on_as_they_would(kernel, model, adapters):
    """Slots and blocks of the prefix cache hold nothing of what was guessed wrong."""
    load = lambda ref: adapters / ref  # noqa: E731
    fields = {"tenant": "long", "logprobs": 1}
    longs = [
        request("greedy", repeating(40, 1), 90, adapter="pedro", **fields),
        request("drawn", repeating(30, 2), 90, temperature=0.5, seed=5, **fields),
    ]
    alone = run(make_engine(model, load=load, kernel=kernel), *longs)
    engine = speculating(model, load=load, max_batch=2, preempt_after=8, kernel=kernel, prefix_bytes=8 << 20)
    for one in longs:
        engine.add(one)
    begun = drain(
        engine, until=lambda answers: all(len(a.token_ids) > 25 for a in answers.values()) and len(answers) == 2
    )
    for i in range(3):
        engine.add(request(f"rival{i}", repeating(15, 5 + i), 40, tenant=f"t{i}"))
    answers = drain(engine)
    assert engine.stats()["preempted"] >= 1
    for one in longs:
        whole = begun[one.id].token_ids + answers[one.id].token_ids
        assert whole == alone[one.id].token_ids
        logprobs = [*begun[one.id].logprobs, *answers[one.id].logprobs]
        wanted = [entry.logprob for entry in alone[one.id].logprobs]
        assert [entry.logprob for entry in logprobs] == pytest.approx(wanted, abs=1e-4)
    conversation = [*longs[1].prompt_ids, *alone["drawn"].token_ids, 5, 6]
    resumed = request(
        "resumed", longs[0].prompt_ids, 90, adapter="pedro", resumed_ids=tuple(alone["greedy"].token_ids[:33])
    )
    answers = run(engine, request("next", conversation, 20, tenant="long"), resumed)
    assert answers["next"].last.cached_tokens >= 112
    assert (
        answers["next"].token_ids
        == run(make_engine(model, kernel=kernel), request("n", conversation, 20))["n"].token_ids
    )
    assert answers["resumed"].token_ids == alone["greedy"].token_ids[33:]


def test_a_cancelled_answer_leaves_others_as_they_are(model):
    asked = [request(f"r{i}", repeating(30, i), 80) for i in range(3)]
    expected = run(make_engine(model), *asked)
    engine = speculating(model)
    for one in asked:
        engine.add(one)
    begun = drain(engine, until=lambda answers: len(answers) == 3 and len(answers["r1"].token_ids) > 10)
    engine.cancel("r1")
    answers = drain(engine)
    assert answers["r1"].last.finish_reason == "cancelled"
    assert answers["r1"].last.completion_tokens == len(begun["r1"].token_ids)
    for name in ("r0", "r2"):
        assert begun[name].token_ids + answers[name].token_ids == expected[name].token_ids


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_one_slot_are_to_the_bit_those_of_steps_of_their_own(model_type, threads, tmp_path):
    """Whatever else is in the step, and past the width of a block of rows and of a window."""
    model = random_backbone(model_type)
    for number, method in enumerate(("pedro", "lora")):
        make_adapter(model, tmp_path / method, seed=number, method=method)
    runner = Runner(copy.deepcopy(model), slots=3, length=96, kernel="native", threads=threads, draft_rows=60)
    many = [
        read_adapter(tmp_path / name, runner.architecture, "sha256:the-backbone", runner.device, runner.simd_width)
        for name in ("pedro", "lora")
    ]
    prompts, said = [prompt(17, 1), prompt(9, 2), prompt(4, 3)], [prompt(21, 4), prompt(20, 5), prompt(20, 6)]

    def begin():
        rows = zip(prompts, (*many, None), strict=True)
        runner.begin([PrefillRow(slot, ids, len(ids), adapter) for slot, (ids, adapter) in enumerate(rows)])
        runner.advance()
        runner.end()

    def rows(slot, count):
        return [DecodeRow(slot, token, len(prompts[slot]) + at) for at, token in enumerate(said[slot][:count])]

    begin()
    one_by_one = [[runner.decode([row]).values[0].clone() for row in rows(slot, 20)] for slot in range(3)]
    for counts in ((3, 1, 1), (20, 2, 0), (20, 20, 20)):
        begin()
        steps = [(slot, at, row) for slot, count in enumerate(counts) for at, row in enumerate(rows(slot, count))]
        steps.sort(key=lambda step: step[1])  # the first of each, then the drafts
        made = runner.decode([row for _, _, row in steps])
        for (slot, at, _), values in zip(steps, made.values, strict=True):
            assert torch.equal(values, one_by_one[slot][at]), (counts, slot, at)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_a_wrong_guess_that_is_not_finite_poisons_nothing(kernel, model, monkeypatch):
    bad = VOCABULARY - 1
    broken = copy.deepcopy(model)
    broken.get_input_embeddings().weight[bad] = float("nan")
    broken.get_output_embeddings().weight[bad] = 0
    asked = [request("a", prompt(9, 1), 30), request("b", prompt(12, 2), 30)]
    expected = run(make_engine(broken, kernel=kernel), *asked)
    engine = speculating(broken, kernel=kernel)
    monkeypatch.setattr(DraftHistory, "find", lambda self, output_ids, shortest, longest: 0)
    monkeypatch.setattr(DraftHistory, "read", lambda self, start, count: [bad] * count)
    assert_equal(run(engine, *asked), expected)
    assert engine.stats()["speculation"]["drafts"] > 4


@pytest.mark.parametrize("typecode", ["H", "I"])
def test_the_latest_earlier_place_of_the_most_last_tokens_goes_on(typecode):
    def found(ids, shortest=2, longest=3, count=4):
        history = DraftHistory(ids, typecode)
        at = history.find([], shortest, longest)
        return [] if at < 0 else history.read(at, count)

    assert found([1, 2, 3, 9, 9, 2, 3, 8, 8, 8, 1, 2, 3]) == [9, 9, 2, 3], "three last tokens rather than two"
    assert found([2, 3, 9, 9, 2, 3, 8, 8, 8, 7, 2, 3]) == [8, 8, 8, 7], "the latest of two"
    assert found([5, 6, 7, 8, 5, 6]) == [7, 8, 5, 6]
    assert found([5, 6, 5, 6]) == [5, 6, 5, 6], "it goes on beyond the end"
    assert found([4, 4, 4]) == [4, 4, 4, 4]
    assert found([1, 2, 3]) == found([1]) == found([2, 1]) == []
    assert found([256, 1, 65_535, 7, 256, 1]) == [65_535, 7, 256, 1]
    assert found([1, 256, 1, 9, 8, 0, 257, 1]) == [], "tokens are compared, not their bytes"
    history = DraftHistory([5, 6, 7], typecode)
    assert history.find([5], 2, 2) == -1
    assert history.read(history.find([5, 6], 2, 2), 2) == [7, 5]


def answering(count=1, tokens=1000, prompt_ids=(1, 2, 3)):
    """Sequences that make tokens without a model."""
    asked = Request("r", list(prompt_ids), params=SamplingParams(max_tokens=tokens))
    made = tuple(Sequence(asked, i, tokens, Letters(), frozenset()) for i in range(count))
    for sequence in made:
        sequence.output_ids.append(4)
    return made


def lived(speculator, sequences, steps, right, seconds):
    """Tokens drafted in `steps` steps: `right(draft)` of each come true, a step of some rows takes `seconds(rows)`."""
    drafted = 0
    for _ in range(steps):
        drafts = speculator.drafts(sequences)
        for sequence in sequences:
            draft = drafts.get(sequence, [])
            sequence.output_ids += draft[: right(draft)]
            sequence.output_ids.append(4)
        drafted += sum(map(len, drafts.values()))
        speculator.record(sequences, drafts, seconds(len(sequences) + sum(map(len, drafts.values()))))
    return drafted


def speculator_of(**config):
    return Speculator(EngineConfig(**{"max_batch": 64, "speculate": "ngram", **config}), 1000)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("row_s", [0.05, 0.5, 1.0])
def test_guesses_that_are_always_wrong_cost_a_hundredth_of_the_tokens(count, row_s):
    speculator, sequences = speculator_of(), answering(count)
    lost = lived(speculator, sequences, 500, lambda draft: 0, lambda rows: 1 + row_s * rows) * row_s * count
    assert lost / (1 + row_s * count) < RICH + 0.012 * 500 * count


@pytest.mark.parametrize(("count", "least"), [(1, 8), (8, 6)])
def test_guesses_that_are_right_are_made_as_long_as_they_may_be(count, least):
    speculator, sequences = speculator_of(), answering(count, 10_000)
    drafted = lived(speculator, sequences, 300, len, lambda rows: 1 + 0.05 * rows)
    assert drafted > 300 * count * least * 0.9
    assert speculator.stats()["accepted_tokens"] == drafted


def test_nothing_is_guessed_where_a_row_costs_what_it_brings_and_it_is_tried_again_later():
    speculator, sequences = speculator_of(), answering(32, 10_000)
    lived(speculator, sequences, 40, len, lambda rows: float(rows))
    assert speculator.costs.of(32) > 0.5, "a step of twice the rows takes twice the time"
    assert lived(speculator, sequences, 300, len, lambda rows: 1 + 0.01 * rows) > 1000


def test_a_sequence_rests_after_wrong_guesses_and_guesses_again_once_the_answer_quotes():
    speculator, sequences = speculator_of(), answering(1, 10_000)
    seconds = lambda rows: 1 + 0.02 * rows  # noqa: E731
    lived(speculator, sequences, 200, lambda draft: 0, seconds)
    before = speculator.stats()["drafts"]
    lived(speculator, sequences, 60, lambda draft: 0, seconds)
    assert speculator.stats()["drafts"] - before <= 2
    assert lived(speculator, sequences, 200, len, seconds) > 500


def test_what_a_row_costs_is_measured_against_steps_without_drafts():
    costs = DraftCosts()
    assert costs.of(4) is None, "the first step is one without"
    costs.record(4, 0, 2.0)
    assert costs.of(4) == first_cost(4)
    for _ in range(REMEASURED):
        costs.record(4, 8, 4.0)
    assert costs.of(4) is None, "it is measured again"
    costs.record(4, 0, 2.0)
    assert costs.of(4) == pytest.approx((4.0 - 2.0) / 8 * 4 / 2.0, rel=0.05)
    assert costs.of(5) is None
    costs.record(4, 1, 1000.0)
    assert costs.of(4) < 1, "a hiccup is no price"


def test_what_the_search_takes_is_paid_as_well():
    """A step that takes next to nothing leaves no time to look for drafts."""
    speculator, (sequence,) = speculator_of(), answering(1, 10_000)
    searched, find = [], DraftHistory.find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DraftHistory, "find", lambda *a: searched.append(a) or find(*a))
        for token in range(5, 905):
            assert not speculator.drafts((sequence,))
            sequence.output_ids.append(token)
            speculator.record((sequence,), {}, 1e-9)
    assert len(searched) < 200
    costs = DraftCosts()
    costs.record(2, 0, 1.0)
    assert costs.of_search(2, 0.05) == pytest.approx(0.1)
    assert costs.of_search(2, 100.0) == pytest.approx(0.2)


def test_what_cannot_be_speculated_is_refused_by_name(model, monkeypatch):
    with pytest.raises(ConfigError, match=r"engine.speculate: expected one of off, ngram, got 'eagle'"):
        EngineConfig(speculate="eagle")
    with pytest.raises(ConfigError, match="num_speculative_tokens: expected > 0, got 0"):
        EngineConfig(num_speculative_tokens=0)
    with pytest.raises(ConfigError, match=r"prompt_lookup_max: expected ≥ 4 .* got 3"):
        EngineConfig(prompt_lookup_min=4)
    with pytest.raises(ValidationError, match="at least prompt_lookup_min = 4, got 3"):
        ServeConfig(prompt_lookup_min=4)
    monkeypatch.setattr(runner_module, "uses_graphs", lambda device: True)
    with pytest.raises(BackboneError, match=r"engine.speculate: ngram needs a CPU.*; use off"):
        make_engine(model, speculate="ngram", kernel="torch")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--speculate", "eagle"], "'off' or 'ngram'"),
        (["--speculate", "ngram", "--prompt-lookup-min", "9"], "at least prompt_lookup_min = 9"),
        (["--speculate", "ngram", "--device", "cuda"], "use --speculate off"),
    ],
)
def test_serve_refuses_it_before_it_starts_anything(arguments, said, tmp_path, monkeypatch, capfd):
    code, _, err = command_runner(monkeypatch, capfd)("serve", *arguments, PEDRO_HOME=tmp_path)
    assert code == 1
    assert said in err
