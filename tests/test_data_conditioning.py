"""`conditioning: system`: where the system turn ends in a prompt, found by the chat template and told by tokens."""

import json
import random

import pytest
from gguf_files import MERGES, TEMPLATE, TOKENS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pedro.adapter_kinds.heads import head_length
from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import load_rows
from pedro.data.conditioning import Heads, asked, find_head_end, head_of
from pedro.data.prompt_format import FORMATS, PromptFormat, encode_prompt, encode_prompts
from pedro.errors import DataError

LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|im_start|>"
    "{% endfor %}{% if add_generation_prompt %}assistant<|im_end|>\n\n{% endif %}"
)
GEMMA = "{{ bos_token }}<|im_start|>user\n{{ messages[0].content }}\n\n{{ messages[1].content }}<|im_end|>\n"
LAST_USER = (  # as Mistral's: the system turn stands in front of the last question
    "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]{% if loop.last %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
FORMS = {
    "chatml": PromptFormat("chat", TEMPLATE),
    "llama 3": PromptFormat("chat", LLAMA_3, bos_token="<|endoftext|>"),
    "gemma": PromptFormat("chat", GEMMA, bos_token="<|endoftext|>"),
    "last user": PromptFormat("chat", LAST_USER),
    "packaged": FORMATS["chat"],
    "alpaca": FORMATS["alpaca"],
    "raw": FORMATS["raw"],
}


@pytest.fixture(scope="module")
def tokenizers():
    """The packaged one, of pieces, and one of bytes with special tokens that a template writes."""
    bpe = Tokenizer(models.BPE({token: n for n, token in enumerate(TOKENS)}, [tuple(m.split()) for m in MERGES]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict(zip(("unk_token", "bos_token", "eos_token"), TOKENS[:3], strict=True))
    return {
        "bytes": PreTrainedTokenizerFast(tokenizer_object=bpe, **special),
        "pieces": load_tokenizer(resolve_backbone("stories260K")),
    }


def conditioned(form, tokenizer):
    return PromptFormat.from_dict({**form.to_dict(), "head_end": find_head_end(form, tokenizer)})


def words(rng, marks=" .,!?()\"'0123456789"):
    return "".join(rng.choice(["the", "cat", "hell", "he", *marks]) for _ in range(rng.randint(1, 12)))


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", FORMS)
def test_the_head_is_what_all_prompts_with_a_system_turn_begin_with_and_its_tokens_end_it(tokenizers, kind, name):
    tokenizer, rng = tokenizers[kind], random.Random(3)
    form = conditioned(FORMS[name], tokenizer)
    heads = Heads(form, tokenizer)
    for _ in range(60):
        system = {"role": "system", "content": words(rng)}
        head = head_of(form, encode_prompts(tokenizer, [form.prompt(turns, tokenizer) for turns in asked([system])]))
        for _ in range(3):
            messages = [system, {"role": "user", "content": words(rng)}]
            ids = encode_prompt(tokenizer, form.prompt(messages, tokenizer))
            heads.check(messages, (), ids)
            assert ids[: len(head)] == head
            assert head_length(form.head_end, ids) == len(head), "which is all that training and serving look at"
        assert system["content"].strip() in tokenizer.decode(head).replace("\u2581", " ")


def test_a_special_token_ends_the_head_so_that_nothing_a_user_says_can_be_joined_to_it(tokenizers):
    tokenizer = tokenizers["bytes"]
    form = conditioned(FORMS["chatml"], tokenizer)
    assert tokenizer.decode(list(form.head_end)) == "<|im_end|>\n<|im_start|>"
    heads = Heads(form, tokenizer)
    for system, said in (("Be <|im_end|>\n<|im_start|>", "\n\nhe"), ("", "<|im_start|>"), ("a\n", " ")):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
        heads.check(messages, (), encode_prompt(tokenizer, form.prompt(messages, tokenizer)))


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (PromptFormat("chat", "{{ messages[0].content }}{{ messages[1].content }}"), "writes nothing behind"),
        (PromptFormat("chat", "{{ messages[-1].content }} ->"), "leaves the system turn out"),
        (PromptFormat("chat", "{{ messages[1].content }} {{ messages[0].content }} ->"), "or writes it behind"),
        (PromptFormat("chat", "{{ raise_exception('no system') }}"), "refuses a system and a user turn"),
    ],
)
def test_a_format_that_cannot_condition_on_its_system_turn_is_refused_by_name(tokenizers, form, why):
    for tokenizer in tokenizers.values():
        with pytest.raises(DataError, match=why) as refused:
            find_head_end(form, tokenizer)
        assert refused.value.param == "method.conditioning"
        assert f"the {form.id} prompt format" in refused.value.message


TURN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "he"}]
SYSTEM = {"role": "system", "content": "the cat"}


@pytest.mark.parametrize(
    ("name", "messages", "why"),
    [
        ("chatml", TURN, "there is none; begin with one"),
        ("packaged", [{"role": "system", "content": "a\nuser: b"}, *TURN], "holds or hides what ends it"),
        ("gemma", [{"role": "system", "content": "a\n\nb"}, *TURN], "holds or hides what ends it"),
        ("last user", [SYSTEM, *TURN, *TURN], "does not begin this prompt with its system turn"),
        ("llama 3", [SYSTEM, {"role": "assistant", "content": "he"}], "let a user's turn follow it"),
    ],
)
def test_a_row_without_a_head_is_refused_by_its_line(tokenizers, tmp_path, name, messages, why):
    tokenizer = tokenizers["bytes"]
    form = conditioned(FORMS[name], tokenizer)
    good = {"messages": [SYSTEM, *TURN]}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (good, {"messages": messages}))) + "\n")
    with pytest.raises(DataError, match=rf"line 2: messages: .*{why}"):
        load_rows(tmp_path / "rows.jsonl", tokenizer, form, 512, tmp_path / "cache")
    plain = load_rows(tmp_path / "rows.jsonl", tokenizer, FORMS[name], 512, tmp_path / "cache")
    assert len(plain) >= 2, "without the conditioning they are rows like any other"


def test_a_format_keeps_the_tokens_in_its_manifest_and_damaged_ones_are_refused_by_name(tokenizers):
    form = conditioned(FORMS["chatml"], tokenizers["bytes"])
    kept = json.loads(json.dumps(form.to_dict()))
    assert PromptFormat.from_dict(kept) == form
    assert "head_end" not in FORMS["chatml"].to_dict()
    for wrong in ("ab", [1.5], [True], {"a": 1}):
        with pytest.raises(DataError, match="prompt_format: head_end"):
            PromptFormat.from_dict({**kept, "head_end": wrong})
