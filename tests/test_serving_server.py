"""One engine replica in this process: adapters saved, registered and served for real, beside PEFT."""

import asyncio
import gc
import itertools
import json
import shutil
import threading
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from serving_adapters import backbone, make_adapter, register, settings_at, tokenizer
from serving_connections import LocalConnection

from pedro.data import FORMATS, PromptFormat, encode_prompt, load_rows, parse_line
from pedro.data.template_worker import TemplateBoundsError, TemplateWorker
from pedro.errors import PedroError, UnavailableError
from pedro.gateway.backend import GenerateCall
from pedro.gateway.embeddings import EmbeddingsRequest
from pedro.gateway.parsing import parse
from pedro.gateway.routes_embeddings import embedding_calls
from pedro.gateway.routes_inference import chat_call, completion_calls
from pedro.gateway.schemas import ChatRequest, CompletionRequest
from pedro.refs import ModelRef
from pedro.registry import Registry
from pedro.serving import app, prompts
from pedro.serving.client import ReplicaClient
from pedro.serving.config import ServeConfig
from pedro.serving.prompts import TemplateRenderer
from pedro.serving.protocol import SubmitRequest
from pedro.serving.server import ReplicaServer

SHAPES = ("messages", "completion", "alpaca", "sharegpt")
HARD = "  Zoé said:\n\t\"<s> 'naïve' …\" 日本 \U0001f600  "
ROWS = {
    "messages": [
        {"messages": [{"role": "user", "content": "Tell me a story."}, {"role": "assistant", "content": "No."}]},
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": HARD}, {"type": "text", "text": "!"}]},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": "Two."},
            ]
        },
    ],
    "completion": [
        {"prompt": "Once upon a time", "completion": " there was"},
        {"prompt": HARD, "response": "yes"},
        {"prompt": "<s>already begun", "completion": "yes"},
    ],
    "alpaca": [
        {"instruction": "Name a colour.", "output": "Red"},
        {"instruction": "Name a colour.", "input": "", "output": "Red"},
        {"instruction": "Translate.", "input": HARD, "output": "Rot"},
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": HARD},
                {"from": "gpt", "value": "Good."},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ]
        }
    ],
}
_ids = itertools.count()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A replica and, by name, each adapter's version and the PEFT model that it was saved from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("replica")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    models, versions = {}, {}
    names = {f"acme.{shape}": shape for shape in SHAPES} | {"globex.faq": "completion"}
    for seed, (name, shape) in enumerate(names.items(), start=1):
        models[name] = make_adapter(folder / name, seed, shape)
        versions[name] = register(registry, folder / name, name)
    replica = ReplicaServer(ServeConfig(max_batch=8), settings)
    yield SimpleNamespace(replica=replica, registry=registry, models=models, versions=versions, folder=folder)
    replica.close()


def ref(served, name):
    return served.versions[name].model_ref


def completion(prompt="Once upon a time", **fields):
    body = {"model": "m", "prompt": prompt, "temperature": 0, **fields}
    return completion_calls(
        parse(CompletionRequest, json.dumps(body).encode()), tenant="acme", trace_id="t", max_choices=256
    )[0]


def chat(messages, **fields):
    body = {"model": "m", "messages": messages, "temperature": 0, **fields}
    return chat_call(parse(ChatRequest, json.dumps(body).encode()), tenant="acme", trace_id="t", max_choices=256)


async def answer(replica, call, ref=None, **known):
    """The choices of one call, whole; raises the error that the stream ends in."""
    choices = {}
    async with connected(replica, **known) as client, aclosing(client.generate(call, ref, ())) as batches:
        async for batch in batches:
            for delta in batch:
                choice = choices.setdefault(
                    delta.index, SimpleNamespace(text="", token_ids=[], logprobs=[], finish=None, deltas=[])
                )
                assert choice.finish is None
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs or ()
                choice.finish = delta.finish_reason
                choice.deltas.append(delta)
    return [choices[index] for index in sorted(choices)]


@asynccontextmanager
async def connected(replica, **known):
    """An ingress's client of the replica, ready."""
    changed = asyncio.Event()
    client = ReplicaClient(replica.name, LocalConnection(replica), changed.set, **known)
    try:
        async with asyncio.timeout(60):
            while not client.ready:
                changed.clear()
                await changed.wait()
        yield client
    finally:
        await client.close()


