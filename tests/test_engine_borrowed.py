"""What several sequences begin with is read where it is kept: no copy of it, the same answers, and nothing is taken
away from under a reader."""

import itertools
import mmap

import pytest
import torch
from engine_models import drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine.kv_blocks import BLOCK, KVBlocks
from pedro.engine.prefix_cache import OVERHEAD
from pedro.engine.runner import DecodeRow, PrefillRow

BEGINNING = prompt(40, seed=5)  # two blocks and a half
CACHE = 1 << 24
BLOCK_BYTES = 2 * 3 * 2 * BLOCK * 8 * 4 + OVERHEAD  # of `model`


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


def engine_of(model, **config):
    engine = make_engine(model, **{"prefix_bytes": CACHE, **config})
    if engine._runner.kernel != config.get("kernel", "native"):
        pytest.skip("the native kernel cannot be built here")
    return engine


def borrowed(engine):
    """Tokens that each slot's sequence reads among what is kept."""
    return engine._runner.cache.borrowed


def nothing_held(engine):
    """Whether nobody reads any block, and all places are either free or found."""
    entries = engine._prefixes._entries
    assert not any(borrowed(engine))
    assert not entries.held_bytes
    assert not any(entry.refcount for entry in entries.all())
    places = [entry.place for entry in entries.all() if entry.place >= 0]
    assert sorted(places + entries.free) == list(range(entries.budget_bytes // engine._prefixes._block_bytes))
    assert entries.used_bytes == sum(entry.nbytes for entry in entries.all())


def tokens(answers):
    return {key: answer.token_ids for key, answer in answers.items()}


def check_logprobs(answers, expected):
    assert tokens(answers) == tokens(expected)
    for key, answer in answers.items():
        for ours, theirs in zip(answer.logprobs, expected[key].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


# reading in place


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),  # two heads a key-value head
        ("llama", {"num_key_value_heads": 4, "head_dim": 20}),  # one, of a width that no vector fits
        ("llama", {"num_key_value_heads": 1, "head_dim": 72}),
        ("mistral", {}),  # the window ends within what is kept
        ("mistral", {"sliding_window": 21}),  # and begins there
        ("qwen2", {}),
    ],
)
def test_sequences_read_what_is_kept_in_place_and_answer_as_without_it(model_type, changes, threads, tmp_path):
    model = random_backbone(model_type, **changes)
    make_adapter(model, tmp_path / "lora", seed=1, method="lora")
    options = {"load": lambda ref: tmp_path / ref, "threads": threads}
    engine, plain, torch_engine = (
        engine_of(model, **options, **more) for more in ({}, {"prefix_bytes": 0}, {"kernel": "torch"})
    )
    for adapter in (None, "lora"):
        first = request(f"first {adapter}", BEGINNING, 2, adapter=adapter)
        asked = [
            request(
                f"{adapter} {rest}",
                [*BEGINNING, *prompt(rest, seed=rest)],
                24,
                adapter=adapter,
                logprobs=3,
                ignore_eos=True,
            )
            for rest in (1, 9, 30)
        ]
        for one in (engine, plain, torch_engine):
            run(one, first)
        for one in asked:
            engine.add(one)
        begun = drain(engine, until=lambda answers: len(answers) == 3)
        assert borrowed(engine)[:3] == [2 * BLOCK] * 3
        assert sum(engine._runner.cache.lengths) < 3 * (8 + 4) + 1 + 9 + 30, "their slots have the rest alone"
        rest = drain(engine)
        for key, answer in begun.items():
            for output in rest[key].outputs:
                answer.take(output)
        check_logprobs(begun, run(plain, *asked))
        check_logprobs(begun, run(torch_engine, *asked))
    assert not any(borrowed(torch_engine))
    nothing_held(engine)


