"""Who is served when: fair between tenants, bounded, on time, and gone when cancelled."""

import itertools
import time

import pytest
from engine_models import Letters, drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine.request import Request, SamplingParams
from pedro.engine.schedule import SchedulerLimits
from pedro.engine.scheduler import Scheduler
from pedro.engine.sequence import Sequence, SequenceState
from pedro.errors import DeadlineError, OverloadedError, PedroError, RateLimitError


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


def sequence(tenant, length=10, adapter=None, deadline_s=None, numbers=itertools.count()):  # noqa: B008
    made = Request(f"s{next(numbers)}", [1] * length, tenant=tenant, adapter=adapter, deadline_s=deadline_s)
    return Sequence(made, 0, 5, Letters(), frozenset())


def make_scheduler(**limits):
    return Scheduler(SchedulerLimits(**{"slots": 4, **limits}))


def admitted(scheduler, admit=lambda _: True):
    """The sequences whose prefill begins in the next step; the step is completed."""
    plan = scheduler.schedule(admit)
    if plan.prefill is None:
        return []
    while not plan.prefill.ends:
        plan = scheduler.schedule(admit)
    scheduler.prefilled(plan.prefill.groups)
    return list(plan.prefill.sequences)


def test_a_flooding_tenant_does_not_keep_another_waiting(model):
    engine = make_engine(model, max_batch=2)
    for i in range(30):
        engine.add(request(f"flood{i}", prompt(10, i), 6, tenant="flood"))
    for _ in range(5):
        engine.step()
    for i in range(3):
        engine.add(request(f"small{i}", prompt(10, i), 6, tenant="small"))
    answers = drain(engine)
    begun = list(answers)  # in the order of their first tokens since
    ranks = [begun.index(f"small{i}") for i in range(3)]
    assert len(answers) > 20
    assert max(ranks) <= 7, f"the small tenant's answers began as numbers {ranks}, in turn with the flood's"


def test_two_flooding_tenants_get_equal_tokens_whatever_their_requests_are_like():
    scheduler = make_scheduler(slots=1)
    for _ in range(100):
        scheduler.add([sequence("long", 30)])
        scheduler.add([sequence("short", 10)])
    given = {"long": 0, "short": 0}
    for _ in range(60):
        for one in admitted(scheduler):
            given[one.request.tenant] += len(one.request.prompt_ids)
            scheduler.finish(one)
    assert abs(given["long"] - given["short"]) <= 40


def test_weights_give_a_tenant_more():
    scheduler = make_scheduler(slots=1, weights={"gold": 3.0})
    for _ in range(60):
        scheduler.add([sequence("gold")])
        scheduler.add([sequence("plain")])
    given = {"gold": 0, "plain": 0}
    for _ in range(40):
        for one in admitted(scheduler):
            given[one.request.tenant] += 1
            scheduler.finish(one)
    assert given == {"gold": 30, "plain": 10}


def test_answer_tokens_count_against_a_tenant():
    scheduler = make_scheduler(slots=1)
    for _ in range(20):
        scheduler.add([sequence("talker")])
        scheduler.add([sequence("listener")])
    given = {"talker": 0, "listener": 0}
    for _ in range(12):
        for one in admitted(scheduler):
            given[one.request.tenant] += 1
            scheduler.charge(one, 20 if one.request.tenant == "talker" else 0)
            scheduler.finish(one)
    assert given["listener"] >= 3 * given["talker"]


def test_idling_earns_no_credit():
    scheduler = make_scheduler(slots=1)
    for _ in range(50):
        scheduler.add([sequence("busy")])
    for _ in range(20):
        scheduler.finish(*admitted(scheduler))
    for _ in range(30):
        scheduler.add([sequence("late")])
    order = []
    for _ in range(10):
        (one,) = admitted(scheduler)
        order.append(one.request.tenant)
        scheduler.finish(one)
    assert order.count("late") in (5, 6), "from now on they take turns"


