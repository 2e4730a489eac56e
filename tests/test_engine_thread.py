"""The engine behind a thread: outputs arrive, ends are clean, and nothing kills it."""

import gc
import threading
import time

import pytest
from engine_models import Answer, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine import EngineThread
from pedro.errors import PedroError, UnavailableError


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


class Client:
    """Collects the outputs of one request."""

    def __init__(self, answers: int = 1) -> None:
        self.answer = Answer()
        self.done = threading.Event()
        self._open = answers

    def __call__(self, output) -> None:
        self.answer.take(output)
        self._open -= output.finish_reason is not None
        if not self._open:
            self.done.set()

    def result(self) -> Answer:
        assert self.done.wait(20), "no last output came"
        return self.answer


def test_many_clients_get_what_they_would_get_alone(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1)

    def load(ref):
        time.sleep(0.05)
        return tmp_path / ref

    requests = [
        request(f"r{i}", prompt(4 + i, i), 6, adapter=(None, "a")[i % 2], tenant=f"t{i % 3}") for i in range(12)
    ]
    with EngineThread(make_engine(model, load=load)) as thread:
        clients = {one.id: Client() for one in requests}
        senders = [threading.Thread(target=thread.submit, args=(one, clients[one.id])) for one in requests]
        for sender in senders:
            sender.start()
        made = {name: client.result().token_ids for name, client in clients.items()}
    for one in requests:
        assert made[one.id] == run(make_engine(model, load=load), one)[one.id].token_ids


def test_what_cannot_run_is_raised_where_it_is_submitted(model):
    with EngineThread(make_engine(model, max_length=16)) as thread:
        with pytest.raises(PedroError, match="context"):
            thread.submit(request("r", prompt(15), 8), Client())
        client = Client()
        thread.submit(request("r", prompt(4), 8), client)
        assert client.result().last.finish_reason == "length"
    assert not thread.alive


def test_cancel_reaches_the_client_and_the_id_can_be_used_again(model):
    with EngineThread(make_engine(model)) as thread:
        client, again = Client(), Client(answers=2)
        thread.submit(request("r", prompt(4), 120), client)
        with pytest.raises(PedroError, match="in use"):
            thread.submit(request("r", prompt(4), 4), again)
        thread.cancel("r")
        assert client.result().last.finish_reason == "cancelled"
        thread.submit(request("r", prompt(4), 4, n=2), again)
        again.result()


def test_stopping_tells_those_who_wait_and_refuses_new_ones(model):
    thread = EngineThread(make_engine(model, max_batch=1))
    thread.start()
    clients = [Client() for _ in range(3)]
    for i, client in enumerate(clients):
        thread.submit(request(f"r{i}", prompt(4), 120), client)
    thread.stop()
    errors = [client.result().last.error for client in clients]
    assert any(isinstance(error, UnavailableError) for error in errors)
    with pytest.raises(UnavailableError, match="shutting down"):
        thread.submit(request("late", prompt(4), 4), Client())
    assert not thread.alive


def test_a_client_that_breaks_costs_only_its_own_request(model):
    def broken(_output):
        raise RuntimeError("connection lost")

    with EngineThread(make_engine(model)) as thread:
        good = Client()
        thread.submit(request("bad", prompt(4), 100), broken)
        thread.submit(request("good", prompt(4), 20), good)
        assert len(good.result().token_ids) == 20
        assert thread.alive
        deadline = time.monotonic() + 10
        while thread.engine.has_work() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not thread.engine.has_work(), "the broken client's request was cancelled"


def test_an_error_in_a_step_never_kills_the_thread(model, monkeypatch):
    engine = make_engine(model)
    schedule = engine._scheduler.schedule

    def break_once(admit):
        if engine._scheduler.num_waiting:
            monkeypatch.setattr(engine._scheduler, "schedule", schedule)
            raise ZeroDivisionError
        return schedule(admit)

    monkeypatch.setattr(engine._scheduler, "schedule", break_once)
    with EngineThread(engine) as thread:
        client, after = Client(), Client()
        thread.submit(request("r", prompt(4), 4), client)
        assert client.result().last.error.code == "engine_error"
        thread.submit(request("r", prompt(4), 4), after)
        assert after.result().last.finish_reason == "length"
        assert thread.alive


def test_deadlines_are_kept_while_nothing_runs(model, tmp_path):
    gate = threading.Event()

    def load(ref):
        gate.wait(60)
        raise OSError("too late")

    with EngineThread(make_engine(model, load=load)) as thread:
        client = Client()
        thread.submit(request("r", prompt(4), 4, adapter="slow", deadline_s=0.1), client)
        assert client.result().last.error.code == "deadline_exceeded"
        assert not gate.is_set()
        gate.set()


def test_served_requests_leave_no_memory_behind(model, tmp_path):
    make_adapter(model, tmp_path / "a", seed=1)
    engine = make_engine(model, load=lambda ref: tmp_path / ref)

    def serve(count):
        for i in range(count):
            run(engine, request("r", prompt(4, i), 2, adapter="a", tenant="t", deadline_s=600))
            engine.adapters.evict("a")
        gc.collect()
        return len(gc.get_objects())

    serve(5)
    before = serve(5)
    assert serve(40) - before < 200


def test_one_call_a_step_carries_the_outputs_of_all_requests(model):
    steps, answers, done, all_are_in = [], {}, threading.Event(), threading.Event()

    def take(outputs):
        assert all_are_in.wait(20)  # holds the engine up, which might be done with the first before the last comes
        steps.append({output.request_id for output in outputs})
        for output in outputs:
            answers.setdefault(output.request_id, Answer()).take(output)
        if len(answers) == 3 and all(answer.last.finish_reason for answer in answers.values()):
            done.set()

    requests = [request(f"r{i}", prompt(5, i), 12) for i in range(3)]
    with EngineThread(make_engine(model), take) as thread:
        for one in requests:
            thread.submit(one)
        all_are_in.set()
        assert done.wait(20)
    assert any(len(step) == 3 for step in steps)
    assert len(steps) < 36, "fewer calls than tokens"
    alone = run(make_engine(model), *requests)
    assert {name: answer.token_ids for name, answer in answers.items()} == {n: a.token_ids for n, a in alone.items()}


def test_a_consumer_of_steps_that_breaks_ends_what_it_was_given_and_nothing_else(model):
    taken, done = [], threading.Event()

    def take(outputs):
        if any(output.request_id == "bad" and not output.finish_reason for output in outputs):
            raise RuntimeError("connection lost")
        taken.extend(outputs)
        if outputs[-1].finish_reason:
            done.set()

    with EngineThread(make_engine(model), take) as thread:
        thread.submit(request("bad", prompt(4), 100))
        assert done.wait(20)
        assert [(output.request_id, output.finish_reason) for output in taken] == [("bad", "cancelled")]
        done.clear()
        thread.submit(request("good", prompt(4), 5))
        assert done.wait(20)
        assert taken[-1].finish_reason == "length"
