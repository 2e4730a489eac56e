"""An engine whose keys and values have little room: the same answers, later; and what can never fit is refused."""

import mmap

import pytest
from engine_models import Letters, drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine import kv_cache
from pedro.engine import runner as runner_module
from pedro.engine.request import Request, SamplingParams
from pedro.engine.schedule import SchedulerLimits
from pedro.engine.scheduler import Scheduler
from pedro.engine.sequence import Sequence, SequenceState
from pedro.errors import ConfigError, PedroError

BLOCK = 16
pytestmark = pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="blocks are larger where memory pages are")


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama", head_dim=64, max_position_embeddings=256)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for seed, method in enumerate(("pedro", "lora")):
        make_adapter(model, folder / method, seed=seed, method=method)
    return lambda ref: folder / ref


def block_bytes(model):
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * BLOCK * config.head_dim * 4


def small_engine(model, blocks, load=None, **config):
    """An engine with so many blocks of 16 tokens."""
    engine = make_engine(model, load=load, kv_memory=blocks * block_bytes(model), **config)
    stats = engine.stats()
    assert (stats["kv_blocks"], stats["kv_block_tokens"], stats["kv_blocks_used"]) == (blocks, BLOCK, 0)
    return engine


def nothing_left(engine):
    """Whether all blocks and slots are free."""
    stats, cache = engine.stats(), engine._runner.cache
    assert (stats["kv_blocks_used"], stats["slots_free"]) == (0, engine.config.max_batch)
    assert not any(cache.lengths)
    assert cache._free + sum(cache.room) // cache.block == cache.blocks


def mixed():
    """Requests of three tenants, of many kinds and lengths, two turns of each so that beginnings are found."""
    made = []
    for turn in range(2):
        name = f"{turn}-".format
        made += [
            request(name() + "long", prompt(50, 1), 90, tenant="a"),
            request(name() + "longer", prompt(20, 2), 130, tenant="a", adapter="lora"),
            request(name() + "pedro", prompt(30, 3), 60, tenant="b", adapter="pedro"),
            request(name() + "drawn", prompt(9, 4), 70, tenant="b", temperature=1.0, seed=3, logprobs=1),
            request(name() + "several", prompt(17, 5), 40, tenant="c", n=3, temperature=0.8, seed=4, adapter="pedro"),
            request(name() + "beams", prompt(12, 6), 20, tenant="c", num_beams=2),
            request(name() + "read", prompt(100, 7), 0, tenant="c", prompt_logprobs=0),
            request(name() + "short", prompt(3, 8), 1, tenant="d"),
        ]
    return made


@pytest.fixture(params=["native", "torch", "paged"])
def kernel(request, monkeypatch):
    """Which executor runs, and in which cache."""
    if request.param == "paged":
        monkeypatch.setattr(kv_cache, "PAGE", BLOCK)
        monkeypatch.setattr(runner_module, "uses_graphs", lambda device: True)
        monkeypatch.setattr(runner_module, "GraphCapture", lambda: capture)
        monkeypatch.setattr(runner_module, "find_paged_attention", lambda dtype: None)
    return "auto" if request.param == "native" else "torch"


def capture(step):
    """A "graph" is the function called again."""
    made = step()
    return lambda: made.copy_(step()), made


def test_answers_are_the_same_with_little_room(model, adapters, kernel):
    expected = run(make_engine(model, load=adapters, kernel=kernel), *mixed())
    engine = small_engine(model, 11, adapters, kernel=kernel, prefix_bytes=20 * (block_bytes(model) + 4096))
    most = 0
    schedule = engine._scheduler.schedule

    def watched(admit):
        nonlocal most
        plan = schedule(admit)
        most = max(most, engine._scheduler.kv.used)
        assert engine._scheduler.kv.used <= 11
        return plan

    engine._scheduler.schedule = watched
    answers = run(engine, *mixed())
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    assert most >= 10, "all of it was used"
    assert engine.stats()["preempted"] > 2
    assert engine.stats()["prefixes"]["hits"] > 0
    nothing_left(engine)


def test_guessed_tokens_have_room_too(model):
    asked = [request(str(i), [*prompt(12, i), *prompt(12, i)], 100) for i in range(4)]
    expected = run(make_engine(model), *asked)
    engine = small_engine(model, 10, speculate="ngram")
    engine._speculator.costs.of = lambda rows: 0.01  # as if a guess cost next to nothing
    answers = run(engine, *asked)
    assert {key: one.token_ids for key, one in answers.items()} == {key: one.token_ids for key, one in expected.items()}
    assert engine.stats()["speculation"]["draft_tokens"] > 0
    nothing_left(engine)


