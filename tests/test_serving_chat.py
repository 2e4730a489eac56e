"""Conversations on a small backbone of a language model's shape and chat template: gateway, engine and benchmark."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
import torch
from dashboard_gateway import running
from engine_models import make_adapter, random_backbone
from gguf_files import MERGES, TEMPLATE, TOKENS
from serving_adapters import register, settings_at
from task_files import EXCERPTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jobs.bench import benchmarks
from jobs.benchmarks.chat import TIE, ChatComparison, Sizes, long_prompt, mt_bench
from jobs.benchmarks.chat_contenders import Generate, Reply, Server
from jobs.benchmarks.command_line import main
from pedro.adapter_directory import read_manifest, write_manifest
from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data.conditioning import find_head_end, head_of
from pedro.data.prompt_format import format_for_shape
from pedro.errors import DataError, UnavailableError
from pedro.refs import ModelRef
from pedro.registry import Registry
from pedro.serving import prompts
from pedro.serving.config import ServeConfig

SHAPE = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
USER = ["Which card did I lose?", "And why is that?", "Thank you, in 3 words."]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A directory: nine heads on three of keys and values, tied embeddings, a byte-level tokenizer that chats."""
    directory = tmp_path_factory.mktemp("backbones") / "small"
    changes = {"vocab_size": len(TOKENS), "tie_word_embeddings": True, "max_position_embeddings": 4096}
    model = random_backbone("llama", **SHAPE, **changes, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    merges = [tuple(merge.split()) for merge in MERGES]
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=TOKENS[1], eos_token=TOKENS[2], pad_token=TOKENS[2], unk_token=TOKENS[0]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return resolve_backbone(str(directory))


@pytest.fixture(scope="module")
def served(backbone, tmp_path_factory):
    """A gateway over it on a port of this machine, with the adapter acme.chat, and the PEFT model of that adapter."""
    folder = tmp_path_factory.mktemp("chat")
    settings, model, tokenizer = settings_at(folder / "home"), load_model(backbone), load_tokenizer(backbone)
    tuned = make_adapter(model, folder / "made", seed=1, digest=backbone.digest)
    manifest = read_manifest(folder / "made")
    manifest["backbone"] |= {"tokenizer_digest": backbone.tokenizer_digest}
    manifest |= {"prompt_format": format_for_shape("messages", tokenizer).to_dict(), "metrics": {}}
    write_manifest(folder / "made", manifest)
    register(Registry.open(settings), folder / "made", "acme.chat")
    form = format_for_shape("messages", tokenizer)
    form = replace(form, head_end=find_head_end(form, tokenizer))
    options = {"conditioning": "system", "head_end": list(form.head_end)}
    headed = make_adapter(model, folder / "headed", seed=2, digest=backbone.digest, **options)
    write_manifest(
        folder / "headed",
        {**manifest, "method": {"name": "pedro", "options": options}, "prompt_format": form.to_dict()},
    )
    register(Registry.open(settings), folder / "headed", "acme.headed")
    twin = make_adapter(model, folder / "twin", seed=1, digest=backbone.digest, **options)
    config = ServeConfig(backbone=str(backbone.directory), served_name="small", max_batch=4)
    with running(settings, config) as gateway:
        yield gateway, tokenizer, {"small": model, "acme.chat": tuned, "acme.headed": headed, "twin": twin}


def generated(model, tokenizer, messages, count):
    """`generate()` of the conversation as transformers renders it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return ids.shape[1], tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["small", "acme.chat", "acme.headed"])
def test_every_turn_of_a_conversation_is_what_generate_says_to_the_rendered_template(served, name):
    gateway, tokenizer, models_ = served
    messages = [{"role": "system", "content": "Be brief."}]
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.acme}"}, timeout=60) as client:
        for said in USER:
            messages.append({"role": "user", "content": said})
            body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 24}
            answer = client.post("/v1/chat/completions", json=body).json()
            length, text = generated(models_[name], tokenizer, messages, 24)
            assert answer["choices"][0]["message"]["content"] == text
            assert answer["usage"]["prompt_tokens"] == length
            messages.append({"role": "assistant", "content": text})


def test_a_conversation_that_its_system_turn_conditions_reads_that_and_earlier_turns_once(served):
    gateway, *_ = served
    found = {}
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.acme}"}, timeout=60) as client:
        for name in ("acme.chat", "acme.headed"):
            messages = [{"role": "system", "content": "Speak of cards alone, and be kind."}]
            found[name] = []
            for said in USER:
                messages.append({"role": "user", "content": said})
                body = {"model": name, "messages": messages, "temperature": 0, "max_tokens": 8}
                answer = client.post("/v1/chat/completions", json=body).json()
                usage = answer["usage"]
                found[name].append((usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]))
                messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        fresh = [{"role": "system", "content": "Speak of cards alone, and be kind."}, {"role": "user", "content": "?"}]
        body = {"model": "acme.headed", "messages": fresh, "max_tokens": 1}
        other = client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens_details"]
    assert [cached for cached, _ in found["acme.chat"]] == [0, 0, 0], "each turn makes other vectors"
    (first, length), (second, longer), (third, _) = found["acme.headed"]
    assert first == 0
    assert length - 32 < second < longer
    assert longer - 32 < third
    assert other["cached_tokens"] >= 32, "another conversation has its head in common"


def test_a_request_may_have_its_system_turn_alone_condition_an_adapter(served):
    """As the same weights answer that were told the end of the system turn when they were trained."""
    gateway, tokenizer, models_ = served
    messages, found = [{"role": "system", "content": "Speak of clocks alone, and be brief about it."}], []
    body = {"temperature": 0, "max_tokens": 24, "messages": messages, "conditioning": "system"}
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.acme}"}, timeout=60) as client:
        for said in USER:
            messages.append({"role": "user", "content": said})
            answer = client.post("/v1/chat/completions", json={"model": "acme.chat", **body}).json()
            length, text = generated(models_["twin"], tokenizer, messages, 24)
            assert answer["choices"][0]["message"]["content"] == text
            assert answer["usage"]["prompt_tokens"] == length
            found.append((answer["usage"]["prompt_tokens_details"]["cached_tokens"], length))
            whole = client.post("/v1/chat/completions", json={"model": "acme.chat", **body, "conditioning": "prompt"})
            assert (
                whole.json()["choices"][0]["message"]["content"]
                == generated(models_["acme.chat"], tokenizer, messages, 24)[1]
            )
            messages.append({"role": "assistant", "content": text})
        for name in ("small", "acme.headed"):  # which is conditioned on nothing, and which on that by itself
            answer = client.post("/v1/chat/completions", json={"model": name, **body, "messages": messages[:2]}).json()
            text = generated(models_[name], tokenizer, messages[:2], 24)[1]
            assert answer["choices"][0]["message"]["content"] == text
    (none, first), (second, longer), (third, _) = found
    assert none == 0
    assert first - 32 < second < longer, "its vectors, keys and values are those of the turn before"
    assert longer - 32 < third


@pytest.mark.parametrize(
    ("model", "conditioning", "why"),
    [
        ("acme.headed", "prompt", "conditioning: the adapter was conditioned on its system turn; send 'system'"),
        ("acme.chat", "system", "there is none; begin with one"),
        ("acme.chat", "user", 'conditioning: expected "prompt" or "system"'),
    ],
)
def test_a_conditioning_that_cannot_be_is_refused_by_name(served, model, conditioning, why):
    gateway, *_ = served
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which card did I lose?"}]
    body = {"model": model, "messages": turns[why.startswith("there") :], "conditioning": conditioning}
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.acme}"}, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert why in answer.json()["error"]["message"]


STRANGERS = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
LAST_USER = "{% for m in messages[1:] %}{{ messages[0].content if loop.last }} {{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("config", "template", "outcome"),
    [
        ({"peft_type": "PEDRO"}, STRANGERS, "<|im_start|>system: Be brief.<|im_end|><|im_start|>"),
        ({"peft_type": "LORA"}, LAST_USER, None),
        ({"peft_type": "PEDRO"}, LAST_USER, "conditioning, conditioning: the adapter's prompt format, chat, has no"),
        (
            {"peft_type": "PEDRO", "apply_to": "answer"},
            STRANGERS,
            "conditioning, conditioning: the adapter only acts on",
        ),
    ],
)
def test_what_a_request_conditions_on_depends_on_the_adapter_and_its_template(
    backbone, tmp_path, monkeypatch, config, template, outcome
):
    tokenizer, ref = load_tokenizer(backbone), ModelRef.parse("acme.strange:1")
    form = replace(format_for_shape("messages", tokenizer), template=template)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr(prompts, "read_manifest", lambda _directory: {"prompt_format": form.to_dict()})
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    looked = []
    monkeypatch.setattr(
        prompts, "find_head_end", lambda *given, **more: looked.append(1) or find_head_end(*given, **more)
    )

    async def once(processor):
        try:
            ids, length = await processor.conditioned(messages, ref, "acme", (), "system")
            return length if length is None else tokenizer.decode(ids[:length])
        except DataError as error:
            return f"{error.param}, {error.message}"

    async def go():
        processor = prompts.PromptProcessor(tokenizer, 96, lambda _ref: tmp_path)
        try:
            return [await once(processor) for _ in range(2)]
        finally:
            processor.close()

    first, second = asyncio.run(go())
    assert first == second
    assert first == outcome or outcome in first
    assert len(looked) <= 1, "what was found is kept, also that there is nothing"


def test_the_head_of_a_prompt_that_is_too_long_is_not_kept(backbone, tmp_path, monkeypatch):
    tokenizer, made = load_tokenizer(backbone), []
    form = format_for_shape("messages", tokenizer)
    form = replace(form, head_end=find_head_end(form, tokenizer))
    monkeypatch.setattr(prompts, "read_manifest", lambda _directory: {"prompt_format": form.to_dict()})
    monkeypatch.setattr(prompts, "head_of", lambda form, turns: made.append(turns) or head_of(form, turns))
    ref = ModelRef.parse("acme.headed:1")

    async def go():
        processor = prompts.PromptProcessor(tokenizer, 96, lambda _ref: tmp_path)
        try:
            for said in ("Be brief.", "Be brief.", "Be brief. " * 40):
                messages = ({"role": "system", "content": said}, {"role": "user", "content": "Hi"})
                length = len(await processor.message_ids(messages, ref, "acme"))
            return length
        finally:
            processor.close()

    assert asyncio.run(go()) > 96, "what is too long is left for the engine to refuse"
    assert len(made) == 1, "a head is made once, and none of what is too long"


def test_a_prompt_waits_for_files_that_are_away_for_a_moment(backbone, tmp_path, monkeypatch):
    tokenizer, tries = load_tokenizer(backbone), []
    form = format_for_shape("messages", tokenizer)
    monkeypatch.setattr(prompts, "read_manifest", lambda _directory: {"prompt_format": form.to_dict()})
    monkeypatch.setattr(prompts, "RETRY_EVERY_S", 0.01)

    def fetch(ref):
        tries.append(ref)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")
        return tmp_path

    async def go():
        processor = prompts.PromptProcessor(tokenizer, 96, fetch)
        try:
            asked = ({"role": "user", "content": "Hi"},), ModelRef.parse("a.b:1"), "a"
            return (await asyncio.gather(*(processor.message_ids(*asked) for _ in range(5))))[0]
        finally:
            processor.close()

    assert asyncio.run(go())
    assert len(tries) == 3, "all wait for the same attempts"
    tries.clear()
    monkeypatch.setattr(prompts, "RETRY_FOR_S", 0)
    with pytest.raises(UnavailableError, match=r"^model: a\.b:1 could not be loaded now"):
        asyncio.run(go())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_without_the_system_turn_that_conditions_it_an_adapter_answers_nothing(served, path):
    gateway, *_ = served
    turn = {"role": "user", "content": "Which card did I lose?"}
    asked = {"input": [turn]} if path == "/v1/responses" else {"messages": [turn]}
    with httpx.Client(base_url=gateway.url, headers={"Authorization": f"Bearer {gateway.acme}"}, timeout=60) as client:
        answer = client.post(path, json={"model": "acme.headed", **asked})
    assert answer.status_code == 400
    assert "is conditioned on the system turn (conditioning: system), and there is none" in answer.text


def test_the_benchmark_holds_the_same_conversations_with_everybody_and_compares_the_answers(served):
    gateway, tokenizer, models_ = served
    generate, said = Generate(models_["small"], tokenizer), []
    servers = {name: Server(gateway.url, gateway.acme, [m]) for name, m in (("none", "small"), ("pedro", "acme.chat"))}
    sizes = Sizes(rounds=2, batches=(2,), new=12, prompt=300, after_prompt=24)
    report = ChatComparison(generate, servers, sizes, said.append).run(EXCERPTS)
    assert [(row["texts"], row["engine"], row["adapters"]) for row in report.rows] == [
        (texts, *who)
        for texts in ("MT-Bench", "300-token prompt")
        for who in (("generate", "none"), ("server", "none"), ("server", "pedro"))
    ]
    assert [row["equal"] for row in report.rows if "equal" in row] == ["8/8", "2/2"]
    assert report.facts["differences"] == []
    assert all(row["tok_s"] > 0 and row["ttft_ms"] > 0 and row["tpot_ms"] >= 0 for row in report.rows)
    assert all(row["ratio"] == row["ttft_ratio"] == 1 for row in report.rows if row["engine"] == "generate")
    assert {row["answers"] for row in report.rows} == {8, 2}
    assert next(t for t in report.targets if t.name.startswith("answers unlike")).met
    assert 290 < report.rows[-1]["prompt_tokens"] <= 300


def test_a_different_answer_is_told_with_its_place_and_how_close_it_was(served):
    gateway, tokenizer, models_ = served

    class Wrong(Server):
        def converse(self, conversations, new):
            held = super().converse(conversations, new)
            for reply in held.replies[0][1:]:
                reply.text = "something else"
            return held

    servers = {"none": Wrong(gateway.url, gateway.acme, ["small"])}
    sizes = Sizes(rounds=1, batches=(2,), new=8, prompt=200, after_prompt=4)
    comparison = ChatComparison(Generate(models_["small"], tokenizer), servers, sizes, lambda _line: None)
    report = comparison.run(EXCERPTS)
    (found,) = report.facts["differences"]
    assert [row["equal"] for row in report.rows if "equal" in row] == ["3/4", "1/1"]
    assert {**found, "margin": None} == {
        "texts": "MT-Bench",
        "batch": 2,
        "round": 1,
        "conversation": 0,
        "turn": 2,
        "token": 0,
        "margin": None,
    }
    assert found["margin"] > TIE
    assert not report.targets[-1].met


def test_the_first_difference_is_a_token_even_within_a_character(served):
    _, tokenizer, models_ = served
    generate = Generate(models_["small"], tokenizer)
    ids = tokenizer("hel\u00e9x", add_special_tokens=False).input_ids
    theirs = Reply(text="hel\u00e9x", token_ids=[*ids, 2])
    assert len(ids) == 4, "the accented letter is two tokens"
    assert generate.first_difference(theirs, Reply(text="hel\u00e9y")) == 3
    assert generate.first_difference(theirs, Reply(text="help")) == 1
    assert generate.first_difference(theirs, Reply(text="hel\u00e9xx")) == 4, "it went on where the other ended"


def test_questions_take_turns_between_categories(tmp_path):
    (tmp_path / "mt_bench").mkdir()
    rows = [("a", 1), ("a", 2), ("a", 3), ("b", 4)]
    lines = [json.dumps({"question_id": n, "category": c, "turns": [f"{n}", "?"]}) for c, n in rows]
    (tmp_path / "mt_bench" / "question.jsonl").write_text("\n".join(lines))
    questions = mt_bench(tmp_path)
    assert [next(questions)[0] for _ in range(5)] == ["1", "4", "2", "3", "1"]


def test_a_long_prompt_has_as_many_tokens_as_asked_for(served):
    _, tokenizer, models_ = served
    generate = Generate(models_["small"], tokenizer)
    texts = {long_prompt(generate, 256, number) for number in range(3)}
    assert len(texts) == 3
    for text in texts:
        assert 240 < len(generate.prompt_ids([{"role": "user", "content": text}])) <= 256


@pytest.mark.parametrize(
    ("words", "data", "like"),
    [(["--backbones", "a,b"], "here", "chat takes one"), ([], "", "PEDRO_TASK_DATA: not set")],
)
def test_without_data_or_with_two_backbones_the_benchmark_says_what_it_wants(
    words, data, like, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    monkeypatch.setenv("PEDRO_TASK_DATA", data)
    assert main(benchmarks(), tmp_path, ["chat", *words, "--out", str(tmp_path / "chat.json")]) == 2
    assert like in capsys.readouterr().err
