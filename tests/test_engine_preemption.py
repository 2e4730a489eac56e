"""A preempted request goes on exactly where it was, and preemption keeps tenants' shares without thrashing."""

from collections import Counter

import pytest
from engine_models import (
    Answer,
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

from pedro.engine.request import Request, SamplingParams
from pedro.engine.schedule import SchedulerLimits
from pedro.engine.scheduler import Scheduler
from pedro.engine.sequence import MIN_TURN_TOKENS, Sequence, SequenceState


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama", max_position_embeddings=256)


class Clock:
    """Runs a scheduler without a model: every running sequence gets a token a step."""

    def __init__(self, **limits) -> None:
        self.scheduler = Scheduler(SchedulerLimits(**{"slots": 2, "preempt_after": 40, **limits}))
        self.given: Counter = Counter()
        self.preempted = 0

    def add(self, tenant: str, tokens: int, name: str = "r", length: int = 10, n: int = 1) -> list[Sequence]:
        asked = Request(name, [1] * length, tenant=tenant, params=SamplingParams(max_tokens=tokens), n=n)
        made = [Sequence(asked, i, tokens, Letters(), frozenset()) for i in range(n)]
        self.scheduler.add(made)
        return made

    def step(self) -> None:
        plan = self.scheduler.schedule(lambda _: True)
        for sequence in plan.preempted:
            assert len(sequence.output_ids) - sequence.turn_length >= MIN_TURN_TOKENS
            sequence.slots = []
        self.preempted += len(plan.preempted)
        if plan.prefill:
            self.scheduler.prefilled(plan.prefill.groups)
        for sequence in [*(plan.prefill.sequences if plan.prefill else ()), *plan.decode]:
            self.given[sequence.request.tenant] += 1
            self.scheduler.charge(sequence)
            if sequence.append(0)[1]:
                self.scheduler.finish(sequence)


@pytest.mark.parametrize("weights", [{}, {"gold": 3.0}])
def test_long_answers_of_a_flood_do_not_keep_a_tenant_from_its_share(weights):
    clock = Clock(slots=2, weights=weights, max_waiting_per_tenant=1000)
    for _ in range(40):
        clock.add("flood", 400)
    for _ in range(100):
        clock.step()
    assert clock.given == {"flood": 200}
    for _ in range(40):
        clock.add("gold", 400)
    clock.given.clear()
    for _ in range(2000):
        clock.step()
    share = clock.given["gold"] / clock.given.total()
    assert share == pytest.approx(weights.get("gold", 1.0) / (weights.get("gold", 1.0) + 1), abs=0.03)
    assert clock.given.total() == 4000, "every slot made a token in every step"
    assert clock.preempted < 4000 / MIN_TURN_TOKENS


def test_a_tenant_takes_no_slot_from_itself_and_none_within_the_slack():
    clock = Clock(slots=1, preempt_after=10_000)
    clock.add("a", 200)
    clock.add("a", 200)
    clock.add("b", 20)
    for _ in range(300):
        clock.step()
    assert (clock.preempted, clock.given["b"]) == (0, 20)
    clock = Clock(slots=1)
    clock.add("a", 300)
    clock.add("a", 300)
    for _ in range(200):
        clock.step()
    assert (clock.preempted, clock.given) == (0, {"a": 200})


def test_the_youngest_of_the_tenant_that_is_most_ahead_gives_way():
    clock = Clock(slots=3)
    (old,), (other,) = clock.add("ahead", 300), clock.add("level", 300)
    clock.step()
    (young,) = clock.add("ahead", 300)
    for _ in range(30):
        clock.step()
    clock.add("new", 300, length=1)
    for _ in range(30):
        clock.step()
        if clock.preempted:
            break
    assert (young.state, old.state, other.state) == (
        SequenceState.WAITING,
        SequenceState.RUNNING,
        SequenceState.RUNNING,
    )


def preempted_run(model, rivals, *requests, tokenizer=None, load=None):
    """Answers to `requests` of tenant "long" that rivals preempt; at least one preemption is asserted."""
    engine = make_engine(model, tokenizer, load, max_batch=2, preempt_after=8)
    for one in requests:
        engine.add(one)
    answers: dict = {}
    for step in range(2000):
        if step == 25:
            for i in range(rivals):
                engine.add(request(f"rival{i}", prompt(5, i), 60, tenant=f"t{i}"))
        for output in engine.step():
            answers.setdefault((output.request_id, output.index), Answer()).take(output)
        if not engine.has_work():
            break
    assert not engine.has_work()
    assert engine.stats()["preempted"] >= len(requests)
    assert engine.stats()["slots_free"] == 2
    return answers


def test_a_preempted_request_continues_exactly(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1)
    fields = {"tenant": "long", "logprobs": 1, "prompt_logprobs": 0}
    requests = [
        request("greedy", prompt(9, 1), 90, adapter="a", **fields),
        request("seeded", prompt(7, 2), 90, temperature=1.0, seed=5, repetition_penalty=1.1, **fields),
    ]
    answers = preempted_run(model, 3, *requests, load=lambda ref: tmp_path / ref)
    alone = run(make_engine(model, load=lambda ref: tmp_path / ref), *requests)
    for one in requests:
        disturbed, expected = answers[one.id, 0], alone[one.id]
        assert disturbed.token_ids == expected.token_ids
        assert disturbed.text == expected.text
        made, wanted = ([entry.logprob for entry in a.logprobs] for a in (disturbed, expected))
        assert made == pytest.approx(wanted, abs=1e-4)
        assert sum(output.prompt_logprobs is not None for output in disturbed.outputs) == 1
        assert [output.completion_tokens for output in disturbed.outputs] == list(range(1, 91))


def test_a_preempted_request_of_lora_keeps_its_adapter_pinned_until_it_ends(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1, method="lora")
    one = request("r", prompt(9), 90, adapter="a", tenant="long")
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=1, preempt_after=8)
    expected = run(make_engine(model, load=lambda ref: tmp_path / ref), one)["r"].token_ids
    engine.add(one)
    drain(engine, until=lambda answers: "r" in answers and len(answers["r"].token_ids) > 30)
    engine.add(request("rival", prompt(5), 30, tenant="t"))
    drain(engine, until=lambda answers: "rival" in answers)
    assert engine.adapters.residents()["a"].refcount == 1
    (waiting,) = engine._live["r"]
    assert waiting.state is SequenceState.WAITING
    begun = waiting.output_ids[:]
    assert begun + drain(engine)["r"].token_ids == expected
    assert engine.adapters.residents()["a"].refcount == 0
    assert engine.stats()["preempted"] >= 1


