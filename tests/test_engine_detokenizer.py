"""Text comes out whole: no half characters, no beginning of a stop text, whatever the token borders."""

import pytest
from engine_models import stories
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import encode_completion, encode_prompt
from pedro.engine.request import Request
from pedro.engine.sequence import REPLACEMENT, Detokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return stories()[1]


class Pieces:
    """A tokenizer whose tokens are the given pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids, **_options) -> str:
        return "".join(self.pieces[i] for i in ids)


def feed(detokenizer, ids):
    """The deltas token by token, the flushed rest, and whether a stop text was met."""
    deltas = []
    for token_id in ids:
        text, stopped = detokenizer.add(token_id)
        deltas.append(text)
        if stopped:
            return deltas, "", True
    return deltas, detokenizer.flush(), False


@pytest.mark.parametrize("text", ["Über die Brücke.", "日本語のテキスト", "🙂👍🏽 emoji 👩‍👩‍👧", "plain words here"])
def test_deltas_join_to_the_whole_text_and_hold_no_half_character(tokenizer, text):
    prompt = tokenizer("Once upon a time").input_ids
    ids = tokenizer(text, add_special_tokens=False).input_ids
    deltas, rest, _ = feed(Detokenizer(tokenizer, prompt), ids)
    assert "".join(deltas) + rest == tokenizer.decode(prompt + ids, skip_special_tokens=True)[len("Once upon a time") :]
    assert "".join(deltas).strip() == text
    assert not any(REPLACEMENT in delta for delta in deltas)


@pytest.mark.parametrize("backbone", ["stories260K", "pedro-nano"])
def test_a_learned_answer_reads_as_it_was_written(backbone):
    """Chat's answers began with a space that the data did not have, where the tokenizer puts one before each word."""
    tokenizer = load_tokenizer(resolve_backbone(backbone))
    prompt = encode_prompt(tokenizer, "user: Hi there\nassistant:")
    for answer in ("play music", "Yes.", " spaced", "two\nlines", "日本 🙂", "3", "x", "  two", "\nline", "'quoted'"):
        ids = encode_completion(tokenizer, answer)
        request = Request("r", prompt, apart=True)
        deltas, rest, _ = feed(Detokenizer(tokenizer, request.text_before), ids)
        assert "".join(deltas) + rest == answer
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer, "what scoring compares"


def test_an_unfinished_character_comes_out_only_at_the_end(tokenizer):
    ids = tokenizer("ab🙂", add_special_tokens=False).input_ids[:-1]
    deltas, rest, _ = feed(Detokenizer(tokenizer, []), ids)
    assert "".join(deltas) == "ab"
    assert set(rest) == {REPLACEMENT}


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(tokenizer):
    broken = tokenizer.convert_tokens_to_ids("<0xFF>")
    word = tokenizer(" word", add_special_tokens=False).input_ids
    deltas, rest, _ = feed(Detokenizer(tokenizer, []), [broken] * 20 + word)
    assert "".join(deltas[:20]), "given out before the end"
    assert ("".join(deltas) + rest).strip(REPLACEMENT + " ") == "word"


def test_a_stop_text_is_found_across_token_borders():
    detokenizer = Detokenizer(Pieces("so", " be", " it E", "N", "D of", " it"), [], stop=("END",))
    deltas, rest, stopped = feed(detokenizer, range(6))
    assert (deltas, rest, stopped) == (["so", " be", " it ", "", ""], "", True)


def test_what_only_looked_like_a_stop_text_is_given_out():
    detokenizer = Detokenizer(Pieces("a E", "N", "T", " E"), [], stop=("END",))
    assert feed(detokenizer, range(4)) == (["a ", "", "ENT", " "], "E", False)


def test_a_stop_text_that_ends_within_the_least_tokens_is_text_and_one_that_ends_after_them_stops():
    detokenizer = Detokenizer(Pieces("a END", " b", " EN", "D c"), [], stop=("END",), min_tokens=3)
    assert feed(detokenizer, range(4)) == (["a END", " b", " ", ""], "", True)
    inside = Detokenizer(Pieces("xab", "z"), [], stop=("ab", "xaby"), min_tokens=1)
    assert feed(inside, range(2)) == (["", "xabz"], "", False)


def test_the_first_of_several_stop_texts_counts():
    detokenizer = Detokenizer(Pieces("one two", " three"), [], stop=("three", "two"))
    assert feed(detokenizer, range(2)) == (["one "], "", True)


def test_the_fast_stream_gives_what_the_plain_one_gives_token_by_token(tokenizer):
    class Plain:
        decode = staticmethod(tokenizer.decode)  # without a Rust backend to be found

    words = tokenizer("Lily's 🙂 dog — über 5 µm — ran.\n\tThe  end", add_special_tokens=False).input_ids
    broken = tokenizer.convert_tokens_to_ids(["<0xFF>", "<0xF0>", "<0x9F>"])
    ids = [*words, tokenizer.eos_token_id, *words, *broken, *words, *[tokenizer.eos_token_id] * 20, *words[:12]]
    assert feed(Detokenizer(tokenizer, words[:3]), ids) == feed(Detokenizer(Plain(), words[:3]), ids)


def test_special_tokens_give_no_text_and_hold_up_none(tokenizer):
    word = tokenizer(" word", add_special_tokens=False).input_ids
    ids = [*word, *[tokenizer.eos_token_id] * 30, *word]
    deltas, rest, _ = feed(Detokenizer(tokenizer, tokenizer("a").input_ids), ids)
    assert (("".join(deltas) + rest).split(), rest) == (["word", "word"], "")


def test_a_character_that_the_prompt_begins_is_given_out_whole(tokenizer):
    ids = tokenizer("ab🙂 cd", add_special_tokens=False).input_ids
    cut = ids.index(tokenizer.convert_tokens_to_ids("<0x9F>")) + 1
    deltas, rest, _ = feed(Detokenizer(tokenizer, ids[:cut]), ids[cut:])
    assert "".join(deltas) + rest == "🙂 cd"


def test_a_decoder_that_takes_back_a_space_goes_on_with_what_is_new():
    backend = Tokenizer(models.WordLevel({"it": 0, " ": 1, "'": 2, "s": 3}, unk_token="it"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(" '", "'")])
    detokenizer = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), [0])
    deltas, rest, _ = feed(detokenizer, [1, 2, 3, 3, 0])
    assert ("".join(deltas) + rest).endswith("ssit")
