"""Prompts that begin alike are read once: by whom, how much, and with the same answers as without."""

import random

import pytest
import torch
from engine_models import Answers, drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine.kv_cache import KVCache
from pedro.engine.prefix_cache import BLOCK, OVERHEAD, PrefixCache

BEGINNING = prompt(40, seed=5)  # two blocks and a half
CACHE = 1 << 24


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("lora", "lora2", "red", "ia3", "pedro")):
        make_adapter(model, home / name, seed=seed, method=name.removesuffix("2"))
    return home


def engine_of(model, adapters, **config):
    engine = make_engine(model, load=lambda ref: adapters / ref, **{"prefix_bytes": CACHE, **config})
    if engine._runner.kernel != "native":
        pytest.skip("prefixes are kept on the native kernel")
    return engine


def cached(answers: Answers, name: str) -> int:
    last = answers[name].last
    assert last is not None
    return last.cached_tokens


@pytest.mark.parametrize("kind", [None, "lora", "red", "ia3"])
def test_a_prompt_that_begins_as_an_earlier_one_is_not_read_again_and_logits_are_equal(model, adapters, kind):
    engine, plain = engine_of(model, adapters), engine_of(model, adapters, prefix_bytes=0)
    for name, rest in (("first", 7), ("second", 9), ("third", 30)):
        one = request(name, [*BEGINNING, *prompt(rest, seed=rest)], 6, adapter=kind, logprobs=5)
        answer, expected = run(engine, one)[name], run(plain, one)[name]
        assert answer.token_ids == expected.token_ids
        for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert answer.last.cached_tokens == (0 if name == "first" else 2 * BLOCK)
        assert expected.last.cached_tokens == 0
    stats = engine.stats()["prefixes"]
    assert (stats["hits"], stats["saved_tokens"]) == (2, 4 * BLOCK)


def test_the_last_token_of_a_prompt_is_always_read(model, adapters):
    engine = engine_of(model, adapters)
    ids = prompt(2 * BLOCK)
    first = run(engine, request("a", ids))["a"]
    again = run(engine, request("b", ids))["b"]
    assert again.token_ids == first.token_ids
    assert again.last.cached_tokens == BLOCK


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tenant": "acme"}, {"tenant": "globex"}),
        ({"cache_salt": "one"}, {"cache_salt": "two"}),
        ({"cache_salt": "one"}, {}),
        ({"adapter": "lora"}, {"adapter": "lora2"}),
        ({"adapter": "lora"}, {}),
        ({}, {"adapter": "red"}),
        ({"adapter": "pedro"}, {"adapter": "pedro"}),
        ({"adapter": "pedro"}, {}),
        ({}, {"adapter": "pedro"}),
        ({}, {"prompt_logprobs": 1}),
    ],
)
def test_nothing_is_reused_across_tenants_salts_and_adapters_nor_under_vectors_made_from_the_prompt(
    model, adapters, before, after
):
    engine, plain = engine_of(model, adapters), engine_of(model, adapters, prefix_bytes=0)
    run(engine, request("before", BEGINNING, **before))
    one = request("after", [*BEGINNING, *prompt(5)], **after)
    answers = run(engine, one)
    assert cached(answers, "after") == 0
    assert engine.stats()["prefixes"]["hits"] == 0
    assert answers["after"].token_ids == run(plain, one)["after"].token_ids


def test_tokens_are_compared_from_the_first_on(model, adapters):
    engine = engine_of(model, adapters)
    run(engine, request("a", BEGINNING))
    other = [BEGINNING[0] + 1 if BEGINNING[0] < 90 else 2, *BEGINNING[1:]]  # the second block is the same
    assert cached(run(engine, request("b", other)), "b") == 0


def test_what_was_used_least_recently_goes_first_and_the_budget_holds():
    cache = KVCache(2, 1, 2, 8 * BLOCK, 4, torch.float32, torch.device("cpu"))
    size = 2 * 2 * 2 * BLOCK * 4 * 4 + OVERHEAD
    prefixes = PrefixCache(3 * size)
    one, two, long = [1] * BLOCK, [2] * 2 * BLOCK, [3] * 6 * BLOCK
    prefixes.keep("owner", one, cache, 0)
    prefixes.keep("owner", two, cache, 0)
    assert len(prefixes.find("owner", [*one, 0])) == 1  # used now
    prefixes.keep("owner", [4] * BLOCK, cache, 0)
    assert len(prefixes.find("owner", [*one, 0])) == 1
    assert len(prefixes.find("owner", [*two, 0])) == 1, "the end of a prompt goes before its beginning"
    prefixes.keep("owner", long, cache, 0)
    assert len(prefixes.find("owner", [*long, 0])) == 3, "as much of the beginning as fits"
    assert prefixes.stats()["used_bytes"] <= 3 * size
    assert prefixes.stats()["evictions"] == 4