def ask(replica, call, ref=None):
    return asyncio.run(answer(replica, call, ref))


def prompt_ids(served, call, ref=None):
    return asyncio.run(served.replica._request(call, ref)).prompt_ids


@torch.no_grad()
def reference(model, ids, count):
    """What PEFT's own greedy `generate` answers, as ids."""
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def text_after(ids, generated):
    """The text that `generated` adds behind the prompt `ids`."""
    whole = tokenizer().decode([*ids, *generated], skip_special_tokens=True)
    return whole[len(tokenizer().decode(ids, skip_special_tokens=True)) :]


@pytest.mark.parametrize("shape", SHAPES)
def test_served_prompt_ids_are_the_training_prompt_ids(served, tmp_path, shape):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[shape]))
    form = asyncio.run(served.replica._prompts._adapter(ref(served, f"acme.{shape}"))).form
    rows = load_rows(file, tokenizer(), form, 512, tmp_path / "cache")
    examples = [
        example for number, line in enumerate(file.read_text().splitlines(), 1) for example in parse_line(line, number)
    ]
    assert len(rows) == len(examples)
    for row, example in zip(rows, examples, strict=True):
        trained = row["input_ids"][: row["prompt_len"]]
        assert prompt_ids(served, chat(list(example.messages)), ref(served, f"acme.{shape}")) == trained
        assert prompt_ids(served, completion(form.render(example.messages)), ref(served, f"acme.{shape}")) == trained
        assert prompt_ids(served, completion(trained)) == trained


def test_a_raw_prompt_for_the_bare_backbone_is_its_senders_own_special_tokens_and_all(served):
    bos = tokenizer().bos_token
    assert prompt_ids(served, completion(f"a{bos}b")).count(tokenizer().bos_token_id) == 2
    assert prompt_ids(served, completion(f"a{bos}b"), ref(served, "acme.completion")).count(1) == 1


def test_a_conversation_is_served_as_openai_clients_send_it(served):
    """Roles and text parts as in the file, not as the reader of files made them."""
    turns = ROWS["messages"][1]["messages"]
    adapter = ref(served, "acme.messages")
    example = parse_line(json.dumps(ROWS["messages"][1]), 1)[1]
    assert prompt_ids(served, chat(turns[:-1]), adapter) == prompt_ids(served, chat(list(example.messages)), adapter)


def test_the_bare_backbone_renders_chats_by_its_own_format(served):
    ids = prompt_ids(served, chat([{"role": "user", "content": "Hi"}]))
    assert ids == tokenizer()(FORMATS["chat"].render([{"role": "user", "content": "Hi"}])).input_ids


@pytest.mark.parametrize("name", ["acme.messages", "acme.completion", "globex.faq"])
def test_greedy_text_is_what_peft_generates_with_the_same_adapter(served, name):
    messages = [{"role": "user", "content": "Once upon a time, there was a little girl"}]
    call = chat(messages, max_tokens=40)
    ids = prompt_ids(served, call, ref(served, name))
    (choice,) = ask(served.replica, call, ref(served, name))
    expected = reference(served.models[name], ids, 40)
    assert choice.token_ids == expected
    assert choice.text == tokenizer().decode(expected, skip_special_tokens=True), "no space in front"
    assert choice.deltas[-1].prompt_tokens == len(ids)
    assert choice.deltas[-1].completion_tokens == len(expected)


def test_the_bare_backbone_answers_without_any_adapter(served):
    call = completion(max_tokens=24)
    with served.models["acme.messages"].disable_adapter():
        expected = reference(served.models["acme.messages"], prompt_ids(served, call), 24)
    (choice,) = ask(served.replica, call)
    assert choice.token_ids == expected
    assert choice.deltas[0].fingerprint == f"stories260K#{backbone().digest}"


