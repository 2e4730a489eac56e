"""Prompts that begin alike are read once: by whom, how much, and with the same answers as without."""

import random

import pytest
import torch
from engine_models import Answers, drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine import prefix_cache
from pedro.engine.kv_blocks import BLOCK, KVBlocks
from pedro.engine.kv_cache import KVCache, PagedKVCache
from pedro.engine.prefix_cache import OVERHEAD

BEGINNING = prompt(40, seed=5)  # two blocks and a half
CACHE = 1 << 24
KERNELS = ("native", "torch")
CONSTANT = (None, "lora", "red", "ia3")  # what acts on a token does not depend on the rest of the prompt
GENERATED = ("pedro", "pedro-1", "para", "loreft")


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("lora", "lora2", "red", "ia3", *GENERATED)):
        make_adapter(model, home / name, seed=seed, method=name.removesuffix("2"))
    make_adapter(model, home / "acme.faq:1#sha256:a", seed=20, method="lora")
    make_adapter(model, home / "acme.faq:2#sha256:b", seed=21, method="lora")
    return home


def engine_of(model, adapters, **config):
    engine = make_engine(model, load=lambda ref: adapters / ref, **{"prefix_bytes": CACHE, **config})
    if engine._runner.kernel != config.get("kernel", engine._runner.kernel):
        pytest.skip("the native kernel cannot be built here")
    return engine


def cached(answers: Answers, name: str) -> int:
    last = answers[name].last
    assert last is not None
    return last.cached_tokens


def check_equal(engine, plain, one, expected_cached):
    """The engine's answer is that of one that keeps nothing; so many tokens of the prompt were not read again."""
    answer, expected = run(engine, one)[one.id], run(plain, one)[one.id]
    assert answer.token_ids == expected.token_ids
    for ours, theirs in zip(answer.logprobs, expected.logprobs, strict=True):
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        for (_, our), (_, their) in zip(ours.top, theirs.top, strict=True):
            assert our == pytest.approx(their, abs=1e-4)
    assert answer.last.cached_tokens == expected_cached
    assert expected.last.cached_tokens == 0
    return answer.token_ids


# what is found, and that answers stay the same


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", CONSTANT)
def test_a_prompt_that_begins_as_an_earlier_one_is_not_read_again_and_logits_are_equal(model, adapters, kind, kernel):
    engine, plain = (engine_of(model, adapters, kernel=kernel, prefix_bytes=size) for size in (CACHE, 0))
    for name, rest in (("first", 7), ("second", 9), ("third", 30)):
        one = request(name, [*BEGINNING, *prompt(rest, seed=rest)], 6, adapter=kind, logprobs=5)
        check_equal(engine, plain, one, 0 if name == "first" else 2 * BLOCK)
    stats = engine.stats()["prefixes"]
    assert (stats["hits"], stats["saved_tokens"], stats["queried_tokens"]) == (2, 4 * BLOCK, 47 + 49 + 70)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", GENERATED)
def test_under_vectors_made_from_the_prompt_the_same_prompt_is_not_read_again_and_logits_are_equal(
    model, adapters, kind, kernel
):
    engine, plain = (engine_of(model, adapters, kernel=kernel, prefix_bytes=size) for size in (CACHE, 0))
    for number in range(3):
        one = request(f"r{number}", BEGINNING, 6, adapter=kind, logprobs=5)
        check_equal(engine, plain, one, 2 * BLOCK if number else 0)
    longer = request("longer", [*BEGINNING, 7], 6, adapter=kind, logprobs=5)
    check_equal(engine, plain, longer, 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("kind", "length"), [*((kind, 20) for kind in GENERATED), ("pedro", 42)])