def test_nothing_is_lost_over_many_requests_some_of_which_are_cancelled_or_fail(model):
    engine = small_engine(model, 9)
    decode = engine._runner.decode
    for turn in range(12):
        for i in range(6):
            engine.add(request(f"{turn}-{i}", prompt(5 + 9 * i, i), 40, tenant=f"t{i % 2}", n=1 + i % 2))
        drain(engine, until=lambda answers, turn=turn: f"{turn}-0" in answers)
        engine.cancel(f"{turn}-1")
        engine.cancel(f"{turn}-5")
        if turn % 3 == 0:
            engine._runner.decode = lambda rows: 1 / 0
            engine.step()
            engine._runner.decode = decode
        drain(engine)
        nothing_left(engine)


def test_a_request_that_fits_alone_is_never_refused_and_runs_alone(model):
    engine = small_engine(model, 6)
    assert engine.max_length == 6 * BLOCK
    asked = [request(str(i), prompt(90 - i, i), 6 + i, tenant=str(i)) for i in range(4)]
    answers = run(engine, *asked)
    assert [len(answers[str(i)].token_ids) for i in range(4)] == [6, 7, 8, 9]
    assert engine.stats()["preempted"] == 0
    whole = run(engine, request("rest", prompt(50), None))["rest"]
    assert len(whole.token_ids) == 6 * BLOCK - 50, "as much answer as there is room for"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "with max_tokens = 8 exceeds the 96 tokens that the server's memory for keys and values holds; "
         "shorten the prompt or lower max_tokens, or ask for a server with more (--kv-memory)"),
        ({"num_beams": 3}, "the 32 tokens that the server's memory for keys and values holds for each of 3 beams"),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_refused_at_once_with_the_limit(model, fields, said):
    engine = small_engine(model, 6)
    with pytest.raises(PedroError) as refused:
        engine.add(request("r", prompt(90), 8, **fields))
    assert said in refused.value.message
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert not engine.has_work()


def test_beams_have_all_their_room_from_the_start(model):
    engine = small_engine(model, 8)
    engine.add(request("beams", prompt(20), 29, num_beams=2))
    engine.add(request("other", prompt(20), 60))
    engine.step()
    assert engine.stats()["kv_blocks_used"] == 2 * 3 + 2
    answers = drain(engine)
    assert all(answer.last.error is None for answer in answers.values())
    expected = run(make_engine(model), request("beams", prompt(20), 29, num_beams=2))["beams"]
    assert answers["beams"].token_ids == expected.token_ids


def test_beams_without_max_tokens_leave_room_to_others(model):
    engine = small_engine(model, 80, max_batch=16)  # 16 full sequences would need 256
    for length, most in ((10, 5 * BLOCK - 10), (90, 64), (250, 6)):
        (beams,) = engine._processor.process(request("beams", prompt(length), None, num_beams=4))
        assert beams.max_tokens == most, "of 20 blocks, a quarter of all"
    (beams,) = engine._processor.process(request("beams", prompt(20), 200, num_beams=4))
    assert beams.max_tokens == 200
    (alone,) = engine._processor.process(request("alone", prompt(20), None))
    assert alone.max_tokens == 236


def test_less_than_a_block_is_refused_when_the_engine_starts(model):
    with pytest.raises(ConfigError, match=r"one block of 16 tokens takes 48\.0 KiB, got 1000 bytes"):
        make_engine(model, kv_memory=1000)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ConfigError, match=r"engine\.kv_memory: expected bytes, or a share"):
            make_engine(model, kv_memory=wrong)


@pytest.mark.parametrize("adapter", [None, "lora"])
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_what_is_read_in_place_takes_no_room_and_for_its_own_part_a_request_waits(model, adapters, kernel, adapter):
    engine = small_engine(model, 8, adapters, kernel=kernel, prefix_bytes=1 << 24)
    if engine._runner.kernel != kernel:
        pytest.skip("the native kernel cannot be built here")
    long = prompt(100, 4)  # six blocks of it are kept
    run(engine, request("first", long, 1, adapter=adapter))
    asked = [request(name, [*long, at], 20, adapter=adapter) for at, name in enumerate("ab", 2)]
    asked.append(request("other", prompt(100, 9), 8, adapter=adapter))
    for one in asked:
        engine.add(one)
    beside = set()
    answers = drain(engine, until=lambda _: beside.add("".join(s.request.id for s in engine._scheduler.running)))
    assert ("ab" in beside) == (kernel == "native"), "elsewhere it is copied, and takes seven blocks of eight"
    assert not any("other" in names and names != "other" for names in beside)
    assert engine.stats()["preempted"] == 0
    expected = run(make_engine(model, load=adapters, kernel=kernel), *asked)
    assert {key: one.token_ids for key, one in answers.items()} == {key: one.token_ids for key, one in expected.items()}
    nothing_left(engine)


# the scheduler alone