def test_blocks_that_lie_apart_are_read_as_one_prompt(model):
    engine, plain = engine_of(model), engine_of(model, prefix_bytes=0)
    one, two = prompt(100, seed=1), prompt(100, seed=2)
    for length in (20, 36, 70, 86):  # by turns, so that each has every other place or two
        for seed, ids in enumerate((one, two)):
            run(engine, request(f"{length}-{seed}", ids[:length], 1))
    for name, ids in (("one", one), ("two", two)):
        asked = request(name, ids, 20, ignore_eos=True, logprobs=1)
        engine.add(asked)
        begun = drain(engine, until=lambda answers: answers)
        sequence = engine._live[name][0]
        places = sequence.prefix.places
        assert sequence.borrowed == 5 * BLOCK
        assert sum(b != a + 1 for a, b in itertools.pairwise(places)) >= 2
        begun[name].token_ids += drain(engine)[name].token_ids
        assert begun[name].token_ids == run(plain, asked)[name].token_ids
    again = request("again", [*one, *prompt(5)], 9, logprobs=1)
    check_logprobs(run(engine, again), run(plain, again))
    nothing_held(engine)


def test_guesses_and_beams_begin_with_what_is_borrowed_too(model):
    ids = [*prompt(20, seed=3), *prompt(20, seed=3)]
    engine, plain = engine_of(model, speculate="ngram"), engine_of(model, prefix_bytes=0)
    engine._speculator.costs.of = lambda rows: 0.01  # as if a guess cost next to nothing
    run(engine, request("first", ids, 1))
    asked = [request("long", ids, 60, ignore_eos=True), request("beams", ids, 12, num_beams=3, n=2)]
    for one in asked:
        engine.add(one)
    seen = set()
    answers = drain(engine, until=lambda _: seen.update([tuple(borrowed(engine))]))
    assert (2 * BLOCK,) * 4 in seen
    assert engine.stats()["speculation"]["draft_tokens"] > 0
    assert tokens(answers) == tokens(run(plain, *asked))
    nothing_held(engine)


@pytest.mark.parametrize("adapter", [None, "pedro"])
def test_answers_to_one_prompt_share_what_is_kept_of_it(model, adapter, tmp_path):
    make_adapter(model, tmp_path / "pedro", seed=1)
    options = {"load": lambda ref: tmp_path / ref}
    engine, plain = engine_of(model, **options), engine_of(model, prefix_bytes=0, **options)
    one = request("n", BEGINNING, 20, n=4, temperature=1.0, seed=11, ignore_eos=True, adapter=adapter)
    expected = tokens(run(plain, one))
    for found in (0, 2 * BLOCK):  # the first of them reads the prompt, and then all find it
        engine.add(one)
        seen = set()
        answers = drain(engine, until=lambda _, seen=seen: seen.update([tuple(borrowed(engine))]))
        assert (found, *[2 * BLOCK] * 3) in seen
        assert tokens(answers) == expected
        nothing_held(engine)


def test_answers_to_one_prompt_are_copied_where_nothing_more_can_be_kept(model):
    engine, plain = engine_of(model, prefix_bytes=BLOCK_BYTES), engine_of(model, prefix_bytes=0)
    for name in ("first", "second"):  # finds one block
        one = request(name, BEGINNING, 9, n=3, temperature=1.0, seed=11, ignore_eos=True)
        assert tokens(run(engine, one)) == tokens(run(plain, one))
    assert engine.stats()["prefixes"]["saved_tokens"] == BLOCK
    nothing_held(engine)


# readers, and those who would take what they read


def test_nothing_that_is_read_is_evicted_and_afterwards_it_may_be(model):
    engine, plain = engine_of(model, prefix_bytes=4 * BLOCK_BYTES), engine_of(model, prefix_bytes=0)
    run(engine, request("first", BEGINNING, 1))
    reader = request("reader", [*BEGINNING, 7], 60, ignore_eos=True, logprobs=1)
    engine._prefill_budget = None
    engine.add(reader)
    answers = drain(engine, until=lambda made: made)
    blocks = engine._live["reader"][0].prefix.blocks
    for number in range(6):  # each wants all there is
        engine.add(request(f"other {number}", prompt(60, seed=20 + number), 2))
        for name, answer in drain(engine, until=lambda made, name=f"other {number}": name in made).items():
            for output in answer.outputs if name == "reader" else ():
                answers["reader"].take(output)
        assert [engine._prefixes._entries.get(block.key) for block in blocks] == list(blocks)
    assert engine.stats()["prefixes"]["evictions"] >= 4
    for output in drain(engine)["reader"].outputs:
        answers["reader"].take(output)
    check_logprobs({"reader": answers["reader"]}, run(plain, reader))
    nothing_held(engine)
    for number in range(2):
        run(engine, request(f"last {number}", prompt(70, seed=40 + number), 1))
    assert all(block.gone for block in blocks)
    nothing_held(engine)