def test_a_replica_answers_no_call_that_means_another_backbone(served):
    """As while the server's backbone is replaced in place: the old model must not answer under the new name."""
    own = backbone().digest
    (choice,) = asyncio.run(answer(served.replica, completion(max_tokens=4), backbone=own))
    assert choice.deltas[0].fingerprint.endswith(own)
    with pytest.raises(UnavailableError, match="being replaced; try again") as told:
        asyncio.run(answer(served.replica, completion(max_tokens=4), backbone="sha256:another"))
    assert told.value.status == 503


def test_every_delta_carries_the_version_and_digest_that_answered(served):
    version = served.versions["acme.completion"]
    (choice,) = ask(served.replica, completion(max_tokens=30), ref(served, "acme.completion"))
    assert {delta.fingerprint for delta in choice.deltas} == {f"acme.completion:1#{version.digest}"}


def test_echo_puts_the_prompt_in_front_once(served):
    call = completion(max_tokens=30)
    (plain,) = ask(served.replica, call, ref(served, "acme.completion"))
    (echoed,) = ask(served.replica, completion(max_tokens=30, echo=True), ref(served, "acme.completion"))
    assert echoed.text == "Once upon a time" + plain.text
    assert echoed.token_ids == [*prompt_ids(served, call), *plain.token_ids]


def test_echo_with_logprobs_scores_the_prompt_and_conditions_on_its_first_part_alone(served):
    ids = prompt_ids(served, completion("Once upon a time there was a cat"))
    call = completion(ids, max_tokens=0, echo=True, logprobs=2, conditioning_length=5)
    (choice,) = ask(served.replica, call, ref(served, "acme.completion"))
    model = served.models["acme.completion"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), prompt_lens=torch.tensor([5])).logits[0]
    expected = logits.float().log_softmax(-1)
    assert choice.token_ids == ids
    assert choice.logprobs[0].logprob is None
    found = [entry.logprob for entry in choice.logprobs[1:]]
    assert found == pytest.approx([float(expected[i, token]) for i, token in enumerate(ids[1:])], abs=1e-4)
    assert all(len(entry.top) == 2 for entry in choice.logprobs[1:])


def test_logprobs_are_of_the_sampled_tokens_and_join_to_the_text(served):
    call = completion(max_tokens=20, logprobs=3)
    (choice,) = ask(served.replica, call, ref(served, "acme.completion"))
    assert len(choice.logprobs) == len(choice.token_ids)
    assert "".join(entry.token for entry in choice.logprobs).strip() == choice.text.strip()
    for entry in choice.logprobs:
        best = max(entry.top, key=lambda other: other.logprob)
        assert (best.token, best.logprob) == (entry.token, entry.logprob)


def test_pieces_of_a_character_come_with_their_raw_bytes(served):
    text = "\U0001f600é"
    call = completion(text, max_tokens=1, echo=True, logprobs=0)
    (choice,) = ask(served.replica, call)
    ids = prompt_ids(served, call)
    pieces = [entry.raw if entry.raw is not None else entry.token.encode() for entry in choice.logprobs[: len(ids)]]
    assert len(ids) > len(text) + 1  # the vocabulary holds neither character, so they are spelt in bytes
    assert b"".join(pieces[1:]).decode().strip() == text
    assert any(len(entry.raw or b"") == 1 and entry.raw >= b"\x80" for entry in choice.logprobs)


def test_a_character_made_of_bytes_is_sent_whole(served):
    """The model is pushed to spell é in two bytes, over and over."""
    first, second = tokenizer().convert_tokens_to_ids(["<0xC3>", "<0xA9>"])
    call = completion(max_tokens=8, temperature=1.0, seed=3, logit_bias={str(first): 100, str(second): 100})
    (choice,) = ask(served.replica, call)
    assert set(choice.token_ids) == {first, second}
    assert choice.text == text_after(prompt_ids(served, call), choice.token_ids)