def test_a_cancelled_prefill_leaves_nothing_behind(model, adapters):
    engine = engine_of(model, adapters)
    run(engine, request("before", BEGINNING))
    engine._scheduler.lone_tokens = 4  # so that it takes several steps
    engine.add(request("gone", [*BEGINNING, *prompt(40, seed=3)]))
    engine.step()
    engine.cancel("gone")
    drain(engine)
    engine._scheduler.lone_tokens = 512
    assert cached(run(engine, request("after", [*BEGINNING, *prompt(40, seed=3)])), "after") == 2 * BLOCK


def test_a_preempted_request_is_read_whole_again_and_still_tells_what_was_cached(model, adapters):
    options = {"max_batch": 1, "preempt_after": 1}
    engine, plain = engine_of(model, adapters, **options), engine_of(model, adapters, prefix_bytes=0)
    run(engine, request("before", BEGINNING, tenant="a"))
    one = request("long", [*BEGINNING, 5], 60, tenant="a", ignore_eos=True)
    engine.add(one)
    answers = drain(engine, until=lambda made: "long" in made and len(made["long"].token_ids) > 30)
    engine.add(request("other", [*BEGINNING, 6], 4, tenant="b"))
    rest = drain(engine)
    assert engine.stats()["preempted"] == 1
    assert cached(rest, "other") == 0
    assert cached(rest, "long") == 2 * BLOCK
    assert answers["long"].token_ids + rest["long"].token_ids == run(plain, one)["long"].token_ids


def test_several_answers_to_one_request_start_from_what_was_kept(model, adapters):
    engine, plain = engine_of(model, adapters), engine_of(model, adapters, prefix_bytes=0)
    run(engine, request("before", BEGINNING))
    one = request("n", [*BEGINNING, 7], n=3, temperature=1.0, seed=11)
    answers, expected = run(engine, one), run(plain, one)
    assert {k: a.token_ids for k, a in answers.items()} == {k: a.token_ids for k, a in expected.items()}
    assert {a.last.cached_tokens for a in answers.values() if a.last} == {2 * BLOCK}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma"])
def test_any_schedule_gives_the_answers_of_an_engine_that_keeps_nothing(model_type, tmp_path):
    model = random_backbone(model_type)
    for seed, method in enumerate(("lora", "red", "pedro")):
        make_adapter(model, tmp_path / method, seed=seed, method=method)
    engine = engine_of(model, tmp_path, prefix_bytes=100_000, prefill_tokens=96)  # few blocks: much is evicted
    plain = engine_of(model, tmp_path, prefix_bytes=0)
    rng = random.Random(7)
    engine._prefill_budget = None
    requests, answers = [], {}
    for number in range(40):
        ids = [*prompt(rng.choice((16, 37, 48)), seed=rng.randrange(3)), *prompt(rng.randrange(1, 30), seed=number)]
        kind = rng.choice((None, None, "lora", "red", "pedro"))
        requests.append(request(str(number), ids, rng.randrange(1, 8), adapter=kind, tenant=rng.choice("ab")))
        engine._scheduler.chunk_tokens = engine._scheduler.lone_tokens = rng.choice((5, 17, 96))
        engine.add(requests[-1])
        if rng.random() < 0.2:
            engine.add(request(f"gone {number}", ids, 8, adapter=kind, tenant="a"))
            taken = drain(engine, until=lambda _: rng.random() < 0.5)
            engine.cancel(f"gone {number}")
        else:
            taken = drain(engine, until=lambda _: rng.random() < 0.3)
        for name, answer in taken.items():
            for output in answer.outputs:
                answers.setdefault(name, []).extend(output.token_ids)
    for name, answer in drain(engine).items():
        answers.setdefault(name, []).extend(answer.token_ids)
    for one in requests:
        assert answers[one.id] == run(plain, one)[one.id].token_ids, one.id
    stats = engine.stats()["prefixes"]
    assert stats["hits"]
    assert stats["evictions"]
