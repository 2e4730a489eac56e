"""The Playground: several models answer one prompt at the same time, and one that fails spoils no other."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import threading
import time

import dashboard_gateway
import pytest
from dashboard_app import healthy, opener, words
from gateway_backend import BACKBONE, SECRET_TEXT
from gateway_server import serve
from serving_adapters import backbone, register, stub_adapter

from pedro.training.storage import put_dataset
from sources import test_file
from sources.answer_html import difference_html, tokens_html
from sources.gateway import GatewayClient
from sources.playground import (
    ParallelAnswers,
    Sampling,
    SeenToken,
    StreamedAnswer,
    asked_prompt,
    first_choice,
    model_names,
)
from sources.request_code import as_curl, as_python

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
    asked = asked_prompt(prompt, chat, Sampling(**{"max_tokens": 6, **sampling}))
    return ParallelAnswers(GatewayClient(gateway.url, key), models, asked)


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
    running = ParallelAnswers(
        GatewayClient("http://127.0.0.1:9", "sk-pedro-secret"), ["a", "b"], asked_prompt("x", True, Sampling())
    )
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
    texts = [code.value for code in shown.code[:3]]
    client = GatewayClient(served.url, served.admin)
    for model, text in zip(("acme.faq:2", "acme.faq:3", "stories260K"), texts, strict=True):
        body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        events = client.stream("/v1/completions", body)
        assert text == "".join(choice["text"] for event in events for choice in event["choices"])
    assert "acme.faq:3" in [link.proto.label for link in shown.get("page_link")], "which version answered is said"
    assert words(shown.caption).count("first token") == 3
    healthy(shown.run())
    assert [code.value for code in shown.code[:3]] == texts, "answers stay when the page is drawn again"


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


def test_the_request_stands_there_as_code_that_gives_the_same_answer(keyed, served, monkeypatch, capsys):
    shown = keyed(served.admin)
    shown.number_input[1].set_value(40)  # top-k, which the official client does not know
    shown = send(shown, ["acme.faq"])
    answer, curl, python = (code.value for code in shown.code)
    assert served.admin not in curl + python
    words_of_curl = shlex.split(curl)
    assert words_of_curl[1] == f"{served.url}/v1/completions"
    assert words_of_curl[words_of_curl.index("@-") - 1] == "-H", "a key among the arguments is seen by everybody"
    assert words_of_curl[words_of_curl.index("<<<") + 1] == "Authorization: Bearer $PEDRO_API_KEY"
    body = json.loads(words_of_curl[words_of_curl.index("-d") + 1])
    assert body == {"model": "acme.faq", "prompt": PROMPT, "max_tokens": 6, "temperature": 0.0, "top_k": 40}
    monkeypatch.setenv("PEDRO_API_KEY", served.admin)
    exec(compile(python, "shown", "exec"), {})
    assert capsys.readouterr().out == answer + "\n"


def test_a_chat_as_code_is_a_chat():
    asked = asked_prompt('it\'s "so"', True, Sampling(repetition_penalty=1.2))
    python = as_python("http://gateway", asked.path, {"model": "m", **asked.body})
    compile(python, "shown", "exec")
    assert "client.chat.completions.create(" in python
    assert "extra_body={'repetition_penalty': 1.2}" in python
    assert shlex.split(as_curl("http://gateway", asked.path, asked.body))[-1] == json.dumps(
        asked.body, ensure_ascii=False, indent=1
    )


@pytest.mark.parametrize("chat", [True, False])
def test_tokens_come_with_their_probabilities_and_the_likeliest_others(served, chat):
    asked = asked_prompt(PROMPT, chat, Sampling(max_tokens=5), probabilities=True)
    running = ParallelAnswers(GatewayClient(served.url, served.admin), ["acme.faq"], asked)
    assert running.wait(60)
    (answer,) = running.answers()
    assert answer.error == ""
    assert "".join(token.text for token in answer.seen) == answer.text
    for token in answer.seen:
        assert len(token.others) in (4, 5)
        assert all(logprob <= token.logprob <= 0 for _, logprob in token.others), "greedy takes the likeliest"


def test_probabilities_are_shown_where_they_are_asked_for(keyed, served):
    shown = keyed(served.admin)
    assert not shaded(shown)
    shown.toggle[0].set_value(True)
    shown = send(shown, ["acme.faq", "stories260K"])
    tokens = shaded(shown)
    assert len(tokens) == 2
    assert tokens[0].count("<span") == 6
    assert "%&#10;" in tokens[0]
    assert "&#x27;" in tokens[0], "texts are quoted and escaped"


def test_special_tokens_are_left_out_as_the_answers_text_does_and_pieces_of_a_character_stay():
    texts = [" Hi", " ", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    answer = StreamedAnswer("m", text="Hi é", seen=tuple(SeenToken(text, -0.1) for text in texts))
    assert [token.text for token in answer.shown] == texts[:-1]


def shaded(shown) -> list[str]:
    """The answers whose tokens tell their probabilities."""
    return [element.proto.body for element in shown.get("html") if "title=" in element.proto.body]


def test_texts_of_models_are_escaped_and_differences_keep_every_word():
    page = difference_html("a <b> c", "a <i>bold</i> c")
    assert "<i>" not in page
    assert "<b>" not in page
    kept = html.unescape(re.sub(r"<del[^>]*>.*?</del>|</?(?:ins|div)[^>]*>", "", page))
    assert kept == "a <i>bold</i> c"
    assert difference_html("the same", "the same").count("<ins") == 0
    shaded = tokens_html([SeenToken("<script>", math.log(0.25), (('"', -3.0),))])
    assert "<script>" not in shaded
    assert "25.0%" in shaded
    assert '""' not in shaded


@pytest.fixture(scope="module")
def tested(served, tmp_path_factory):
    """globex.tested, whose specification names a test file of this home; version 2 names a file elsewhere."""
    folder = tmp_path_factory.mktemp("tested")
    rows = folder / "test.jsonl"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chats = [
        turns,
        [*turns, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}],
        [{"role": "user", "content": "play\njazz"}, {"role": "assistant", "content": "*play*"}],
    ]
    rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    stored = put_dataset(str(rows), served.settings.storage)
    for number, location in enumerate((stored, str(rows)), start=1):
        made = stub_adapter(
            folder / f"made-{number}",
            f"tested-{number}",
            backbone().digest,
            backbone={"id": backbone().id, "digest": backbone().digest},
            spec={"data": {"train": stored, "test": location}},
        )
        register(served.registry, made, "globex.tested", promote=number == 1)
    wait_for(lambda: "globex.tested" in model_names(GatewayClient(served.url, served.admin).models()))


@pytest.mark.usefixtures("tested")
def test_rows_of_the_test_file_are_prompts_with_the_answer_that_they_want(keyed, served):
    shown = keyed(served.admin)
    healthy(shown.multiselect[0].set_value(["globex.tested", "stories260K"]).run())
    rows = shown.selectbox(key="tested_globex.tested")
    assert rows.options == ["1: one", "2: one", "3: play jazz"], "of a chat of several turns the first alone"
    healthy(rows.select("3: play jazz").run())
    assert shown.text_area[0].value == "play\njazz"
    assert "Wanted: \\*play\\*" in words(shown.caption)
    shown = send(shown, ["globex.tested", "stories260K"], "play\njazz")
    assert shown.code[0].value == "*play*"
    assert "not as wanted" in next(each.value for each in shown.markdown if each.value.startswith("**stories260K**"))
    shown = send(shown, ["stories260K"], "another prompt")
    assert "wanted" not in words(shown.markdown), "it was the answer to another prompt"


@pytest.mark.usefixtures("tested")
def test_rows_are_of_this_homes_data_sets_and_for_keys_that_are_served_the_adapter(keyed, served):
    assert test_file.rows_of(served.settings, "globex.tested:2") == (
        [],
        "globex.tested:2 was made without a test file of this home",
    )
    assert test_file.rows_of(served.settings, "stories260K") == ([], "")
    shown = keyed(served.acme)
    healthy(shown.multiselect[0].set_value(["globex.tested"]).run())
    assert [box.label for box in shown.selectbox] == ["Saved prompts"], "another tenant's rows"


def test_a_prompt_that_is_saved_can_be_taken_again_and_forgotten(keyed, served):
    shown = keyed(served.admin)
    shown.text_area[0].set_value("a prompt to keep")
    next(button for button in shown.button if button.label == "Save").click().run()
    saved = healthy(shown).selectbox(key="saved_prompt")
    assert saved.options == ["a prompt to keep"]
    shown.text_area[0].set_value("something else")
    healthy(saved.select("a prompt to keep").run())
    assert shown.text_area[0].value == "a prompt to keep"
    next(button for button in shown.button if button.label == "Forget").click().run()
    assert healthy(shown).selectbox(key="saved_prompt").options == []