@torch.no_grad()
def test_embeddings_are_the_peft_models_hidden_states_of_the_prompt_as_in_training(served):
    name, text = "acme.completion", "Once upon a time there was a dog"
    for pooling in ("last", "mean"):
        body = {"model": name, "input": text, "pooling": pooling}
        wanted = parse(EmbeddingsRequest, json.dumps(body).encode())
        [call] = embedding_calls(wanted, tenant="acme", trace_id="t", max_choices=8)
        (choice,) = ask(served.replica, call, ref(served, name))
        [delta] = choice.deltas
        ids = prompt_ids(served, call, ref(served, name))
        assert ids == prompt_ids(served, completion(text), ref(served, name))
        model = served.models[name]
        hidden = model(
            input_ids=torch.tensor([ids]), prompt_lens=torch.tensor([len(ids)]), output_hidden_states=True
        ).hidden_states[-1][0]
        pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
        made = torch.frombuffer(bytearray(delta.embedding), dtype=torch.float32)
        torch.testing.assert_close(made, torch.nn.functional.normalize(pooled, dim=0), atol=1e-4, rtol=0)
        assert (choice.text, choice.token_ids, delta.prompt_tokens) == ("", [], len(ids))


def test_two_choices_are_sampled_apart_and_the_seed_repeats_them(served):
    fields = {"max_tokens": 24, "n": 2, "temperature": 1.0, "seed": 11}
    first = ask(served.replica, completion(**fields), ref(served, "acme.completion"))
    assert len(first) == 2
    assert first[0].token_ids != first[1].token_ids
    again = ask(served.replica, completion(**fields), ref(served, "acme.completion"))
    assert [choice.token_ids for choice in again] == [choice.token_ids for choice in first]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(served):
    (whole,) = ask(served.replica, completion(max_tokens=40), ref(served, "acme.completion"))
    stop = whole.text[len(whole.text) // 2 :][:3]
    (choice,) = ask(served.replica, completion(max_tokens=40, stop=stop), ref(served, "acme.completion"))
    assert choice.finish == "stop"
    assert choice.text == whole.text[: whole.text.index(stop)]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(served, monkeypatch):
    with pytest.raises(PedroError, match=r"512 tokens") as caught:
        ask(served.replica, completion("word " * 600, max_tokens=5))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    monkeypatch.delattr(prompts, "encode_prompt")  # refused before it is tokenised, which would take long
    with pytest.raises(PedroError, match="5,000,000 characters") as caught:
        ask(served.replica, completion("word " * 1_000_000, max_tokens=5))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_a_version_whose_digest_is_gone_is_a_503_and_never_another_version(served):
    folder = served.folder / "gone"
    make_adapter(folder, 41, "completion")
    version = register(served.registry, folder, "acme.gone")
    old = version.model_ref
    served.registry.delete("acme.gone")
    with pytest.raises(UnavailableError, match=r"acme\.gone:1.*gone") as caught:
        ask(served.replica, completion(max_tokens=3), old)
    assert caught.value.status == 503
    make_adapter(served.folder / "gone2", 42, "completion")
    reborn = register(served.registry, served.folder / "gone2", "acme.gone")
    assert (reborn.version, reborn.model_ref != old) == (1, True)
    with pytest.raises(UnavailableError):
        ask(served.replica, completion(max_tokens=3), old)
    assert ask(served.replica, completion(max_tokens=3), reborn.model_ref)


def test_a_version_whose_files_are_gone_is_a_503(served):
    folder = served.folder / "lost"
    make_adapter(folder, 43, "completion")
    version = register(served.registry, folder, "acme.lost")
    (stored,) = served.folder.glob(f"home/artifacts/**/{version.run_id}")
    shutil.rmtree(stored)
    for call in (completion(max_tokens=3), chat([{"role": "user", "content": "Hi"}], max_tokens=3)):
        with pytest.raises(UnavailableError) as caught:
            ask(served.replica, call, version.model_ref)
        assert caught.value.status == 503


def test_a_version_that_was_evicted_is_loaded_again_while_the_database_is_away_but_no_other_is(served, monkeypatch):
    first, second = (served.folder / name for name in ("kept", "unseen"))
    make_adapter(first, 44, "completion"), make_adapter(second, 45, "completion")
    kept = register(served.registry, first, "acme.kept").model_ref
    unseen = register(served.registry, second, "acme.unseen").model_ref
    (before,) = ask(served.replica, completion(max_tokens=8), kept)
    assert served.replica._engine.adapters.evict(str(kept))

    def away(*_):
        raise UnavailableError("the database does not answer", code="database")

    monkeypatch.setattr(served.replica._registry.store, "get_version", away)
    (again,) = ask(served.replica, completion(max_tokens=8), kept)
    assert again.text == before.text
    with pytest.raises(UnavailableError):
        ask(served.replica, completion(max_tokens=8), unseen)


def test_equal_weights_with_another_prompt_format_are_served_by_their_own_format(served):
    versions = []
    for number, shape in enumerate(("completion", "messages")):
        make_adapter(served.folder / f"same{number}", 44, shape)
        versions.append(register(served.registry, served.folder / f"same{number}", f"acme.same{number}"))
    assert versions[0].digest == versions[1].digest
    call = chat([{"role": "user", "content": "Hi"}])
    first, second = (prompt_ids(served, call, version.model_ref) for version in versions)
    assert first == tokenizer()("Hi").input_ids
    assert second != first


def hostile(served, name, template):
    """An adapter whose template was found out by nobody before it is served."""
    make_adapter(served.folder / name, 3, form=PromptFormat("chat", template))
    return register(served.registry, served.folder / name, name).model_ref


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("evil", [LOOPS, "{{ 'x' * 2000000000 }}"])
def test_a_template_without_end_delays_no_other_tenant_and_is_told_to_its_own(served, evil, monkeypatch):
    name = f"evil.{'loops' if evil == LOOPS else 'grows'}"
    poison = hostile(served, name, "{% if messages[0].content == 'go' %}" + evil + "{% endif %}x")

    hello = chat([{"role": "user", "content": "Hi"}], max_tokens=2)
    render, begun, answered = TemplateWorker.render, threading.Event(), threading.Event()

    def held(*arguments):
        begun.set()
        answered.wait(10)
        return render(*arguments)

    monkeypatch.setattr(TemplateWorker, "render", held)

    async def go():
        calls = [chat([{"role": "user", "content": "go"}]) for _ in range(8)]
        refused = [asyncio.create_task(answer(served.replica, call, poison)) for call in calls]
        await asyncio.to_thread(begun.wait, 60)
        assert await answer(served.replica, hello, ref(served, "acme.messages"))
        assert not any(task.done() for task in refused), "the neighbour waited for them"
        answered.set()
        return await asyncio.gather(*refused, return_exceptions=True)

    errors = asyncio.run(go())
    assert {(type(error), error.status, error.param) for error in errors} == {
        (TemplateBoundsError, 400, "prompt_format")
    }
    with pytest.raises(TemplateBoundsError):  # for a while no call of its template is tried
        ask(served.replica, hello, poison)


def test_whoever_asks_and_leaves_holds_one_thread_and_is_refused_as_others_are(monkeypatch):
    running, most = 0, 0
    evil = ModelRef.parse("evil.a:1#x")

    def slow(*_):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.2)
        running -= 1
        raise TemplateBoundsError("prompt_format: too much")

    async def go():
        rendering = TemplateRenderer(None, [])
        form = PromptFormat("chat", "own")
        monkeypatch.setattr(PromptFormat, "prompt", slow)
        asked = [asyncio.create_task(rendering.prompt(form, (), evil)) for _ in range(4)]
        for task in asked:
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        return [*rendering._refusals], len(rendering._turns._tenants)

    assert asyncio.run(go()) == ([evil], 0)
    assert most == 1