class Steps:
    """Runs a scheduler without a model: every running sequence gets a token a step."""

    def __init__(self, blocks, **limits):
        self.scheduler = Scheduler(SchedulerLimits(**{"slots": 8, "kv_blocks": blocks, "kv_block": 4, **limits}))
        self.preempted = []

    def add(self, tenant, length, tokens):
        asked = Request("r", [1] * length, tenant=tenant, params=SamplingParams(max_tokens=tokens))
        made = Sequence(asked, 0, tokens, Letters(), frozenset())
        self.scheduler.add([made])
        return made

    def step(self, times=1):
        for _ in range(times):
            plan = self.scheduler.schedule(lambda _: True)
            self.preempted += plan.preempted
            for sequence in plan.preempted:
                sequence.slots = []
            if plan.prefill:
                self.scheduler.prefilled(plan.prefill.groups)
            for sequence in [*(plan.prefill.sequences if plan.prefill else ()), *plan.decode]:
                self.scheduler.charge(sequence)
                if sequence.append(0)[1]:
                    self.scheduler.finish(sequence)


def states(*sequences):
    return [one.state for one in sequences]


def test_what_finds_no_room_waits_and_is_not_passed():
    steps = Steps(blocks=10)
    first = steps.add("a", 27, 6)
    steps.step()
    large, small = steps.add("a", 20, 6), steps.add("a", 2, 6)
    steps.step(2)
    assert states(first, large, small) == [SequenceState.RUNNING, SequenceState.WAITING, SequenceState.WAITING]
    steps.step(3)
    assert first.state is SequenceState.FINISHED
    steps.step()
    assert states(large, small) == [SequenceState.RUNNING] * 2
    assert not steps.preempted


def test_the_youngest_of_the_tenant_that_is_most_ahead_waits_again_where_room_ends():
    steps = Steps(blocks=9)
    old = steps.add("ahead", 6, 28)
    steps.step(5)
    level, young = steps.add("level", 6, 28), steps.add("ahead", 6, 28)
    while not steps.preempted:
        steps.step()
    assert steps.preempted == [young]
    assert states(old, level) == [SequenceState.RUNNING] * 2
    steps.step(200)
    assert states(old, level, young) == [SequenceState.FINISHED] * 3
    assert steps.scheduler.kv.used == 0


def test_a_tenant_far_behind_takes_room_from_one_far_ahead():
    steps = Steps(blocks=32, preempt_after=30)
    hog = steps.add("hog", 4, 120)
    steps.step(40)
    late = steps.add("late", 100, 4)
    steps.step(10)
    assert states(hog, late) == [SequenceState.RUNNING, SequenceState.WAITING]
    steps.step(10)
    assert steps.preempted == [hog]
    steps.step(100)
    assert states(hog, late) == [SequenceState.FINISHED] * 2


def test_a_prompt_that_needs_all_room_gets_it():
    steps = Steps(blocks=32, preempt_after=30)
    hog = steps.add("hog", 4, 120)
    steps.step(40)
    late = steps.add("late", 124, 4)
    steps.step(20)
    assert steps.preempted == [hog]
    steps.step(100)
    assert states(hog, late) == [SequenceState.FINISHED] * 2


@pytest.mark.parametrize(("length", "victims"), [(24, 2), (40, 0)])
def test_room_is_taken_from_nobody_beyond_what_is_more_than_its_share(length, victims):
    steps = Steps(blocks=32, preempt_after=10_000)
    many = [steps.add("many", 4, 60) for _ in range(6)]
    steps.step(12)
    assert {one.blocks for one in many} == {4}
    steps.step(2)
    assert {one.blocks for one in many} == {5}
    one = steps.add("one", length, 4)
    steps.step()
    assert len(steps.preempted) == victims
    assert one.state is (SequenceState.RUNNING if victims else SequenceState.WAITING)


def test_one_that_has_hardly_begun_is_spared_where_another_has_had_its_turn():
    steps = Steps(blocks=15)
    old = steps.add("a", 4, 36)
    longer = steps.add("a", 4, 56)
    steps.step(17)
    assert not steps.preempted
    begun = steps.add("a", 2, 40)
    assert old.tokens_left < 32 < longer.tokens_left
    while not steps.preempted:
        steps.step()
    assert steps.preempted == [longer]
    steps.step(300)
    assert states(old, longer, begun) == [SequenceState.FINISHED] * 3


@pytest.mark.parametrize("borrowed", [0, 20])
def test_nothing_is_preempted_for_room_that_a_request_borrows(borrowed):
    steps = Steps(blocks=14, preempt_after=1)
    old = steps.add("a", 20, 60)
    steps.step(20)
    new = steps.add("b", 24, 8)

    def foresee(one):
        one.borrowed = borrowed if one is new else 0
        return True

    steps.scheduler.foresee = foresee
    steps.step(2)
    assert new.state is SequenceState.RUNNING
    assert steps.preempted == ([] if borrowed else [old])
    assert new.blocks == (2 if borrowed else 7)
