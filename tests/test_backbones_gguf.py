"""GGUF files: what is made of them, and what of a stranger's file is refused."""

import random
import struct

import pytest
import torch
from gguf_files import ENDLESS, MERGES, TEMPLATE, TOKENS, tiny, write_gguf

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.backbones.gguf_file import check_gguf
from pedro.backbones.gguf_header import read_header
from pedro.backbones.kept import read_origin
from pedro.backbones.pull import add
from pedro.errors import BackboneError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def _silent(_line):
    pass


def _refused(home, path, *, like):
    """Assert that the file is refused in one line that is like this, and that nothing is kept."""
    with pytest.raises(BackboneError, match=like) as told:
        add(home, path, _silent, "mine")
    assert "\n" not in told.value.message
    assert len(told.value.message) < 600
    left = [entry.name for entry in (home / "backbones").glob("*")] if home.is_dir() else []
    assert all(name.endswith(".lock") for name in left), left


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_a_gguf_file_gives_the_logits_of_its_dequantised_weights(home, tmp_path, kind):
    model = tiny()
    weights = write_gguf(tmp_path / "tiny.gguf", model, kind)
    kept = add(home, tmp_path / "tiny.gguf", _silent)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    ids = torch.randint(0, len(TOKENS), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(load_model(resolve_backbone("tiny"))(ids).logits, model(ids).logits)
    origin = read_origin(kept.directory)
    assert (origin.kind, origin.file, origin.licence) == ("gguf", "tiny.gguf", "apache-2.0")
    assert origin.quantisation.startswith(kind)
    assert origin.versions["gguf"]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2", "phi3", "gpt2"])
def test_other_architectures_of_gguf_give_their_own_logits(home, tmp_path, model_type):
    model = tiny(model_type)
    weights = write_gguf(tmp_path / "tiny.gguf", model, "F16")
    add(home, tmp_path / "tiny.gguf", _silent)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    ids = torch.randint(0, len(TOKENS), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(load_model(resolve_backbone("tiny"))(ids).logits, model(ids).logits)


def test_the_tokenizer_and_the_chat_template_come_with_the_weights(home, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny())
    add(home, tmp_path / "tiny.gguf", _silent)
    tokenizer = load_tokenizer(resolve_backbone("tiny"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.chat_template == TEMPLATE
    ids = tokenizer("<|im_start|>hello there 12", add_special_tokens=False).input_ids
    assert [TOKENS[i] for i in ids[:3]] == ["<|im_start|>", "hel", "l"]
    assert [TOKENS[i] for i in ids[-3:]] == ["Ġ", "1", "2"]  # SmolLM2 takes digits one by one
    assert tokenizer.decode(ids) == "<|im_start|>hello there 12"


def test_the_same_file_gives_the_same_digests_wherever_it_lies(home, tmp_path):
    model = tiny()
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "tiny.gguf", tmp_path / "other" / "x.gguf"):
        write_gguf(path, model, "Q8_0")
    one, other = (add(home, path, _silent).name for path in (tmp_path / "tiny.gguf", tmp_path / "other" / "x.gguf"))
    assert resolve_backbone(one).digest == resolve_backbone(other).digest
    assert resolve_backbone(one).tokenizer_digest == resolve_backbone(other).tokenizer_digest


@pytest.mark.parametrize(
    ("changes", "like"),
    [
        (
            {"general__architecture": "mamba"},
            r"of the architecture 'mamba', which is not supported; take a file of gemm",
        ),
        ({"split__count": 3}, "is one part of several; join them"),
        ({"split__count": "three"}, "is one part of several; join them"),
        ({"llama__rope__scaling__type": "yarn"}, r"scales its rotary positions \(rope\.scaling 'yarn'\)"),
        ({"extra": ["rope_freqs.weight"]}, "scales its rotary positions"),
        ({"extra": ["blk.0.attn_q.bias"]}, r"holds the tensor 'blk\.0\.attn_q\.bias', for which llama has no place"),
        ({"skip": ["blk.1.ffn_up.weight"]}, r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"llama__feed_forward_length": 128}, r"has model\.layers\.0\.mlp.* of shape \[.*\], not \[.*\]"),
        ({"llama__block_count": 4_000_000}, r"has num_hidden_layers 4000000 in config\.json"),
        ({"llama__embedding_length": None}, "does not hold what its architecture needs|of shape"),
        ({"tokenizer__ggml__model": "rwkv"}, r"tokenizer that cannot be rebuilt \(of the kind 'rwkv'\)"),
        ({"tokenizer__ggml__pre": "unheard-of"}, r"splits text as 'unheard-of' does, which is not known"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], TOKENS[5]]}, "tokenizer that cannot be rebuilt"),
        ({"tokenizer__ggml__merges": ["q z z", *MERGES]}, "tokenizer that cannot be rebuilt"),
        ({"tokenizer__ggml__bos_token_id": 9_999}, "tokenizer that cannot be rebuilt"),
        ({"tokenizer__ggml__eos_token_id": None}, r"names no end of text \(tokenizer\.ggml\.eos_token_id\)"),
        ({"tokenizer__ggml__tokens": TOKENS[:-20]}, "of shape|tokenizer that cannot be rebuilt"),
        ({"tokenizer__chat_template": ENDLESS}, "prompt format|template"),
        ({"tokenizer__chat_template": "{% for"}, "prompt format|template"),
        ({"tokenizer__chat_template": "x" * 3_000_000}, r"a text of 3,000,000 bytes where at most 2,000,000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_gguf_file_that_would_become_another_model_is_refused(home, tmp_path, changes, like):
    write_gguf(tmp_path / "bad.gguf", tiny(), **changes)
    _refused(home, tmp_path / "bad.gguf", like=like)


def test_an_unknown_quantisation_is_refused_by_name(home, tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(path, tiny(), "Q8_0")
    data = path.read_bytes()
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    for kind, name in ((15, "Q8_K"), (9, "Q8_1"), (77, "77")):
        path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4 :])
        _refused(home, path, like=f"is quantised as {name}, which cannot be read; take a file of Q8_0")


def test_a_truncated_file_is_refused_wherever_it_ends(home, tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(path, tiny(), "Q4_1")
    data = path.read_bytes()
    for size in (0, 3, 4, 20, 400, 5_000, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        _refused(home, path, like=r"is cut short|is no GGUF file")


def test_a_header_that_promises_too_much_costs_nothing(tmp_path):
    path = tmp_path / "bad.gguf"
    for tensors, entries in ((2**63, 1), (1, 2**63), (60_000, 1), (2**32, 2**32)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + bytes(200))
        with pytest.raises(BackboneError, match=r"at most|cut short"):
            read_header(path)
    array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**60)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array + bytes(200))
    with pytest.raises(BackboneError, match=r"says it has 1,152,921,504,606,846,976 items"):
        read_header(path)


def test_tensors_that_share_their_bytes_are_refused(home, tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(path, tiny(), "F16")
    data = bytearray(path.read_bytes())
    for block in range(2):
        for name in ("attn_output", "ffn_up", "ffn_gate", "ffn_down", "attn_q", "attn_k", "attn_v"):
            text = f"blk.{block}.{name}.weight".encode()
            at = data.index(text) + len(text) + 4
            data[at : at + 16] = struct.pack("<QQ", 96, 40_000)
    path.write_bytes(data)
    _refused(home, path, like="is cut short")


def test_any_damage_to_a_header_is_one_error(tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(path, tiny(), "Q8_0")
    data, chance = path.read_bytes(), random.Random(0)
    head = read_header(path)
    end = len(data) - head.data_bytes
    refused = []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            damaged[chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            check_gguf(path)
        except BackboneError as error:
            refused.append(error.message)
    assert len(refused) > 100
    assert not any("\n" in message for message in refused)