def test_vectors_made_from_the_first_tokens_alone_let_all_prompts_that_begin_with_those_share(
    model, adapters, kind, length, kernel
):
    engine, plain = (engine_of(model, adapters, kernel=kernel, prefix_bytes=size) for size in (CACHE, 0))
    head = {"adapter": kind, "conditioning_length": length, "logprobs": 5, "ignore_eos": True}
    first = [*BEGINNING, 7, 8]  # 42 tokens
    made = check_equal(engine, plain, request("first", first, 20, **head), 0)
    turn = [*first, *made, *prompt(9, seed=9)]
    check_equal(engine, plain, request("turn", turn, 6, **head), (len(first) + len(made) - 1) // BLOCK * BLOCK)
    check_equal(engine, plain, request("other", turn, 6, **(head | {"conditioning_length": length + 1})), 0)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma2", "gemma3_text", "qwen2", "mistral"])
def test_any_architecture_goes_on_from_what_was_read(model_type, tmp_path):
    model = random_backbone(model_type)
    make_adapter(model, tmp_path / "pedro", seed=1)
    engine, plain = (engine_of(model, tmp_path, kernel="torch", prefix_bytes=size) for size in (CACHE, 0))
    for kind in (None, "pedro"):
        for name in ("first", "second"):
            rest = [] if kind else prompt(9, seed=len(name))
            one = request(name, [*BEGINNING, *rest], 6, adapter=kind, logprobs=5)
            check_equal(engine, plain, one, 2 * BLOCK if name == "second" else 0)


def test_the_next_turn_of_a_conversation_finds_the_answer_too(model, adapters):
    engine, plain = engine_of(model, adapters), engine_of(model, adapters, prefix_bytes=0)
    chat = list(BEGINNING)
    for turn in range(3):
        one = request(f"turn {turn}", chat, 20, adapter="lora", ignore_eos=True, logprobs=5)
        made = check_equal(engine, plain, one, (len(chat) - 6) // BLOCK * BLOCK if turn else 0)
        chat += [*made, *prompt(5, seed=turn)]


def test_the_last_token_of_a_prompt_is_always_read(model, adapters):
    engine = engine_of(model, adapters)
    ids = prompt(2 * BLOCK)
    first = run(engine, request("a", ids))["a"]
    again = run(engine, request("b", ids))["b"]
    assert again.token_ids == first.token_ids
    assert again.last.cached_tokens == BLOCK


# what is never found


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tenant": "acme"}, {"tenant": "globex"}),
        ({"cache_salt": "one"}, {"cache_salt": "two"}),
        ({"cache_salt": "one"}, {}),
        ({"adapter": "lora"}, {"adapter": "lora2"}),
        ({"adapter": "acme.faq:1#sha256:a"}, {"adapter": "acme.faq:2#sha256:b"}),  # where its alias moved
        ({"adapter": "lora"}, {}),
        ({}, {"adapter": "red"}),
        ({"adapter": "pedro"}, {"adapter": "pedro"}),  # with another prompt
        ({"adapter": "loreft"}, {"adapter": "loreft"}),
        ({"adapter": "pedro"}, {}),
        ({"adapter": "pedro"}, {"adapter": "para"}),
        ({}, {"adapter": "pedro"}),
        ({}, {"prompt_logprobs": 1}),
    ],
)
def test_nothing_is_reused_across_tenants_salts_and_digests_nor_under_vectors_of_another_prompt(
    model, adapters, before, after
):
    engine, plain = engine_of(model, adapters), engine_of(model, adapters, prefix_bytes=0)
    run(engine, request("before", BEGINNING, **before))
    one = request("after", [*BEGINNING, *prompt(5)], **after)
    answers = run(engine, one)
    assert cached(answers, "after") == 0
    assert engine.stats()["prefixes"]["hits"] == 0
    assert answers["after"].token_ids == run(plain, one)["after"].token_ids


def test_the_time_of_a_hit_tells_a_stranger_nothing(model, adapters):
    """A stranger's prompt costs the same work whatever others asked before: it is read whole, by count of tokens."""
    engine = engine_of(model, adapters)
    read = []
    begin = engine._runner.begin
    engine._runner.begin = lambda rows: (read.extend(len(r.token_ids) - r.num_cached for r in rows), begin(rows))
    for number, tenant in enumerate(("acme", "acme", "globex", "globex")):
        run(engine, request(f"r{number}", BEGINNING, tenant=tenant))
    assert read == [40, 8, 40, 8]