def test_an_adapter_that_still_loads_holds_up_nobody_else():
    scheduler = make_scheduler()
    loading, same_tenant, other = sequence("a", adapter="slow"), sequence("a", adapter="ready"), sequence("b")
    for one in (loading, same_tenant, other):
        scheduler.add([one])
    assert set(admitted(scheduler, lambda s: s.request.adapter != "slow")) == {same_tenant, other}
    assert admitted(scheduler) == [], "it is not asked about again before adapters came or went"
    scheduler.unpark()
    assert admitted(scheduler) == [loading]


def test_a_prefill_batch_keeps_to_its_budget_but_one_long_prompt_always_fits():
    scheduler = make_scheduler(prefill_tokens=25, slots=12)
    for length in (*[10] * 8, 90):
        scheduler.add([sequence("a", length)])
    read = [len(admitted(scheduler)) for _ in range(4)]
    assert read == [5, 2, 1, 1], "while none runs, nobody waits for what is read: twice as much at once"


def test_slots_bound_what_runs_and_return_when_it_ends():
    scheduler = make_scheduler(slots=2)
    for _ in range(5):
        scheduler.add([sequence("a")])
    first = admitted(scheduler)
    assert len(first) == 2
    assert (admitted(scheduler), scheduler.slots_free) == ([], 0)
    scheduler.finish(first[0])
    assert [one.slot for one in admitted(scheduler)] == [first[0].slot]


def test_a_sequence_cancelled_in_its_prefill_keeps_its_slot_until_that_ends():
    scheduler = make_scheduler(slots=1)
    one, two = sequence("a"), sequence("a")
    scheduler.add([one])
    scheduler.add([two])
    plan = scheduler.schedule(lambda _: True)
    scheduler.finish(one)
    assert scheduler.slots_free == 0
    scheduler.prefilled(plan.prefill.groups)
    assert (scheduler.slots_free, scheduler.running) == (1, [])
    assert admitted(scheduler) == [two]


def test_a_finished_sequence_cannot_run_again():
    one = sequence("a")
    one.to(SequenceState.FINISHED)
    with pytest.raises(AssertionError, match="FINISHED"):
        one.to(SequenceState.RUNNING)


def test_cancel_ends_a_running_request_and_frees_its_slot(model):
    engine = make_engine(model, max_batch=1)
    engine.add(request("long", prompt(6), 100))
    engine.add(request("next", prompt(6), 4))
    for _ in range(3):
        engine.step()
    assert engine.stats()["slots_free"] == 0
    engine.cancel("long")
    assert engine.stats()["slots_free"] == 1
    answers = drain(engine)
    assert answers["long"].last.finish_reason == "cancelled"
    assert answers["next"].last.finish_reason == "length"
    assert not engine.has_work()
    engine.cancel("long")
    engine.cancel("never heard of")


def test_cancel_takes_a_waiting_request_and_all_its_answers_out(model):
    engine = make_engine(model, max_batch=1)
    engine.add(request("first", prompt(6), 4))
    engine.step()
    engine.add(request("waiting", prompt(6), 4, n=3))
    engine.cancel("waiting")
    assert engine.stats()["waiting"] == 0
    answers = drain(engine)
    assert {key for key, a in answers.items() if a.last.finish_reason == "cancelled"} == {
        "waiting",
        ("waiting", 1),
        ("waiting", 2),
    }


def test_a_deadline_ends_waiting_and_running_requests_with_an_error(model):
    engine = make_engine(model, max_batch=1)
    engine.add(request("running", prompt(6), 110, deadline_s=0.15))
    answers = drain(engine, until=lambda answers: "running" in answers)
    engine.add(request("waiting", prompt(6), 4, deadline_s=0.05))
    time.sleep(0.2)
    answers |= drain(engine)
    for name in ("running", "waiting"):
        assert isinstance(answers[name].last.error, DeadlineError)
        assert answers[name].last.error.code == "deadline_exceeded"
    assert engine.stats()["slots_free"] == 1
    assert run(engine, request("after", prompt(6), 4, deadline_s=60))["after"].last.finish_reason == "length"


