"""A prompt in the wording `template` ends with one token, whatever the row says and whichever backbone reads it."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
from task_files import make_task_files

from pedro.adapter_kinds.heads import head_length
from pedro.backbone import EMBEDDED, load_tokenizer, resolve_backbone
from pedro.data import format_for_shape
from pedro.data.conditioning import Heads, find_head_end
from pedro.data.prompt_format import encode_prompts
from pedro.data.row_shapes import RowShape
from pedro.data.tasks import TASKS, get_task
from pedro.errors import ConfigError

TRAINED = [name for name, task in TASKS.items() if task.name != "mt_bench"]  # that one is asked as others were trained
KINDS = ("stories260K", "pedro-nano", "chat")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    chat = tmp_path_factory.mktemp("backbone") / "chat"
    shutil.copytree(EMBEDDED / "pedro-nano", chat)
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return {kind: load_tokenizer(resolve_backbone(str(chat) if kind == "chat" else kind)) for kind in KINDS}


def last_tokens(task, data, tokenizer) -> set[int]:
    """Of some dozens of rows, as training and scoring put them."""
    place = None if task.packaged else data
    every = itertools.chain.from_iterable(task.rows(split, place) for split in task.splits(place))
    rows = list(itertools.islice(every, 60))
    shape = RowShape.MESSAGES if task.as_chat and tokenizer.chat_template else task.shape
    form = format_for_shape(shape, tokenizer)
    assert rows
    prompts = encode_prompts(tokenizer, [form.prompt(row.messages, tokenizer) for row in rows])
    return {ids[-1] for ids in prompts}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TRAINED)
def test_the_last_token_of_every_prompt_is_the_same(name, kind, data, tokenizers):
    task = get_task(name)
    assert task.wording == "template"
    assert len(last_tokens(task, data, tokenizers[kind])) == 1


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "alpaca"])
def test_what_a_prompt_ends_with_stands_in_the_wording(name):
    assert get_task(name).words.ending.endswith((":", "step."))


@pytest.mark.parametrize("name", ["snips", "clinc_domains", "banking77", "snips_talk_first"])
def test_a_bare_prompt_ends_anywhere(name, data, tokenizers):
    assert get_task(name, "bare").words.ending == ""
    assert len(last_tokens(get_task(name, "bare"), data, tokenizers["pedro-nano"])) > 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["snips", "clinc_domains", "banking77", "squad", "wikisql"])
def test_a_system_turn_says_what_is_asked_and_prompts_end_alike(name, kind, data, tokenizers):
    task = get_task(name, "system")
    assert len(last_tokens(task, data, tokenizers[kind])) == 1
    row, *others = task.rows("train", None if task.packaged else data)
    plain = next(get_task(name).rows("train", None if task.packaged else data))
    assert [turn["role"] for turn in task.line(row, chat=True)["messages"]] == ["system", "user", "assistant"]
    assert plain.completion == row.completion
    if task.packaged:
        assert row.prompt == plain.prompt
        assert {each.system for each in (row, *others)} == {get_task(name).words.instruction}
    else:
        assert len(row.prompt) < len(plain.prompt), "the passage or the table is told before"
        assert plain.prompt.splitlines()[0] in row.system
    form = format_for_shape(task.shape, tokenizers[kind])
    assert task.line(row)["prompt"] == form.render(row.messages), (
        "without a chat template training asks as scoring does"
    )


def test_a_chats_system_turn_is_a_head_that_conditions(data, tokenizers):
    form = format_for_shape(RowShape.MESSAGES, tokenizers["chat"])
    form = replace(form, head_end=find_head_end(form, tokenizers["chat"]))
    heads = Heads(form, tokenizers["chat"])
    for name in ("snips", "squad", "wikisql"):
        task = get_task(name, "system")
        for row in itertools.islice(task.rows("train", None if task.packaged else data), 3):
            (ids,) = encode_prompts(tokenizers["chat"], [form.prompt(row.messages, tokenizers["chat"])])
            heads.check(row.messages, (), ids)
            assert 0 < head_length(form.head_end, ids) < len(ids)


def test_a_system_turn_takes_no_worked_examples():
    with pytest.raises(ConfigError, match="shots: squad has none in the wording 'system'"):
        get_task("squad", "system", 2)


def test_earlier_names_of_wordings_mean_what_they_meant(data):
    for name in ("snips", "clinc_domains", "banking77"):
        assert get_task(name, "bare").words is get_task(name, "full").words
        assert get_task(name, "bare").stored_wording == "full"
        assert get_task(name).stored_wording == "template"
    for name in ("sst2", "rte", "qnli", "boolq", "copa", "squad", "record", "wikisql"):
        assert get_task(name).words is get_task(name, "full").words
        assert get_task(name, "bare").words is get_task(name, "short").words
    row = next(get_task("snips").rows("test"))
    assert row.prompt == f"Text: {next(get_task('snips', 'bare').rows('test')).prompt}\nIntent:"


def test_a_row_is_a_conversation_where_that_is_asked_for():
    task = get_task("snips")
    row = next(task.rows("test"))
    assert task.line(row) == {"prompt": row.prompt, "completion": row.completion}
    messages = task.line(row, chat=True)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [message["content"] for message in messages] == [row.prompt, row.completion]
    assert not get_task("snips", "bare").as_chat
    assert not get_task("alpaca").as_chat, "its rows have a prompt format of their own"