def test_a_reader_that_leaves_takes_nothing_from_the_others(model):
    engine, plain = engine_of(model, prefix_bytes=3 * BLOCK_BYTES), engine_of(model, prefix_bytes=0)
    run(engine, request("first", BEGINNING, 1))
    asked = {name: request(name, [*BEGINNING, at], 40, ignore_eos=True) for at, name in enumerate("abc", 5)}
    for one in asked.values():
        engine.add(one)
    begun = drain(engine, until=lambda made: len(made) == 3)
    engine.cancel("b")
    engine._scheduler.lone_tokens = engine._scheduler.chunk_tokens = 4
    engine._prefill_budget = None
    engine.add(request("d", [*BEGINNING, *prompt(50, seed=8)], 4))  # and leaves while it is read
    for key, answer in drain(engine, until=lambda _: "d" in engine._live and engine._live["d"][0].prefix).items():
        begun[key].token_ids += answer.token_ids
    engine.cancel("d")
    engine.add(request("e", prompt(60, seed=9), 4))  # would take what there is
    for key, answer in drain(engine).items():
        begun.setdefault(key, answer)
        if begun[key] is not answer:
            begun[key].token_ids += answer.token_ids
    for name in "ac":
        assert begun[name].token_ids == run(plain, asked[name])[name].token_ids
    nothing_held(engine)


def test_what_is_forgotten_while_it_is_read_is_found_by_nobody_and_goes_with_its_reader(model):
    engine, plain = engine_of(model), engine_of(model, prefix_bytes=0)
    run(engine, request("first", BEGINNING, 1))
    reader = request("reader", [*BEGINNING, 7], 40, ignore_eos=True)
    engine._prefill_budget = None
    engine.add(reader)
    begun = drain(engine, until=lambda made: made)["reader"].token_ids
    engine.forget_prefixes()
    later = request("later", [*BEGINNING, 7], 1)
    engine.add(later)
    made = drain(engine, until=lambda answers: "later" in answers)
    begun += made["reader"].token_ids if "reader" in made else []
    assert made["later"].last.cached_tokens == 0
    assert [entry.gone for entry in engine._live["reader"][0].prefix.blocks] == [True, True]
    begun += drain(engine)["reader"].token_ids
    assert begun == run(plain, reader)["reader"].token_ids
    engine.step()
    nothing_held(engine)
    assert engine.stats()["prefixes"]["blocks"] == 2, "of the one that came later"


@pytest.mark.parametrize("others", [0, 5])
def test_a_preempted_reader_lets_go_and_begins_again_with_what_is_left(model, others):
    engine = engine_of(model, max_batch=1, preempt_after=1, prefix_bytes=6 * BLOCK_BYTES)
    plain = engine_of(model, prefix_bytes=0)
    run(engine, request("first", BEGINNING, 1, tenant="a"))
    reader = request("reader", [*BEGINNING, 7], 80, tenant="a", ignore_eos=True)
    engine.add(reader)
    begun = drain(engine, until=lambda made: made and len(made["reader"].token_ids) > 20)["reader"].token_ids
    for number in range(1 + others):
        engine.add(request(f"other {number}", prompt(60, seed=number), 2, tenant="b"))
    begun += drain(engine)["reader"].token_ids
    assert engine.stats()["preempted"] >= 1
    assert begun == run(plain, reader)["reader"].token_ids
    nothing_held(engine)


