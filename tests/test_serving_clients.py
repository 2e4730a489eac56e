"""LangChain and litellm, as tenants have them, ask a server for every form of answer."""

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest
from test_serving_tools import ASK, TOOLS, WEATHER, asked, check, served

__all__ = ["served"]  # the fixture
URL, MODEL, TEXTS = "http://here/v1", "acme.hermes", ["Once upon a time", "The dog"]
SHORT = {"max_tokens": 8, "temperature": 0}


class Weather(pydantic.BaseModel):
    """The weather of a town."""

    town: Literal["Zug", "Bern"]
    days: int = pydantic.Field(ge=1, le=9)


@pytest.fixture(scope="module")
def wanted(served):
    """What the official client has: an answer, and two embeddings."""

    async def work(client):
        chat = await client.chat.completions.create(model=MODEL, messages=ASK, **SHORT)
        made = await client.embeddings.create(model=MODEL, input=TEXTS)
        return chat.choices[0].message.content, [one.embedding for one in made.data]

    return asked(served, work, lambda client: client)


def ask(served, work):
    """What `work` does with the official client, whose transport others are given."""
    return asked(served, work, lambda client: client)


def langchain(client, **options):
    from langchain_openai import ChatOpenAI

    given = {"model": MODEL, "base_url": URL, "api_key": client.api_key, "http_async_client": client._client}
    return ChatOpenAI(**given, max_retries=0, **options)


@pytest.fixture(scope="module")
def litellm():
    """Without the network that it asks for prices as it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        import litellm

        patch.setattr(litellm, "telemetry", False)
        yield litellm


def test_langchain_chats_streams_and_embeds_as_the_official_client(served, wanted):
    from langchain_openai import OpenAIEmbeddings

    async def work(client):
        model = langchain(client, **SHORT)
        whole = await model.ainvoke("Rain?")
        chunks = [chunk async for chunk in model.astream("Rain?", stream_usage=True)]
        given = {"model": MODEL, "base_url": URL, "api_key": client.api_key, "http_async_client": client._client}
        made = await OpenAIEmbeddings(**given, check_embedding_ctx_length=False).aembed_documents(TEXTS)
        return whole, chunks, made

    whole, chunks, made = ask(served, work)
    text, embeddings = wanted
    assert whole.content == "".join(chunk.content for chunk in chunks) == text
    assert whole.usage_metadata["output_tokens"] == SHORT["max_tokens"]
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == SHORT["max_tokens"]
    for one, other in zip(made, embeddings, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_answers(served, method):
    async def work(client):
        model = langchain(client, max_tokens=200, seed=1)
        return await model.with_structured_output(Weather, method=method, strict=True).ainvoke("Rain?")

    assert isinstance(ask(served, work), Weather)


def test_langchain_goes_through_a_loop_of_tools(served):
    from langchain_core.messages import HumanMessage, ToolMessage

    async def work(client):
        messages = [HumanMessage("Rain?")]
        model = langchain(client, max_tokens=200, seed=1)
        called = await model.bind_tools(TOOLS, tool_choice="required", parallel_tool_calls=False).ainvoke(messages)
        messages += [called, *(ToolMessage("dry", tool_call_id=call["id"]) for call in called.tool_calls)]
        return called, await langchain(client, **SHORT).bind_tools(TOOLS, tool_choice="none").ainvoke(messages)

    called, answer = ask(served, work)
    [call] = called.tool_calls
    jsonschema.validate(call["args"], {"weather": WEATHER, "clock": {"type": "object"}}[call["name"]])
    assert answer.content
    assert not answer.tool_calls
    assert answer.usage_metadata["input_tokens"] > called.usage_metadata["input_tokens"], "the result is in the prompt"


def test_litellm_chats_streams_and_embeds_as_the_official_client(served, wanted, litellm):
    async def work(client):
        given = {"model": f"openai/{MODEL}", "client": client, "api_key": client.api_key}
        whole = await litellm.acompletion(**given, messages=ASK, **SHORT)
        chunks = [chunk async for chunk in await litellm.acompletion(**given, messages=ASK, stream=True, **SHORT)]
        return whole, chunks, await litellm.aembedding(**given, input=TEXTS)

    whole, chunks, made = ask(served, work)
    text, embeddings = wanted
    assert whole.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    for one, other in zip(made.data, embeddings, strict=True):
        assert one["embedding"] == pytest.approx(other, abs=1e-5)


def test_litellm_gets_structured_answers_and_goes_through_a_loop_of_tools(served, litellm):
    async def work(client):
        given = {"model": f"openai/{MODEL}", "client": client, "api_key": client.api_key, "max_tokens": 200, "seed": 1}
        shaped = await litellm.acompletion(**given, messages=ASK, response_format=Weather)
        talk, tools = list(ASK), {"tools": TOOLS, "parallel_tool_calls": False}
        called = await litellm.acompletion(**given, **tools, messages=talk, tool_choice="required")
        [call] = called.choices[0].message.tool_calls
        talk += [called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "dry"}]
        answer = await litellm.acompletion(**{**given, **SHORT}, tools=TOOLS, messages=talk, tool_choice="none")
        return shaped, called, answer

    shaped, called, answer = ask(served, work)
    Weather.model_validate_json(shaped.choices[0].message.content)
    assert called.choices[0].finish_reason == "tool_calls"
    check(called.choices[0].message.tool_calls)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > called.usage.prompt_tokens, "the result is in the prompt"
    assert json.dumps(answer.model_dump()), "as gateways of litellm pass it on"


def test_what_a_server_refuses_is_told_by_both_as_a_bad_request(served, litellm):
    async def work(client):
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await langchain(client, max_tokens=100_000).ainvoke("Rain?")
        with pytest.raises(litellm.BadRequestError, match="max_tokens"):
            await litellm.acompletion(
                model=f"openai/{MODEL}", client=client, api_key=client.api_key, messages=ASK, max_tokens=100_000
            )

    ask(served, work)
