"""The Playground: several models answer one prompt at the same time, and one that fails spoils no other."""

from __future__ import annotations

import math
import threading
import time

import dashboard_gateway
import pytest
from dashboard_app import healthy, opener, words
from gateway_backend import BACKBONE, SECRET_TEXT
from gateway_server import serve

from sources.gateway import GatewayClient
from sources.playground import ParallelAnswers, Sampling, first_choice, model_names

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A gateway whose every token takes 20 ms."""
    with serve(tmp_path_factory.mktemp("playground"), token_s=0.02) as running:
        yield running


@pytest.fixture
def held(slow):
    """Says how many tokens each answer may have by now."""

    def held(tokens):
        slow.backend.allowed = tokens

    yield held
    held(math.inf)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def ask(gateway, models, prompt, *, chat=True, key=None, **sampling):
    key = key or gateway.key("ops", ("admin",))
    return ParallelAnswers(
        GatewayClient(gateway.url, key), models, prompt, chat, Sampling(**{"max_tokens": 6, **sampling})
    )


def test_answers_stream_at_the_same_time_with_their_times_and_counts(slow, held):
    held(1)
    running = ask(slow, ["acme.support", "globex.faq", BACKBONE], "one two three", max_tokens=12)
    for allowed in range(1, 6):  # an answer is seen as it grows, and none waits for another
        held(allowed)
        wait_for(lambda: [len(answer.text.split()) for answer in running.answers()] == [allowed] * 3)  # noqa: B023
    held(math.inf)
    assert running.wait(60)
    for answer in running.answers():
        assert answer.text.split() == ["one", "two", "three"] * 4
        assert (answer.tokens, answer.prompt_tokens, answer.finish_reason, answer.error) == (12, 3, "length", "")
        assert 0.02 <= answer.first_token_s < answer.seconds
        assert answer.tokens_per_s == pytest.approx(11 / (answer.seconds - answer.first_token_s))


def test_a_column_that_fails_leaves_the_others_alone(slow):
    running = ask(slow, ["acme.nix", "acme.support"], "a b")
    assert running.wait(60)
    failed, whole = running.answers()
    assert "acme.nix" in failed.error
    assert (failed.text, failed.tokens_per_s) == ("", None)
    assert (whole.text.split(), whole.error) == (["a", "b"] * 3, "")


@pytest.mark.parametrize("word", ["break", "crash"])
def test_an_answer_that_breaks_off_keeps_what_came_and_says_so(slow, word):
    running = ask(slow, ["acme.support"], f"{word} b", chat=False)
    assert running.wait(60)
    (answer,) = running.answers()
    assert answer.error
    assert SECRET_TEXT not in answer.error
    assert answer.text.split() == (["break", "b"] if word == "break" else [])


def test_where_nothing_answers_every_column_says_so():
    running = ParallelAnswers(GatewayClient("http://127.0.0.1:9", "sk-pedro-secret"), ["a", "b"], "x", True, Sampling())
    assert running.wait(60)
    assert all("does not answer" in answer.error and "secret" not in answer.error for answer in running.answers())


def test_stopping_frees_the_slots(slow, held):
    held(1)
    running = ask(slow, ["acme.support", "globex.faq"], "a b c", max_tokens=2000)
    wait_for(lambda: all(answer.text for answer in running.answers()))
    running.cancel()
    held(2)  # an answer ends at its next token
    assert running.wait(60)
    assert [answer.finish_reason for answer in running.answers()] == ["cancelled"] * 2
    wait_for(lambda: not slow.backend.running)


def test_many_questions_leave_no_thread_behind(slow):
    before = threading.active_count()
    for _ in range(5):
        assert ask(slow, ["acme.support"], "a", max_tokens=1).wait(60)
    assert threading.active_count() <= before + 1


def test_a_request_says_only_what_is_set():
    assert Sampling().fields() == {"max_tokens": 64, "temperature": 0.0}
    chosen = Sampling(8, 0.7, 0.9, 40, 1.1, 3).fields()
    assert chosen == {
        "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 3,
    }  # fmt: skip


def test_adapters_come_before_the_backbone():
    assert model_names([{"id": "stories"}, {"id": "b.y"}, {"id": "a.x"}, {}, None]) == ["a.x", "b.y", "stories"]


def test_an_adapter_is_compared_with_its_backbone_at_first():
    names = ["acme.faq", "acme.faq@candidate", "globex.faq", "stories260K"]
    assert first_choice(names) == ["acme.faq", "stories260K"]
    assert first_choice(["stories260K"]) == ["stories260K"]
    assert first_choice([]) == []


# the page, over a real engine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    settings = dashboard_gateway.make_adapters(tmp_path_factory.mktemp("served"))
    with dashboard_gateway.running(settings) as gateway:
        yield gateway


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "playground")


@pytest.fixture
def keyed(page, served, monkeypatch):
    """The page, with a key in the environment."""

    def open_page(key):
        monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
        monkeypatch.setenv("PEDRO_ADMIN_KEY", key)
        return page(served.settings.home)

    return open_page


def send(shown, models, prompt=PROMPT):
    shown.multiselect[0].set_value(models)
    shown.text_area[0].set_value(prompt)
    shown.number_input[0].set_value(6)
    shown.radio[0].set_value("Raw")
    next(button for button in shown.button if button.label == "Send").click().run()
    return healthy(shown)


def test_two_versions_and_the_backbone_answer_side_by_side(keyed, served):
    shown = send(keyed(served.admin), ["acme.faq", "acme.faq@candidate", "stories260K"])
    texts = [code.value for code in shown.code]
    assert len(texts) == 3
    client = GatewayClient(served.url, served.admin)
    for model, text in zip(("acme.faq:2", "acme.faq:3", "stories260K"), texts, strict=True):
        body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        events = client.stream("/v1/completions", body)
        assert text == "".join(choice["text"] for event in events for choice in event["choices"])
    assert "acme.faq:3" in words(shown.caption), "which version answered is said"
    assert words(shown.caption).count("first token") == 3
    healthy(shown.run())
    assert [code.value for code in shown.code] == texts, "answers stay when the page is drawn again"


def test_a_version_can_be_typed_and_an_unknown_one_errs_in_its_own_column(keyed, served):
    shown = send(keyed(served.admin), ["acme.faq:1", "acme.nix"])
    assert len(shown.error) == 1
    assert "acme.nix" in words(shown.error)
    assert shown.code[0].value


def test_a_tenants_key_sees_its_own_models(keyed, served):
    shown = keyed(served.acme)
    assert shown.multiselect[0].options == ["acme.faq", "acme.faq@candidate", "acme.faq@previous", "stories260K"]
    assert not shown.info


def test_a_link_asks_for_a_version_which_stands_beside_its_backbone(page, served, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    monkeypatch.setenv("PEDRO_ADMIN_KEY", served.admin)
    shown = page(served.settings.home, model="acme.faq:1")
    assert shown.multiselect[0].value == ["acme.faq:1", "stories260K"]


def test_nothing_is_sent_without_a_prompt_or_a_model(keyed, served):
    shown = keyed(served.admin)
    assert "Type a prompt" in words(send(shown, ["acme.faq"], "  ").warning)
    assert "Choose a model" in words(send(shown, []).warning)


def test_without_a_gateway_or_a_key_it_says_what_is_missing(page, served, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_GATEWAY_URL", "http://127.0.0.1:9")
    assert "pedro serve" in words(page(tmp_path / "nothing").info)
    monkeypatch.setenv("PEDRO_GATEWAY_URL", served.url)
    shown = page(tmp_path / "nothing")
    assert "key" in words(shown.info)
    shown.text_input(key="gateway_key").set_value("sk-pedro-wrong").run()
    assert "unknown or revoked" in words(healthy(shown).sidebar.caption)
    shown.text_input(key="gateway_key").set_value(served.acme).run()
    assert "tenant" in words(healthy(shown).sidebar.caption)
    assert "acme.faq" in shown.multiselect[0].options
    assert shown.multiselect[0].value == ["acme.faq", "stories260K"], "a key that comes late still finds them chosen"
    healthy(shown.multiselect[0].set_value([]).run())
    assert healthy(shown.run()).multiselect[0].value == [], "what was taken away stays away"