def test_readers_leave_half_of_the_cache_to_others_and_copy_what_is_beyond(model):
    """One tenant's long requests read all that there is; another's prompts are kept and found all the same."""
    engine, plain = engine_of(model, max_batch=6, prefix_bytes=8 * BLOCK_BYTES), engine_of(model, prefix_bytes=0)
    prompts = [prompt(40, seed=30 + number) for number in range(4)]
    for number, ids in enumerate(prompts):
        run(engine, request(f"kept {number}", ids, 1, tenant="a"))
    readers = [request(f"reader {number}", [*ids, 7], 70, tenant="a") for number, ids in enumerate(prompts)]
    engine._prefill_budget = None
    for reader in readers:
        engine.add(reader)
    answers = drain(engine, until=lambda made: len(made) == 4)
    assert [answer.last.cached_tokens for answer in answers.values()] == [2 * BLOCK] * 4
    assert sorted(borrowed(engine)) == [0, 0, 0, 0, 2 * BLOCK, 2 * BLOCK], "four blocks of eight"
    others = [request(f"other {number}", prompt(60, seed=50), 2, tenant="b") for number in range(2)]
    for other in others:
        engine.add(other)
        for name, answer in drain(engine, until=lambda made, name=other.id: name in made).items():
            answers.setdefault(name, answer)
            if answers[name] is not answer:
                answers[name].token_ids += answer.token_ids
    assert [answers[other.id].last.cached_tokens for other in others] == [0, 3 * BLOCK]
    assert set(engine._live) >= {reader.id for reader in readers}, "they read on"
    for name, answer in drain(engine).items():
        answers[name].token_ids += answer.token_ids
    for one in (*readers, *others):
        assert answers[one.id].token_ids == run(plain, one)[one.id].token_ids
    nothing_held(engine)


def test_requests_behind_one_prompt_are_read_in_one_prefill(model):
    engine, plain = engine_of(model, max_batch=8, prefill_tokens=64), engine_of(model, prefix_bytes=0)
    ids = prompt(100, seed=4)
    run(engine, request("first", ids, 1))
    asked = [request(f"{n}", [*ids, n, 5], 6) for n in range(2, 6)]
    read = []
    begin = engine._runner.begin
    engine._runner.begin = lambda rows: (read.append([row.num_cached for row in rows]), begin(rows))
    assert tokens(run(engine, *asked)) == tokens(run(plain, *asked))
    assert read == [[96] * 4], "what is read of each is short"
    read.clear()
    run(engine, *(request(f"more {n}", [*ids, n, 6], 6) for n in range(2, 9)))
    assert [len(rows) for rows in read] == [5, 2], "512 tokens at most, with what is cached"


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="blocks are larger where memory pages are")
def test_answers_to_one_prompt_give_back_the_room_that_they_set_aside_to_copy_it():
    model = random_backbone("llama", head_dim=64, max_position_embeddings=256)
    engine, plain = engine_of(model), engine_of(model, prefix_bytes=0)
    one = request("n", prompt(100, seed=4), 12, n=4, temperature=1.0, seed=11, ignore_eos=True)
    engine.add(one)
    used = []
    answers = drain(engine, until=lambda _: used.append(engine.stats()["kv_blocks_used"]))
    assert (max(used), used[-1]) == (4 * 7, 7 + 3)
    assert tokens(answers) == tokens(run(plain, one))
    nothing_held(engine)


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="blocks are larger where memory pages are")
def test_what_is_borrowed_takes_none_of_the_budget_for_running_sequences():
    model = random_backbone("llama", head_dim=64, max_position_embeddings=256)
    block = 2 * 3 * 2 * 16 * 64 * 4
    engine, plain = engine_of(model, kv_memory=10 * block), engine_of(model, prefix_bytes=0)
    long = prompt(100, seed=4)
    run(engine, request("first", long, 1))
    asked = [request(f"{n}", [*long, n], 30, ignore_eos=True) for n in range(2, 5)]
    for one in asked:
        engine.add(one)
    most = 0
    cache = engine._runner.cache

    def watch(_answers):
        nonlocal most
        most = max(most, engine.stats()["running"])
        assert engine.stats()["kv_blocks_used"] * 16 >= sum(cache.lengths)

    answers = drain(engine, until=watch)
    assert most == 3, "of 100 tokens each, where there are blocks for 160"
    assert tokens(answers) == tokens(run(plain, *asked))
    nothing_held(engine)
    assert cache._free + sum(cache.room) // cache.block == cache.blocks


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="blocks are larger where memory pages are")
@pytest.mark.parametrize("blocks", [11, 13])
def test_answers_to_a_prompt_of_which_only_a_part_is_read_in_place_fit_into_what_they_are_charged(blocks):
    """Of the ten blocks that are kept six are read in place, while another request needs two to four."""
    model = random_backbone("llama", head_dim=64, max_position_embeddings=256)
    block = 2 * 3 * 2 * 16 * 64 * 4
    kept = 12 * (block + OVERHEAD)
    engine, plain = engine_of(model, kv_memory=blocks * block, prefix_bytes=kept), engine_of(model, prefix_bytes=0)
    long = prompt(161, seed=4)
    run(engine, request("first", long, 1))
    asked = [
        request("beside", prompt(20, seed=9), 30, ignore_eos=True),
        request("n", long, 12, n=2, temperature=1.0, seed=11, ignore_eos=True),
    ]
    assert tokens(run(engine, *asked)) == tokens(run(plain, *asked))
    nothing_held(engine)