def test_a_tenants_long_chats_are_rendered_one_at_a_time_and_another_tenants_beside_them(monkeypatch):
    free, running, most = threading.Event(), [], []

    def render(_form, messages, *_):
        running.append(messages[0]["role"])
        most.append(running.count("acme"))
        if messages[0]["role"] == "acme":
            free.wait(60)
        running.remove(messages[0]["role"])
        return messages[0]["role"]

    async def go():
        rendering = TemplateRenderer(None, ["own"])
        monkeypatch.setattr(PromptFormat, "prompt", render)
        monkeypatch.setattr(prompts, "check_carried", lambda *_, **__: None)

        def ask(tenant):
            return rendering.prompt(
                PromptFormat("chat", "own"), ({"role": tenant, "content": ""},), None, ({},), tenant
            )

        flood = [asyncio.create_task(ask("acme")) for _ in range(40)]  # more than the pool has threads
        await asyncio.sleep(0)
        assert await asyncio.wait_for(ask("globex"), 60) == "globex"
        free.set()
        await asyncio.gather(*flood)

    asyncio.run(go())
    assert max(most) == 1


def test_a_strangers_template_is_rendered_in_the_worker_as_in_training(served):
    form = PromptFormat("chat", "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    own = hostile(served, "globex.own", form.template)
    messages = [{"role": "user", "content": "Hi <s> é"}]
    expected = encode_prompt(tokenizer(), form.prompt(messages, tokenizer()))
    assert prompt_ids(served, chat(messages), own) == expected


def test_ending_a_stream_early_frees_its_slot(served):
    async def go():
        slots = served.replica.stats()["slots"]
        call = completion(max_tokens=400, ignore_eos=True)
        async with (
            connected(served.replica) as client,
            aclosing(client.generate(call, ref(served, "acme.completion"), ())) as stream,
        ):
            await anext(stream)
            assert served.replica.stats()["slots_free"] == slots - 1
        async with asyncio.timeout(60):
            while served.replica.stats()["slots_free"] < slots:
                await asyncio.sleep(0.01)
        assert served.replica.stats()["running"] == 0

    asyncio.run(go())


def test_cancelling_a_waiting_consumer_frees_its_slot(served):
    async def go():
        call = completion(max_tokens=400, ignore_eos=True)
        task = asyncio.create_task(answer(served.replica, call, ref(served, "acme.completion")))
        async with asyncio.timeout(60):
            while not served.replica.stats()["running"]:
                await asyncio.sleep(0.005)
            task.cancel()
            while served.replica.stats()["slots_free"] < served.replica.stats()["slots"]:
                await asyncio.sleep(0.01)

    asyncio.run(go())


def test_two_tenants_in_flight_at_once_each_get_their_own_answer(served):
    names = ["acme.completion", "globex.faq", None, "globex.faq", "acme.completion", "acme.alpaca"]
    prompts = ["Once upon a time", "One day", "Tim and", "The dog was", "Lily had", "In the park"]

    def calls():
        return [completion(prompt, max_tokens=32, ignore_eos=True) for prompt in prompts]

    refs = [name and ref(served, name) for name in names]
    alone = [ask(served.replica, call, each)[0] for call, each in zip(calls(), refs, strict=True)]

    async def together():
        running = [answer(served.replica, call, each) for call, each in zip(calls(), refs, strict=True)]
        return await asyncio.gather(*running)

    mixed = [choices[0] for choices in asyncio.run(together())]
    assert [choice.token_ids for choice in mixed] == [choice.token_ids for choice in alone]
    assert mixed[0].token_ids != mixed[4].token_ids


def test_a_call_whose_outputs_cannot_be_written_ends_alone(served, monkeypatch):
    def broken(token_id):
        raise RuntimeError("no text for it")

    monkeypatch.setattr(served.replica, "_texts", broken)

    async def go():
        scored = completion("One day", max_tokens=60, logprobs=1, ignore_eos=True)
        async with connected(served.replica) as client:
            other = client.generate(completion(max_tokens=60, ignore_eos=True), None, ())
            received = list(await anext(other))
            with pytest.raises(UnavailableError) as caught:
                async for _ in client.generate(scored, None, ()):
                    pass
            async for batch in other:
                received += batch
            return received, caught.value

    received, error = asyncio.run(go())
    assert sum(len(delta.token_ids) for delta in received) == 60
    assert error.code == "engine_error"


def test_a_burst_of_one_tenant_stands_behind_itself_and_not_before_another(served, monkeypatch):
    order = []
    submit = served.replica._thread.submit

    def recorded(request):
        order.append(request.tenant)
        submit(request)

    monkeypatch.setattr(served.replica._thread, "submit", recorded)

    def submitted(number, tenant):
        call = replace(completion(f"Once upon {number}", max_tokens=1), tenant=tenant)
        return SubmitRequest(number, call, ref(served, "globex.faq"))

    async def go():
        stream = served.replica.stream("burst")
        await anext(stream)
        await served.replica.submit("burst", [submitted(number, "flood") for number in range(64)], [])
        await served.replica.submit("burst", [submitted(64, "quiet")], [])
        ended = set()
        async with asyncio.timeout(60), aclosing(stream):
            while len(ended) < 65:
                ended |= {number for number, _ in (await anext(stream)).parts}

    asyncio.run(go())
    assert order.count("flood") == 64
    assert order.index("quiet") <= 2


def test_long_texts_of_one_tenant_are_tokenised_behind_another_tenants(served, monkeypatch):
    order = []

    def slow(_tokenizer, text):
        order.append(text[:5])
        time.sleep(0.02)
        return [5]

    monkeypatch.setattr(prompts, "encode_prompt", slow)

    async def go():
        asked = [("flood", "flood")] * 8 + [("quiet", "quiet")]
        texts = [(tenant, word + " x" * prompts.LONG_TEXT) for tenant, word in asked]
        processor = served.replica._prompts
        monkeypatch.setattr(processor, "_max_length", 10**9)
        await asyncio.gather(*(processor.text_ids(text, None, tenant=tenant) for tenant, text in texts))

    asyncio.run(go())
    assert order.index("quiet") == 1
    assert len(order) == 9


def test_a_request_id_in_use_is_refused_and_the_first_request_goes_on(served):
    async def go():
        call = completion(max_tokens=400, ignore_eos=True)  # enough for the second to come meanwhile
        first = asyncio.create_task(answer(served.replica, call))
        async with asyncio.timeout(60):
            while not served.replica.stats()["running"]:
                assert not first.done(), "the first request has ended before it was seen to run"
                await asyncio.sleep(0)
        with pytest.raises(PedroError, match="in use"):
            await answer(served.replica, call)
        return await first

    (choice,) = asyncio.run(go())
    assert len(choice.token_ids) == 400


def test_an_operators_shares_and_pace_reach_the_engine_and_nonsense_is_refused(served, tmp_path):
    config = ServeConfig(max_batch=1, tenant_weights={"acme": 2.0}, prefill_stall=3)
    weighted = ReplicaServer(config, settings_at(tmp_path / "home"))
    assert weighted._engine.config.tenant_weights == {"acme": 2.0}
    assert weighted._engine.config.prefill_stall == 3
    weighted.close()
    with pytest.raises(PedroError, match=r"tenant_weights\.acme"):
        ReplicaServer(ServeConfig(max_batch=1, tenant_weights={"acme": 0.0}), settings_at(tmp_path / "home"))


def test_a_replicas_heap_is_spared_by_the_garbage_collector(served, tmp_path, monkeypatch):
    monkeypatch.setattr(app.serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="r0"))
    monkeypatch.setattr(app, "_replicas_here", lambda config: 1)
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    replica = app.EngineReplica.func_or_class({"max_batch": 1}, settings_at(tmp_path / "home"))
    try:
        assert gc.get_freeze_count() > 50_000
    finally:
        if not frozen:
            gc.unfreeze()
        replica._server.close()


