"""Prompts: the templates, the token ids, and that training and serving make the same ones."""

import json
import subprocess
import sys

import pytest

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import FORMATS, PromptFormat, encode_completion, encode_prompt, format_for_shape, load_rows, shape_of
from pedro.errors import BackboneError, DataError

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] }}\n{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{{ eos_token }}\n{% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer():
    return load_tokenizer(resolve_backbone("stories260K"))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHATML
    return tokenizer


def test_raw_joins_contents_by_newlines():
    assert FORMATS["raw"].render([USER]) == "Hi"
    assert FORMATS["raw"].render([SYSTEM, USER]) == "Be brief.\nHi"


def test_alpaca_is_the_standard_text():
    assert FORMATS["alpaca"].render([USER]) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHi\n\n### Response:"
    )
    assert FORMATS["alpaca"].render([SYSTEM, USER]) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nBe brief.\n\n### Input:\nHi\n\n### Response:"
    )


def test_alpaca_refuses_a_conversation():
    answer = {"role": "assistant", "content": "Hello"}
    with pytest.raises(DataError, match="takes one user message, or a system and a user message"):
        FORMATS["alpaca"].render([USER, answer, USER])


def test_own_chat_template_is_used_where_the_backbone_has_none(tokenizer):
    form = format_for_shape("messages", tokenizer)
    answer = {"role": "assistant", "content": "Hello"}
    assert form == FORMATS["chat"]
    assert form.render([SYSTEM, USER, answer, USER]) == (
        "system: Be brief.\nuser: Hi\nassistant: Hello\nuser: Hi\nassistant:"
    )


@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_the_backbones_chat_template_renders_as_transformers_does(chat_tokenizer, shape):
    messages = [SYSTEM, USER, {"role": "assistant", "content": "Ünd {{ 7 * 7 }}\n"}, USER]
    expected = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert format_for_shape(shape, chat_tokenizer).render(messages) == expected


def test_contents_are_never_read_as_templates():
    assert FORMATS["raw"].render([{"role": "user", "content": "{{ 7 * 7 }}{% for %}"}]) == "{{ 7 * 7 }}{% for %}"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__name__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(content='x') }}",
        "{{ ('{0.__class__.__mro__}').format(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_malicious_template_reaches_nothing(attack):
    with pytest.raises(DataError, match="refuses them"):
        PromptFormat("evil", attack).render([USER])


def test_a_broken_template_is_a_data_error():
    with pytest.raises(DataError, match="template cannot be read"):
        PromptFormat("broken", "{% for %}").render([USER])


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% if tools is not none or documents is not none %}tools{% endif %}x", "x"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul{% endif %}", "26 Jul"),
        ("{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}", '{"content":"Hi","role":"user"}'),
        ("{{ pad_token }}{{ unk_token }}", "<pad><unk>"),
    ],
)
def test_what_chat_templates_of_the_hub_use_is_there(tokenizer, template, text):
    tokenizer.chat_template = template
    tokenizer.pad_token = "<pad>"
    form = format_for_shape("messages", tokenizer)
    assert PromptFormat.from_dict(json.loads(json.dumps(form.to_dict()))).render([USER]) == text


def test_manifests_of_earlier_releases_are_read_and_those_of_ordinary_templates_have_not_changed(chat_tokenizer):
    form = format_for_shape("messages", chat_tokenizer)
    assert form.to_dict().keys() == {"id", "template", "bos_token", "eos_token"}
    assert PromptFormat.from_dict(form.to_dict()) == form


def test_named_templates_without_a_default_are_one_clear_error(tokenizer):
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(BackboneError, match="named rag, tool_use, and none is named 'default'"):
        format_for_shape("messages", tokenizer)
    tokenizer.chat_template = {"rag": "a", "default": "{{ messages[0].content }}"}
    assert format_for_shape("messages", tokenizer).render([USER]) == "Hi"


@pytest.mark.parametrize("field", ["id", "template", "bos_token", "special_tokens_in_content"])
def test_a_format_with_a_field_of_another_type_is_refused_by_name(field):
    with pytest.raises(DataError, match=f"prompt_format: {field}"):
        PromptFormat.from_dict({"id": "raw", "template": "x", field: 3})


@pytest.mark.parametrize(
    "template", ["{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ " + "(" * 900 + "1" + ")" * 900 + " }}"]
)
def test_recursion_in_a_template_is_a_data_error(template):
    with pytest.raises(DataError):
        PromptFormat("deep", template).render([USER])


def test_a_format_survives_its_manifest(chat_tokenizer):
    form = format_for_shape("messages", chat_tokenizer)
    assert PromptFormat.from_dict(json.loads(json.dumps(form.to_dict()))) == form
    with pytest.raises(DataError, match="lacks template"):
        PromptFormat.from_dict({"id": "raw"})


def test_bos_is_put_once(tokenizer):
    plain = encode_prompt(tokenizer, "Hi")
    assert plain[0] == tokenizer.bos_token_id
    assert plain.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, tokenizer.bos_token + "Hi").count(tokenizer.bos_token_id) == 1
    assert plain == tokenizer("Hi").input_ids


def test_a_tokenizer_without_bos_gets_none(tokenizer):
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, "Hi") == tokenizer("Hi", add_special_tokens=False).input_ids


def test_eos_ends_an_answer_once(tokenizer):
    ids = encode_completion(tokenizer, "play")
    assert ids[-1] == tokenizer.eos_token_id
    assert encode_completion(tokenizer, "play" + tokenizer.eos_token) == ids
    assert encode_completion(tokenizer, "") == [tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "play"


def test_a_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos_token"):
        encode_completion(tokenizer, "play")


def test_the_embedded_backbone_can_learn_to_stop(tokenizer):
    """Its </s> was never trained: the embedding is that of <unk>, so no adapter could emit it."""
    from pedro.backbone import load_model

    model = load_model(resolve_backbone("stories260K"))
    embedding = model.get_input_embeddings().weight
    assert (embedding[2] - embedding[0]).abs().max() < 1e-3
    assert (embedding[tokenizer.eos_token_id] - embedding[0]).abs().max() > 0.1
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


ROWS = {
    "raw": {"prompt": "play it", "completion": "play"},
    "alpaca": {"instruction": "play it", "output": "play"},
    "alpaca with input": {"instruction": "Which intent?", "input": "play it", "output": "play"},
    "messages": {"messages": [SYSTEM, USER, {"role": "assistant", "content": "Hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
}
REQUESTS = {
    "raw": [{"role": "user", "content": "play it"}],
    "alpaca": [{"role": "user", "content": "play it"}],
    "alpaca with input": [{"role": "system", "content": "Which intent?"}, {"role": "user", "content": "play it"}],
    "messages": [SYSTEM, USER],
    "sharegpt": [USER],
}


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("name", ROWS)
def test_served_prompt_ids_are_the_trained_ones(tokenizer, tmp_path, name, template):
    tokenizer.chat_template = template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[name]))
    form = format_for_shape(shape_of(path), tokenizer)
    row = load_rows(path, tokenizer, form, 512, tmp_path / "cache")[0]
    stored = PromptFormat.from_dict(json.loads(json.dumps(form.to_dict())))
    served = encode_prompt(tokenizer, stored.render(REQUESTS[name]))
    assert row["input_ids"][: row["prompt_len"]] == served
    assert row["input_ids"][row["prompt_len"] :] == encode_completion(tokenizer, row["completion"])


def test_importing_the_room_imports_no_heavy_library():
    heavy = ["torch", "transformers", "datasets", "numpy", "jinja2", "ray", "mlflow"]
    code = f"import sys, pedro.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