# the kernel


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 20}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 72}),
        ("mistral", {"sliding_window": 90}),  # some rows still see all that they share
    ],
)
def test_rows_that_begin_alike_go_over_that_together_with_the_numbers_of_each_alone(model_type, changes, threads):
    runner = engine_of(random_backbone(model_type, **changes), max_batch=8, threads=threads)._runner
    kept = list(range(2, 8)), [2, 3, 4, 5, 20, 21], [2, 3, 12, 13], [30, 31, 32, 33, 34]  # two of these share nothing
    for slot, (places, seed) in enumerate(zip(kept, (1, 1, 1, 2), strict=True)):
        ids = prompt(64, seed=seed) + prompt(60, seed=10 + slot)
        runner.begin([PrefillRow(slot, ids, len(ids))])
        runner.advance()
        runner.end()
        runner.save_blocks(slot, 0, places)
    rows = []
    for slot, (own, tail) in enumerate(((0, 3), (0, 30), (1, 1), (0, 1), (3, 9), (2, 20), (3, 2), (1, 17))):
        ids = prompt(64, seed=1 if own < 3 else 2) + prompt(60, seed=10 + own)
        count = BLOCK * len(kept[own])
        ids = ids[:count] + prompt(tail, seed=40 + slot)
        row = PrefillRow(slot, ids, len(ids), places=tuple(kept[own]), num_cached=count, borrowed=count)
        runner.begin([row])
        runner.advance()
        runner.end()
        rows.append(DecodeRow(slot, 5 + slot, len(ids)))
    together = runner.decode(rows).values.clone()
    for at, row in enumerate(rows):
        assert torch.equal(runner.decode([row]).values[0], together[at]), at
    three = runner.decode(rows[1:4]).values
    assert torch.equal(three, together[1:4])


# the blocks themselves


def test_the_kernel_keeps_blocks_of_a_slot_and_names_them_in_pieces(model):
    engine = engine_of(model, threads=2)
    runner = engine._runner
    blocks, cache = KVBlocks(runner.cache, 7, runner._executor), runner.cache
    cache.lengths[1] = 6 * BLOCK
    cache.grow(1)
    for layer in range(3):
        cache.fill(layer, 1, *torch.randn(2, 2, 6 * BLOCK, 8))
    blocks.save(1, 2, [5, 6, 0, 3])  # positions 32 to 96
    for kept, slots in zip(blocks._kept, [*cache.keys, *cache.values], strict=True):
        for at, place in enumerate((5, 6, 0, 3), 2):
            saved = kept[:, place * BLOCK : (place + 1) * BLOCK]
            assert torch.equal(saved, slots[1, :, at * BLOCK : (at + 1) * BLOCK])
        assert kept[:, BLOCK : 3 * BLOCK].eq(0).all()
    blocks.borrow(3, [5, 6, 0, 3])
    one = blocks._native._borrowed[3]
    assert [(span.start // BLOCK, span.count // BLOCK) for span in one.span[: one.spans]] == [(5, 2), (0, 1), (3, 1)]
    assert cache.borrowed == [0, 0, 0, 4 * BLOCK]
    blocks.borrow(3, [])
    assert cache.borrowed == [0] * 4