def test_a_preempted_request_needs_its_adapter_no_more(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1)
    one = request("r", prompt(9), 90, adapter="a", tenant="long")
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=1, preempt_after=8)
    engine.add(one)
    drain(engine, until=lambda answers: "r" in answers and len(answers["r"].token_ids) > 30)
    before = engine._live["r"][0].output_ids[:]
    assert engine.adapters.evict("a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    engine.add(request("rival", prompt(5), 30, tenant="t"))
    answers = drain(engine)
    assert engine.stats()["preempted"] >= 1
    make_adapter(model, tmp_path / "again", seed=1)
    expected = run(make_engine(model, load=lambda ref: tmp_path / "again"), one)["r"].token_ids
    assert before + answers["r"].token_ids == expected


def test_streamed_text_is_neither_lost_nor_repeated_by_a_preemption():
    model, tokenizer, _ = stories()
    ids = tokenizer("Once upon a time").input_ids
    whole = run(make_engine(model, tokenizer), request("r", ids, 100, ignore_eos=True))["r"]
    answers = preempted_run(
        model, 2, request("r", ids, 100, ignore_eos=True, tenant="long", stop=("never said",)), tokenizer=tokenizer
    )
    assert answers["r", 0].text == whole.text


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_preempted_request_can_be_ended_while_it_waits(model, how):
    engine = make_engine(model, max_batch=1, preempt_after=8)
    engine.add(request("r", prompt(9), 90, tenant="long", deadline_s=30.0))
    drain(engine, until=lambda answers: "r" in answers and len(answers["r"].token_ids) > 30)
    engine.add(request("rival", prompt(5), 60, tenant="t"))
    drain(engine, until=lambda answers: "rival" in answers)
    (waiting,) = engine._live["r"]
    assert (waiting.state, engine.stats()["waiting_by_tenant"]) == (SequenceState.WAITING, {"long": 1})
    if how == "cancel":
        engine.cancel("r")
    else:
        engine._scheduler._deadlines[0] = (0.0, *engine._scheduler._deadlines[0][1:])
    answers = drain(engine)
    assert answers["r"].last.finish_reason == ("cancelled" if how == "cancel" else "error")
    assert answers["rival"].last.finish_reason == "length"
    assert engine.stats()["slots_free"] == 1


def test_choices_share_one_prefill_as_far_as_slots_go(model):
    engine = make_engine(model, max_batch=4)
    read = []
    begin = engine._runner.begin
    engine._runner.begin = lambda rows: read.append(len(rows)) or begin(rows)
    asked = request("r", prompt(8), 6, temperature=1.0, seed=4, n=7, prompt_logprobs=0)
    answers = run(engine, asked)
    assert sum(read) == 2, "one prefill for the four that fit, one for the three that came after"
    for index in range(7):
        answer = answers[("r", index) if index else "r"]
        assert answer.outputs[0].prompt_logprobs is not None
    alone = run(make_engine(model, max_batch=1), asked)
    assert {key: a.token_ids for key, a in answers.items()} == {key: a.token_ids for key, a in alone.items()}