def test_an_operator_may_let_tenants_share_what_no_adapter_acted_on_and_nothing_else(model, adapters):
    engine = engine_of(model, adapters, share_bare_prefixes=True)
    found = []
    for fields in ({}, {"adapter": "lora"}, {"adapter": "pedro"}, {"cache_salt": "mine"}):
        for tenant in ("acme", "globex"):
            name = f"{tenant} {fields}"
            found.append(cached(run(engine, request(name, BEGINNING, tenant=tenant, **fields)), name))
    assert found == [0, 2 * BLOCK, 0, 0, 0, 0, 0, 0]


def test_tokens_are_compared_from_the_first_on(model, adapters):
    engine = engine_of(model, adapters)
    run(engine, request("a", BEGINNING))
    other = [BEGINNING[0] + 1 if BEGINNING[0] < 90 else 2, *BEGINNING[1:]]  # the second block is the same
    assert cached(run(engine, request("b", other)), "b") == 0


class SameHash(bytes):
    """Tokens whose hash is that of any others."""

    def __hash__(self):
        return 0

    def __getitem__(self, at):
        return SameHash(super().__getitem__(at))


@pytest.mark.parametrize("same_hash", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma"])
def test_any_schedule_gives_the_answers_of_an_engine_that_keeps_nothing(model_type, same_hash, tmp_path, monkeypatch):
    """Much is evicted and cancelled meanwhile; with `same_hash` no hash tells one block from another."""
    if same_hash:
        real = prefix_cache.token_bytes
        monkeypatch.setattr(prefix_cache, "token_bytes", lambda ids: SameHash(real(ids)))
    model = random_backbone(model_type)
    for seed, method in enumerate(("lora", "red", "pedro")):
        make_adapter(model, tmp_path / method, seed=seed, method=method)
    engine = engine_of(model, tmp_path, prefix_bytes=100_000, prefill_tokens=96, preempt_after=8)
    plain = engine_of(model, tmp_path, prefix_bytes=0)
    rng = random.Random(7)
    engine._prefill_budget = None
    requests, answers = [], {}
    for number in range(40):
        ids = [*prompt(rng.choice((16, 37, 48)), seed=rng.randrange(3)), *prompt(rng.randrange(1, 30), seed=number)]
        kind = rng.choice((None, None, "lora", "red", "pedro", "pedro"))
        fields = {"adapter": kind, "tenant": rng.choice("ab")}
        if kind == "pedro":
            fields["conditioning_length"] = rng.choice((None, 5, 9))
        requests.append(request(str(number), ids, rng.randrange(1, 20), ignore_eos=True, **fields))
        if number % 5 == 4:
            requests[-1] = request(str(number), requests[-2].prompt_ids, 6, **(fields | {"conditioning_length": None}))
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
    assert not engine._prefixes._entries.held_bytes


def test_what_was_forgotten_is_not_found_nor_what_a_running_request_read_before(model, adapters):
    engine = engine_of(model, adapters)
    run(engine, request("before", BEGINNING))
    engine.add(request("running", [*BEGINNING, *prompt(20, seed=4)], 20, ignore_eos=True))
    drain(engine, until=lambda made: "running" in made)
    engine.forget_prefixes()
    drain(engine)
    assert engine.stats()["prefixes"]["evictions"] >= 2, "their memory is free at once"
    for name, found in (("after", 0), ("again", 3 * BLOCK)):
        assert cached(run(engine, request(name, [*BEGINNING, *prompt(20, seed=4)])), name) == found


# room


def test_what_was_used_least_recently_goes_first_and_the_budget_holds(model, adapters):
    size = 2 * 3 * 2 * BLOCK * 8 * 4 + OVERHEAD
    engine = engine_of(model, adapters, prefix_bytes=3 * size)
    one, two, long = ([first] * n * BLOCK for first, n in ((11, 1), (12, 2), (13, 6)))

    def found(ids):
        """How much a request finds; it leaves nothing that is new."""
        name = f"r{engine.stats()['finished']}"
        return cached(run(engine, request(name, [*ids, 5], 1)), name) // BLOCK

    assert [found(one), found(two)] == [0, 0]
    assert found(one) == 1  # used now
    assert found([14] * BLOCK) == 0
    assert found(one) == 1
    assert found(two) == 1, "the end of a prompt goes before its beginning"
    assert found(long) == 0
    assert found(long) == 3, "as much of the beginning as fits"
    stats = engine.stats()["prefixes"]
    assert stats["used_bytes"] <= 3 * size
    assert stats["bytes_by_adapter"] == {None: stats["used_bytes"]}


def test_a_budget_for_less_than_a_block_keeps_nothing(model, adapters):
    engine = engine_of(model, adapters, prefix_bytes=1000)
    for name in ("a", "b"):
        assert cached(run(engine, request(name, BEGINNING)), name) == 0
    assert engine.stats()["prefixes"]["blocks"] == 0


def test_vectors_count_as_memory_and_go_as_blocks_do(model, adapters):
    size = 2 * 3 * 2 * BLOCK * 8 * 4 + OVERHEAD
    engine = engine_of(model, adapters, prefix_bytes=8 * size)
    for number in range(6):
        run(engine, request(f"r{number}", prompt(40, seed=number), adapter="pedro"))
    stats = engine.stats()["prefixes"]
    assert 4 * size < stats["used_bytes"] <= 8 * size
    assert stats["bytes_by_adapter"] == {"pedro": stats["used_bytes"]}
    assert cached(run(engine, request("again", prompt(40, seed=5), adapter="pedro")), "again") == 2 * BLOCK
    assert cached(run(engine, request("gone", prompt(40, seed=0), adapter="pedro")), "gone") == 0


def test_what_a_waiting_prefill_begins_with_is_not_evicted_before_it_begins(model, adapters):
    size = 2 * 3 * 2 * BLOCK * 8 * 4 + OVERHEAD
    engine, plain = engine_of(model, adapters, prefix_bytes=2 * size), engine_of(model, adapters, prefix_bytes=0)
    run(engine, request("before", BEGINNING))
    one = request("one", [*BEGINNING, *prompt(30, seed=3)])
    engine.add(one)
    sequence = engine._live["one"][0]
    engine._prefixes.look_up(sequence, None)  # as admission does
    assert sequence.unread == 70 - 2 * BLOCK
    slot = engine._scheduler._free[-1]
    engine._prefixes._unkept.append(prefix_cache._Unkept(sequence.reuse, prompt(60, seed=8), slot))
    engine._prefixes.keep()  # finds no room
    assert engine.stats()["prefixes"]["evictions"] == 0
    answers = drain(engine)
    assert cached(answers, "one") == 2 * BLOCK
    assert answers["one"].token_ids == run(plain, one)["one"].token_ids
    assert not engine._prefixes._entries.held_bytes


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_eviction_in_the_middle_of_a_prefill_changes_no_answer(model, adapters, kernel):
    size = 2 * 3 * 2 * BLOCK * 8 * 4 + OVERHEAD
    engine, plain = (engine_of(model, adapters, kernel=kernel, prefix_bytes=bytes_) for bytes_ in (4 * size, 0))
    run(engine, request("before", BEGINNING, adapter="lora"))
    engine._prefill_budget = None
    engine._scheduler.lone_tokens = engine._scheduler.chunk_tokens = 4  # so that it takes many steps
    one = request("one", [*BEGINNING, *prompt(60, seed=3)], 8, adapter="lora")
    engine.add(one)
    engine.step()
    engine._prefixes._unkept.append(  # another prompt that ended meanwhile
        prefix_cache._Unkept(prefix_cache.reuse_of(request("x", [1]), None), prompt(4 * BLOCK, seed=8), 3)
    )
    engine.step()
    evicted = engine.stats()["prefixes"]["evictions"]
    assert evicted == (2 if kernel == "torch" else 0), "all that it began with, where it does not read it there"
    assert engine.stats()["prompt_tokens"] == 40, "it is still being read"
    answers = drain(engine)
    assert cached(answers, "one") == 2 * BLOCK
    assert answers["one"].token_ids == run(plain, one)["one"].token_ids


# requests that do not run straight through


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
    assert not engine._prefixes._entries.held_bytes


@pytest.mark.parametrize("kind", [None, "lora", "pedro"])
def test_a_preempted_request_goes_on_from_what_was_kept_of_it_and_tells_what_was_cached_at_first(model, adapters, kind):
    options = {"max_batch": 1, "preempt_after": 1}
    engine, plain = engine_of(model, adapters, **options), engine_of(model, adapters, prefix_bytes=0)
    ids = [*BEGINNING, 5]
    run(engine, request("before", ids, tenant="a", adapter=kind))
    read = []
    begin = engine._runner.begin
    engine._runner.begin = lambda rows: (read.extend((len(r.token_ids), r.num_cached) for r in rows), begin(rows))
    one = request("long", ids, 80, tenant="a", adapter=kind, ignore_eos=True)
    engine.add(one)
    answers = drain(engine, until=lambda made: "long" in made and len(made["long"].token_ids) > 30)
    engine.add(request("other", [*BEGINNING, 6], 4, tenant="b"))
    rest = drain(engine)
    assert engine.stats()["preempted"] == 1
    assert cached(rest, "other") == 0
    assert cached(rest, "long") == 2 * BLOCK
    assert read[:2] == [(41, 32), (41, 0)]
    length, found = read[2]
    assert length > 71
    assert found == (2 * BLOCK if kind == "pedro" else (length - 1) // BLOCK * BLOCK)
    assert answers["long"].token_ids + rest["long"].token_ids == run(plain, one)["long"].token_ids


@pytest.mark.parametrize("kind", [None, "lora", "pedro"])
def test_several_answers_to_one_request_start_from_what_was_kept_and_say_what_the_first_found(model, adapters, kind):
    engine, plain = engine_of(model, adapters, max_batch=1), engine_of(model, adapters, prefix_bytes=0)
    one = request("n", [*BEGINNING, 7], n=3, temperature=1.0, seed=11, adapter=kind)
    for found in (0, 2 * BLOCK):
        answers, expected = run(engine, one), run(plain, one)
        assert {k: a.token_ids for k, a in answers.items()} == {k: a.token_ids for k, a in expected.items()}
        assert {a.last.cached_tokens for a in answers.values() if a.last} == {found}
        assert engine.stats()["prefixes"]["saved_tokens"] == found


def test_a_request_that_failed_leaves_nothing_to_find(model, adapters):
    engine = engine_of(model, adapters)
    decode = engine._runner.decode

    def fail(rows):
        raise RuntimeError("out of order")

    engine._runner.decode = fail
    engine.add(request("failed", BEGINNING, 40))
    assert drain(engine)["failed"].last.finish_reason == "error"
    engine._runner.decode = decode
    longer = [*BEGINNING, *prompt(40, seed=2)]
    assert cached(run(engine, request("after", longer)), "after") == 2 * BLOCK, "its prompt was read well"


# the blocks themselves


@pytest.mark.parametrize("layout", ["plain", "paged"])
def test_blocks_come_back_as_they_were_saved(layout):
    cache = (PagedKVCache if layout == "paged" else KVCache)(2, 3, 2, 8 * BLOCK, 4, torch.float32, torch.device("cpu"))
    cache.limit(1000)

    def slots():
        return [t for layer in range(2) for t in cache.read(layer, torch.arange(3), 8 * BLOCK)]

    for slot in range(3):
        cache.lengths[slot] = 8 * BLOCK
        cache.grow(slot)
        for layer in range(2):
            cache.fill(layer, slot, *torch.randn(2, 2, 8 * BLOCK, 4))
    before = [tensor.clone() for tensor in slots()]
    blocks = KVBlocks(cache, 7)
    blocks.save(1, 2, [5, 6, 0, 3])  # positions 32 to 96 of slot 1
    blocks.load(2, [6, 0, 5])
    for tensor, was in zip(slots(), before, strict=True):
        assert torch.equal(tensor[2, :, : 2 * BLOCK], was[1, :, 3 * BLOCK : 5 * BLOCK])
        assert torch.equal(tensor[2, :, 2 * BLOCK : 3 * BLOCK], was[1, :, 2 * BLOCK : 3 * BLOCK])
        assert torch.equal(tensor[2, :, 3 * BLOCK :], was[2, :, 3 * BLOCK :])
        assert torch.equal(tensor[:2], was[:2])