def test_a_full_queue_is_a_503_that_says_when_to_come_back(served, tmp_path):
    small = ReplicaServer(ServeConfig(max_batch=1, max_waiting=1), settings_at(tmp_path / "home"))

    async def go():
        running = [asyncio.create_task(answer(small, completion(max_tokens=200, ignore_eos=True))) for _ in range(4)]
        return await asyncio.gather(*running, return_exceptions=True)

    try:
        done = asyncio.run(go())
    finally:
        small.close()
    refused = [item for item in done if isinstance(item, PedroError)]
    answered = [item for item in done if isinstance(item, list)]
    assert len(refused) >= 2
    assert answered
    assert all((error.status, error.retry_after_s > 0) == (503, True) for error in refused)


def test_a_long_text_does_not_hold_up_the_streams_of_others(served, monkeypatch):
    """Tokenising half a megabyte takes about a second; the bound that refuses it at once is taken away here."""
    monkeypatch.setattr("pedro.serving.prompts.SHRINKAGE", 10**9)

    async def go():
        turns = 0
        call = GenerateCall("long", "acme", "m", prompt="word " * 100_000)
        refusal = asyncio.create_task(answer(served.replica, call))
        while not refusal.done():
            await asyncio.sleep(0.005)
            turns += 1
        with pytest.raises(PedroError, match="exceeds the context"):
            await refusal
        return turns

    assert asyncio.run(go()) > 5
