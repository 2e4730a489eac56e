"""The official openai client drives the gateway: models, completions, chat, streams, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("gateway")) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway):
    return gateway.client(gateway.key())


def last_call(gateway: Gateway):
    return gateway.backend.calls[-1]


def events(gateway: Gateway, path: str, body: dict) -> list[str]:
    """The data of each server-sent event."""
    with gateway.http(gateway.key()) as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [frame.removeprefix("data: ") for frame in frames]


def test_models_list_holds_the_backbone_and_the_callers_own_adapters(client):
    assert [model.id for model in client.models.list()] == [BACKBONE, "acme.support"]


def test_a_model_can_be_retrieved_by_name(client):
    model = client.models.retrieve("acme.support")
    assert (model.id, model.object, model.owned_by) == ("acme.support", "model", "acme")
    assert (model.created, model.root, model.parent) == (1_700_000_000, BACKBONE, BACKBONE)
    backbone = client.models.retrieve(BACKBONE)
    assert (backbone.owned_by, backbone.root, backbone.parent) == ("pedro", BACKBONE, None)


def test_a_version_of_ones_own_that_no_alias_serves_can_be_deleted(gateway):
    client = gateway.client(gateway.key("globex", ("train",)))
    backend, before = gateway.backend, gateway.backend.adapters["globex.faq"]
    try:
        for name, why in (
            ("globex.faq", "currently means 'globex.faq:2'"),
            ("globex.faq:2", "champion"),
            ("globex.faq:1", "previous"),
            (BACKBONE, "backbone"),
        ):
            with pytest.raises(openai.ConflictError, match=why):
                client.models.delete(name)
        with pytest.raises(openai.BadRequestError, match="without a digest"):
            client.models.delete("globex.faq:1#sha256:1")
        refused = []
        for name in ("acme.support:2", "nobody.nix:2", "globex.faq:9"):
            with pytest.raises(openai.NotFoundError) as caught:
                client.models.delete(name)
            refused.append(str(caught.value).replace(name, "NAME"))
        assert len(set(refused)) == 1
        assert backend.adapters["globex.faq"] == before
        backend.adapters["globex.faq"] = replace(before, aliases={"champion": 2})
        gone = client.models.delete("globex.faq:1")
        assert gone.model_dump() == {"id": "globex.faq:1", "object": "model", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("globex.faq:1")
    finally:
        backend.adapters["globex.faq"] = before


def test_a_completion_has_text_reason_usage_and_fingerprint(client):
    reply = client.completions.create(model="acme.support", prompt="one two three", max_tokens=4)
    assert reply.object == "text_completion"
    assert reply.id.startswith("cmpl-")
    assert reply.model == "acme.support"
    assert reply.system_fingerprint == "fp_1"
    assert [choice.text for choice in reply.choices] == ["one two three one "]
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert reply.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }


def test_a_completion_stops_after_16_tokens_unless_told(client):
    assert client.completions.create(model=BACKBONE, prompt="a").usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a bb", ["a bb "]),
        (["a bb", "cc d"], ["a bb ", "cc d "]),
        ([1, 2], ["w ww "]),
        ([[1, 2], [3]], ["w ww ", "www www "]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_each_shape_of_prompt_is_answered_in_order(client, prompt, texts):
    reply = client.completions.create(model=BACKBONE, prompt=prompt, max_tokens=2)
    assert [choice.text for choice in reply.choices] == texts
    assert [choice.index for choice in reply.choices] == list(range(len(texts)))


def test_n_choices_of_several_prompts_are_numbered_prompt_by_prompt_and_a_prompt_counts_once(client):
    reply = client.completions.create(model=BACKBONE, prompt=["a b", "c d"], n=2, max_tokens=1)
    assert [(choice.index, choice.text) for choice in reply.choices] == [(0, "a "), (1, "b "), (2, "c "), (3, "d ")]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 4)


def test_echo_with_logprobs_scores_the_prompt_the_way_lm_eval_reads_it(client):
    reply = client.completions.create(model=BACKBONE, prompt=[[1, 2, 3]], max_tokens=1, logprobs=1, echo=True, seed=7)
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == "w ww www w "
    assert logprobs.tokens == ["w ", "ww ", "www ", "w "]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert logprobs.top_logprobs == [
        None,
        {"best ": -0.25, "ww ": -0.5},
        {"best ": -0.25, "www ": -0.5},
        {"best ": -0.25, "w ": -0.5},
    ]
    assert logprobs.text_offset == [0, 2, 5, 9]


def test_echo_alone_generates_nothing(client):
    reply = client.completions.create(model=BACKBONE, prompt="a b", max_tokens=0, echo=True)
    assert (reply.choices[0].text, reply.usage.completion_tokens) == ("a b ", 0)


def test_an_impossible_token_has_a_number_that_json_can_hold(client):
    reply = client.completions.create(model=BACKBONE, prompt="a", max_tokens=1, logprobs=2)
    assert reply.choices[0].logprobs.top_logprobs[0]["never "] == -9999.0


@pytest.mark.parametrize(
    ("asked", "n", "params"),
    [
        ({"use_beam_search": True, "best_of": 3}, 1, {"num_beams": 3}),
        ({"use_beam_search": True}, 2, {"num_beams": 2}),
        (
            {"use_beam_search": True, "best_of": 4, "length_penalty": 0.8, "early_stopping": True},
            2,
            {"num_beams": 4, "length_penalty": 0.8, "early_stopping": True},
        ),
    ],
)
def test_beam_search_is_asked_for_as_of_vllms_server(gateway, client, asked, n, params):
    body = {"model": BACKBONE, "n": n, "max_tokens": 2, "extra_body": asked}
    assert len(client.completions.create(prompt="a", **body).choices) == n
    greedy = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 2}
    assert (last_call(gateway).n, last_call(gateway).params) == (n, greedy | params)
    client.chat.completions.create(messages=[{"role": "user", "content": "a"}], temperature=0, **body)
    assert (last_call(gateway).n, last_call(gateway).params) == (n, greedy | params)


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"seed": 1.0}, {"seed": 1}),
        ({"top_logprobs": 0}, {}),
        ({"stop": ""}, {}),
        ({"stop": ["", "x"]}, {"stop": ("x",)}),
        ({"stream_options": {}}, {}),
        ({"stream_options": {"include_usage": True}}, {}),
        ({"extra_body": {"skip_special_tokens": True, "chat_template_kwargs": {}}}, {}),
        ({"extra_body": {"add_generation_prompt": True, "continue_final_message": False, "cache_salt": "x"}}, {}),
    ],
    ids=str,
)
def test_what_openai_and_vllm_accept_is_accepted(gateway, client, asked, params):
    parts = [{"type": "input_text", "text": "a "}, {"type": "text", "text": "b"}]
    client.chat.completions.create(model=BACKBONE, messages=[{"role": "user", "content": parts}], max_tokens=1, **asked)
    assert last_call(gateway).params == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 1} | params
    assert last_call(gateway).messages[0]["content"] == "a b"


def test_usage_so_far_is_in_every_chunk_where_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.completions.create(model=BACKBONE, prompt="a b", max_tokens=3, stream=True, stream_options=options)
    )
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {2}


def test_obfuscation_makes_chunks_of_whole_blocks(gateway):
    body = {"model": BACKBONE, "prompt": "a bbbbbbbbb ccc", "max_tokens": 3, "stream": True}
    frames = events(gateway, "/v1/completions", {**body, "stream_options": {"include_obfuscation": True}})
    assert all(json.loads(frame)["obfuscation"] for frame in frames[:-1])
    assert len({len(frame) for frame in frames[:-2]}) == 1
    assert "obfuscation" not in "".join(events(gateway, "/v1/completions", body))


def test_sampling_fields_and_extensions_reach_the_backend_under_the_engines_names(gateway, client):
    client.completions.create(
        model=BACKBONE,
        prompt="a b c",
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["x", "y"],
        presence_penalty=0.1,
        frequency_penalty=0.2,
        logit_bias={"7": -100},
        extra_body={
            "top_k": 5,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [2],
            "ignore_eos": True,
            "min_tokens": 2,
            "conditioning_length": 2,
        },
    )
    assert last_call(gateway).conditioning_length == 2
    assert last_call(gateway).params == {
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 11,
        "stop": ("x", "y"),
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {7: -100.0},
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "stop_token_ids": (2,),
        "ignore_eos": True,
        "min_tokens": 2,
    }


def test_what_was_not_set_is_openais_default_or_left_to_the_engine(gateway, client):
    client.chat.completions.create(model=BACKBONE, messages=[{"role": "user", "content": "a"}])
    assert last_call(gateway).params == {"temperature": 1.0, "top_p": 1.0}


def test_each_prompt_has_its_own_conditioning_length(gateway, client):
    client.completions.create(
        model=BACKBONE, prompt=[[1, 2], [3]], max_tokens=1, extra_body={"conditioning_length": [2, 1]}
    )
    assert {call.prompt: call.conditioning_length for call in gateway.backend.calls[-2:]} == {(1, 2): 2, (3,): 1}


def test_a_chat_completion_has_an_assistant_message(client):
    reply = client.chat.completions.create(
        model="acme.support",
        messages=[
            {"role": "developer", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "kind "}, {"type": "text", "text": "now"}]},
        ],
        max_completion_tokens=3,
    )
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", "be kind now ")
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.total_tokens == 6


def test_an_answer_can_be_sent_back_as_the_next_turn(gateway, client):
    first = client.chat.completions.create(
        model=BACKBONE, messages=[{"role": "user", "content": "hi"}], max_tokens=1
    ).choices[0]
    turns = [{"role": "user", "content": "hi"}, first.message.model_dump(), {"role": "user", "content": "more"}]
    client.chat.completions.create(model=BACKBONE, messages=turns, max_tokens=1)
    assert last_call(gateway).messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hi "},
        {"role": "user", "content": "more"},
    )


def test_chat_logprobs_carry_bytes_and_alternatives(client):
    reply = client.chat.completions.create(
        model=BACKBONE, messages=[{"role": "user", "content": "é"}], max_tokens=1, logprobs=True, top_logprobs=1
    )
    entry = reply.choices[0].logprobs.content[0]
    assert (entry.token, entry.logprob, entry.bytes) == ("é ", -0.5, list("é ".encode()))
    assert [(top.token, top.logprob) for top in entry.top_logprobs] == [("best ", -0.25)]


def test_a_streamed_completion_adds_up_to_the_whole_one(client):
    request = {"model": BACKBONE, "prompt": "one two é", "max_tokens": 5, "n": 2}
    whole = client.completions.create(**request)
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons.setdefault(choice.index, []).append(choice.finish_reason)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert [given for given in reasons[0] if given] == ["length"]
    assert [given for given in reasons[1] if given] == ["length"]


def test_a_streamed_chat_adds_up_and_ends_with_usage_when_asked(client):
    chunks = list(
        client.chat.completions.create(
            model=BACKBONE,
            messages=[{"role": "user", "content": "one two"}],
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two one "
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_events_are_role_then_content_then_reason_then_done(gateway):
    data = events(
        gateway,
        "/v1/chat/completions",
        {"model": BACKBONE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True},
    )
    assert data.pop() == "[DONE]"
    chunks = [json.loads(item) for item in data]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0] for chunk in chunks] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        },
        {"index": 0, "delta": {"content": "hi "}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {"content": "hi "}, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"},
    ]
    assert all("usage" not in chunk for chunk in chunks)


def test_completion_events_keep_text_offsets_across_chunks(gateway):
    body = {"model": BACKBONE, "prompt": "a bb", "max_tokens": 2, "logprobs": 0, "stream": True}
    data = events(gateway, "/v1/completions", body)
    assert data.pop() == "[DONE]"
    chunks = [json.loads(item) for item in data]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [2]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]


def test_an_unknown_model_is_a_not_found_error(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="acme.nothing", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_unknown_model_is_a_not_found_error_before_a_stream_starts(client):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="x", messages=[{"role": "user", "content": "a"}], stream=True)


def test_a_wrong_key_is_an_authentication_error(gateway):
    with pytest.raises(openai.AuthenticationError) as caught:
        gateway.client("sk-pedro-wrong").models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_wrong_value_is_a_bad_request_error(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BACKBONE, prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.body["message"] == "temperature: expected <= 2.0, got 9"


def test_a_full_queue_is_a_503_that_says_when_to_try_again(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model=BACKBONE, prompt="overload", stream=True)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"


def test_an_error_of_the_users_making_mid_stream_is_told_in_the_stream(client):
    seen = []
    stream = client.completions.create(model=BACKBONE, prompt="refuse it", max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match=r"The adapter went away\."):
        seen.extend(chunk.choices[0].text for chunk in stream)
    assert seen == ["refuse ", "it "]


def test_an_error_event_has_openais_form_and_the_stream_still_ends_with_done(gateway):
    body = {"model": BACKBONE, "prompt": "refuse", "max_tokens": 5, "stream": True}
    *_, error, done = events(gateway, "/v1/completions", body)
    assert json.loads(error) == {
        "error": {
            "message": "The adapter went away.",
            "type": "invalid_request_error",
            "param": None,
            "code": "adapter_gone",
        }
    }
    assert done == "[DONE]"