def test_what_takes_the_slot_of_one_past_its_deadline_keeps_its_low_rank_terms(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1, method="lora")
    one = request("lora", prompt(6), 8, adapter="a")
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=1)
    expected = run(engine, one)["lora"].token_ids
    engine.add(request("late", prompt(6), 110, deadline_s=30.0))
    engine.step()
    engine.add(one)
    engine._scheduler._deadlines[0] = (0.0, *engine._scheduler._deadlines[0][1:])
    answers = drain(engine)
    assert answers["late"].last.error.code == "deadline_exceeded"
    assert answers["lora"].token_ids == expected


def test_a_long_prompt_that_nobody_waits_for_is_not_read_on(model):
    engine = make_engine(model, max_batch=2, prefill_tokens=16)
    engine.add(request("running", prompt(6), 30))
    engine.step()
    engine.add(request("long", prompt(100), 8))
    engine.step()
    assert engine.stats()["slots_free"] == 0
    engine.cancel("long")
    engine.step()
    assert engine.stats()["slots_free"] == 1
    assert drain(engine)["running"].last.finish_reason == "length"
    assert run(engine, request("long", prompt(100), 8)).keys() == {"long"}


def test_a_prompt_that_cannot_be_cut_is_answered_in_the_step_that_read_it():
    engine = make_engine(random_backbone("gpt_neox"), max_batch=2)
    for name in ("first", "second"):
        engine.add(request(name, prompt(6), 60 if name == "first" else 2))
        for _ in range(3):
            engine.step()
    engine.add(request("long", prompt(90), 8))
    assert "long" in {output.request_id for output in engine.step()}


def test_full_queues_refuse_at_once_and_say_whose_they_are(model):
    engine = make_engine(model, max_batch=1, max_waiting=5, max_waiting_per_tenant=3)
    for i in range(3):
        engine.add(request(f"a{i}", prompt(6), 4, tenant="a"))
    with pytest.raises(RateLimitError, match="3 of your requests"):
        engine.add(request("a3", prompt(6), 4, tenant="a"))
    with pytest.raises(OverloadedError, match="queue of 5 is full"):
        engine.add(request("b0", prompt(6), 4, tenant="b", n=3))
    engine.add(request("b1", prompt(6), 4, tenant="b", n=2))
    assert len(drain(engine)) == 5
    engine.add(request("a3", prompt(6), 4, tenant="a"))


def test_what_can_never_run_is_refused_with_the_numbers(model):
    engine = make_engine(model, max_length=32)
    with pytest.raises(PedroError, match=r"30 tokens .*max_tokens = 8 .*32 tokens") as caught:
        engine.add(request("r", prompt(30), 8))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(PedroError, match=r"32 tokens"):
        engine.add(request("r", prompt(32), None))
    with pytest.raises(PedroError, match="token 500 is outside the vocabulary"):
        engine.add(request("r", [4, 500], 8))
    with pytest.raises(PedroError, match="conditioning_length"):
        request("r", prompt(4), 8, conditioning_length=5)
    engine.add(request("r", prompt(4), 8))
    with pytest.raises(PedroError, match="in use"):
        engine.add(request("r", prompt(4), 8))


def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(model, caplog, monkeypatch):
    engine = make_engine(model, max_batch=2)
    expected = run(make_engine(model), request("r", prompt(6), 6))["r"].token_ids
    engine.add(request("doomed", prompt(6), 6))
    engine.step()
    engine.add(request("also doomed", prompt(6), 6))
    with monkeypatch.context() as patch:
        for method in ("advance", "decode"):
            patch.setattr(engine._runner, method, lambda *_: 1 / 0)
        answers = drain(engine)
    assert {name: a.last.error.code for name, a in answers.items()} == {
        "doomed": "engine_error",
        "also doomed": "engine_error",
    }
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in answers["doomed"].last.error.message
    assert engine.stats()["slots_free"] == 2
    assert run(engine, request("r", prompt(6), 6))["r"].token_ids == expected


def test_params_and_requests_cannot_be_changed_under_the_engine():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 1.0
