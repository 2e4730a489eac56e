"""Backbones: damaged directories, devices and dtypes that there are not, digests that must stay."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pedro.adapter_directory import check_tokenizer
from pedro.backbone import (
    EMBEDDED,
    check_tokenizer_files,
    context_length,
    load_model,
    load_tokenizer,
    locate_backbone,
    resolve_backbone,
)
from pedro.backbone_files import MODEL_TYPES
from pedro.errors import AdapterError, BackboneError, ConfigError
from pedro.methods.architectures import LAYOUTS


@pytest.fixture
def directory(tmp_path):
    """A copy of a packaged backbone, to be damaged."""
    return shutil.copytree(EMBEDDED / "stories260K", tmp_path / "mine")


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "load", "what"),
    [
        ("tokenizer.json", load_tokenizer, "tokenizer"),
        ("tokenizer.json", check_tokenizer_files, "tokenizer"),
        ("config.json", load_tokenizer, "config.json"),
        ("config.json", load_model, "config.json"),
        ("config.json", context_length, "config.json"),
        ("model.safetensors", load_model, "model"),
    ],
)
def test_a_truncated_file_of_a_backbone_is_told_in_one_line(directory, name, load, what):
    _cut(directory / name)
    with pytest.raises(BackboneError, match=rf"the {what} of '.*mine' cannot be loaded \(.*\); copy or save") as told:
        load(resolve_backbone(str(directory)))
    assert "\n" not in told.value.message


def test_a_backbone_with_a_truncated_tokenizer_config_does_not_resolve(directory):
    _cut(directory / "tokenizer_config.json")
    with pytest.raises(BackboneError, match=r"the tokenizer_config\.json of .* cannot be loaded"):
        resolve_backbone(str(directory))


@pytest.mark.parametrize("read", [load_tokenizer, check_tokenizer_files])
def test_a_backbone_without_tokenizer_files_is_told_in_one_line(directory, read):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BackboneError, match=r"the tokenizer of .* cannot be loaded") as told:
        read(resolve_backbone(str(directory)))
    assert "\n" not in told.value.message


@pytest.mark.parametrize("device", ["xyz", "cuda:x", "cuda:99"])
def test_a_device_that_there_is_not_is_refused_before_anything_is_loaded(directory, device):
    _cut(directory / "model.safetensors")
    with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used: .*; choose cpu") as told:
        load_model(resolve_backbone(str(directory)), device=device)
    assert "\n" not in told.value.message


@pytest.mark.parametrize("dtype", ["float33", "nn"])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ConfigError, match=f"dtype: '{dtype}' is none of float32, bfloat16, float16"):
        load_model(resolve_backbone("stories260K"), dtype)


def test_the_packaged_backbone_of_committed_results_is_unchanged():
    assert (
        resolve_backbone("pedro-nano").digest
        == "sha256:f32dc52c7246d30a6ba14d8925507c45d4e8456c3ce4c716dfc4f9d4f7342111"
    )


def _edit(directory, file="config.json", **changes):
    """Change keys of a JSON file; None takes one out."""
    path = directory / file
    tree = {**(json.loads(path.read_text()) if path.is_file() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def _lfs(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def _pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _adapter(directory):
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lfs, r"a Git LFS pointer in place of model\.safetensors; run `git lfs pull`"),
        (_pickled, r"holds pytorch_model\.bin \(pickle\), .* python -c \"import sys; .*save_pretrained"),
        (_adapter, r"is an adapter, not a backbone; give the backbone that it was trained on \(owner/base\)"),
        (lambda d: _edit(d, auto_map={"AutoModelForCausalLM": "m.M"}), r"needs code of its own \(auto_map in config"),
        (
            lambda d: _edit(d, "tokenizer_config.json", auto_map={"AutoTokenizer": ["t.T", None]}),
            r"auto_map in tokeniz",
        ),
        (
            lambda d: _edit(d, quantization_config={"quant_method": "gptq"}),
            r"is quantised by gptq, which needs gptqmodel, .* use",
        ),
        (lambda d: _edit(d, quantization_config={"quant_method": "awq"}), r"by awq, which needs gptqmodel"),
        (lambda d: _edit(d, quantization_config={"quant_method": "bitsandbytes"}), r"which needs bitsandbytes"),
        (
            lambda d: _edit(d, model_type="mixtral"),
            r"the architecture 'mixtral', which is not supported; use one of gem",
        ),
        (lambda d: _edit(d, model_type="t5", is_encoder_decoder=True), r"'t5' \(an encoder-decoder\), which is not"),
        (lambda d: _edit(d, model_type=None), r"the architecture None"),
        (lambda d: _edit(d, hidden_size=10**12), r"hidden_size 1000000000000 .* from 1 to 131,072"),
        (lambda d: _edit(d, num_hidden_layers=10**9), r"num_hidden_layers"),
        (lambda d: _edit(d, vocab_size="512"), r"vocab_size '512'"),
        (
            lambda d: (d / "config.json").write_text('{"a":' + "[" * 100 + "]" * 100 + "}"),
            r"config\.json .* cannot be loaded \(nested too deep",
        ),
        (
            lambda d: (d / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"),
            r"pointer in place of tokenizer\.json",
        ),
        (
            lambda d: (d / "model.safetensors").rename(d / "consolidated.safetensors"),
            r"holds no config\.json with model\.safetensors or",
        ),
        (lambda d: _edit(d, model_type="from-tomorrow"), r"the architecture 'from-tomorrow'"),
        (lambda d: _edit(d, model_type=["llama"]), r"the architecture \['llama'\]"),
        (
            lambda d: (d / "config.json").write_text("[" * 100_000),
            r"config\.json .* cannot be loaded \(nested too deep",
        ),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json .*expected an object, got list"),
        (lambda d: (d / "config.json").write_text(" " * 5_000_000), r"5,000,000 bytes are too many"),
    ],
)
def test_a_directory_that_no_loader_should_be_given_does_not_resolve(directory, damage, message):
    damage(directory)
    with pytest.raises(BackboneError, match=message) as told:
        resolve_backbone(str(directory))
    assert "\n" not in told.value.message


def _tensors(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != LAYER}, rf"lacks the tensor {LAYER}; copy or save"),
        (
            lambda t: {k.replace("up_proj", "upward"): v for k, v in t.items()},
            r"lacks .* and 4 more; it holds .*upward",
        ),
        (
            lambda t: {**t, LAYER: t[LAYER].index_fill(0, torch.tensor([3]), torch.nan)},
            rf"numbers in {LAYER} that are not",
        ),
        (lambda t: {**t, LAYER: t[LAYER] + torch.inf}, rf"numbers in {LAYER} that are not finite"),
        (
            lambda t: {**t, LAYER: t[LAYER][:-1].clone()},
            rf"has {LAYER} of shape \[171, 64\], but .* asks for \[172, 64\]",
        ),
        (
            lambda t: {**t, LAYER.replace("weight", "bias"): t[LAYER][:, 0].clone()},
            r"holds the tensor \S+up_proj\.bias, ",
        ),
        (
            lambda t: {**t, LAYER.replace("2", "5"): t[LAYER].clone()},
            r"holds the tensor model\.layers\.5\S+, for which",
        ),
    ],
)
def test_weights_that_are_not_all_there_are_refused_by_tensor_and_never_made_up(directory, change, message):
    _tensors(directory, change)
    with pytest.raises(BackboneError, match=message) as told:
        load_model(resolve_backbone(str(directory)))
    assert "\n" not in told.value.message


def test_a_doubled_prefix_is_understood_or_refused_but_no_weight_is_made_up(directory):
    whole = load_model(resolve_backbone(str(directory))).state_dict()
    _tensors(directory, lambda tensors: {f"model.{key}": tensor for key, tensor in tensors.items()})
    doubled = load_model(resolve_backbone(str(directory))).state_dict()
    assert all(torch.equal(doubled[key], tensor) for key, tensor in whole.items())
    _tensors(directory, lambda tensors: {f"model.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(BackboneError, match=r"lacks the tensor \S+ and \d+ more; it holds model\.model"):
        load_model(resolve_backbone(str(directory)))


def test_a_tied_head_that_is_not_in_the_file_is_not_missing(directory):
    _tensors(directory, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("lm_head")})
    model = load_model(resolve_backbone(str(directory)))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tied_head_may_be_in_the_file_too_and_an_old_rotary_buffer(directory):
    def more(tensors):
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        return {**tensors, **head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    _tensors(directory, more)
    load_model(resolve_backbone(str(directory)))


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_weights_are_checked_like_whole_ones(tmp_path, tied):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    made = LlamaForCausalLM(config)
    made.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded = load_model(resolve_backbone(str(tmp_path)))
    assert all(torch.equal(there, here) for there, here in zip(made.parameters(), loaded.parameters(), strict=True))
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(BackboneError, match=rf"lacks {shard.name} of model\.safetensors\.index\.json"):
        resolve_backbone(str(tmp_path))


def test_weights_that_a_dtype_cannot_hold_are_refused(directory):
    _tensors(directory, lambda t: {**t, LAYER: t[LAYER].index_fill(0, torch.tensor([3]), 1e30)})
    load_model(resolve_backbone(str(directory)), "bfloat16")
    with pytest.raises(BackboneError, match=rf"numbers in {LAYER} that are not finite .* as float16"):
        load_model(resolve_backbone(str(directory)), "float16")


def test_the_command_that_converts_a_pickle_does(directory, monkeypatch):
    directory = directory.rename(directory.parent / "it's mine")
    before = load_model(resolve_backbone(str(directory)))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="pickle") as told:
        resolve_backbone(str(directory))
    python, option, code, argument = shlex.split(told.value.message.partition("trust it: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", [option, argument])
    exec(code, {})
    after = load_model(resolve_backbone(str(directory)))
    assert all(torch.equal(there, here) for there, here in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.parametrize("read", [load_tokenizer, check_tokenizer_files])
def test_a_token_added_without_an_embedding_is_refused(directory, read):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(BackboneError, match="ids up to 512, but the embedding has 512 rows"):
        read(resolve_backbone(str(directory)))


@pytest.mark.parametrize("read", [load_tokenizer, check_tokenizer_files])
def test_a_tokenizer_without_a_token_that_ends_or_pads_is_refused(directory, read):
    _edit(directory, "tokenizer_config.json", eos_token=None, pad_token=None)
    with pytest.raises(BackboneError, match="neither an eos_token nor a pad_token"):
        read(resolve_backbone(str(directory)))


WITHOUT_TRANSFORMERS = """
import sys
from pedro.backbone import check_tokenizer_files, embedded_backbones, resolve_backbone
for name in embedded_backbones():
    check_tokenizer_files(resolve_backbone(name))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def test_a_tokenizer_of_the_usual_kind_is_checked_without_importing_transformers():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("added", [{"600": {"content": "<more>"}}, ["<more>"]])
def test_a_tokenizer_whose_config_names_more_tokens_is_left_to_transformers(directory, added, monkeypatch):
    _edit(directory, "tokenizer_config.json", added_tokens_decoder=added)
    asked = []
    monkeypatch.setattr("pedro.backbone.load_tokenizer", asked.append)
    check_tokenizer_files(resolve_backbone(str(directory)))
    assert len(asked) == 1


def test_a_path_is_located_and_a_name_is_not(tmp_path):
    for place in ("specs/models/mine", "here/models/mine", "here/other"):
        (tmp_path / place).mkdir(parents=True)
    bases = (tmp_path / "specs", tmp_path / "here")
    for name in ("stories260K", "owner/name", "nothere"):
        assert locate_backbone(name, *bases) == name
    assert locate_backbone("models/mine", *bases) == str(tmp_path / "specs/models/mine")
    assert locate_backbone("other", *bases) == str(tmp_path / "here/other")
    assert locate_backbone("./nothere", *bases) == str(tmp_path / "specs/nothere")


@pytest.mark.parametrize("read", [load_tokenizer, check_tokenizer_files])
def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(directory, read):
    _edit(directory, vocab_size=500)
    with pytest.raises(BackboneError, match=r"makes ids up to 511, but the embedding has 500 rows"):
        read(resolve_backbone(str(directory)))


def _swap_two_entries(directory):
    tree = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    a, b = list(vocabulary)[400:402]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (directory / "tokenizer.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "change",
    [
        _swap_two_entries,
        lambda d: _edit(d, "tokenizer_config.json", bos_token="<unk>"),
        lambda d: _edit(d, "tokenizer_config.json", add_bos_token=True),
        lambda d: _edit(d, "tokenizer_config.json", pad_token="<unk>"),
        lambda d: _edit(d, "tokenizer_config.json", chat_template="{{ 1 }}"),
        lambda d: (d / "chat_template.jinja").write_text("{{ 1 }}"),
        lambda d: (d / "vocab.json").write_text("{}"),
        lambda d: (d / "merges.txt").write_text("a b"),
    ],
)
def test_the_tokenizers_digest_covers_all_that_decides_ids(directory, change):
    before = resolve_backbone(str(directory))
    change(directory)
    after = resolve_backbone(str(directory))
    assert after.tokenizer_digest != before.tokenizer_digest
    assert after.digest == before.digest


def test_what_decides_no_ids_is_not_in_the_tokenizers_digest(directory):
    before = resolve_backbone(str(directory)).tokenizer_digest
    _edit(directory, "tokenizer_config.json", model_max_length=7, padding_side="right", name_or_path="x")
    assert resolve_backbone(str(directory)).tokenizer_digest == before


def test_an_adapter_of_another_tokenizer_is_refused_with_both_digests_and_old_digests_are_still_known(directory):
    backbone = resolve_backbone(str(directory))
    old = {"backbone": {"tokenizer_digest": backbone.tokenizer_digest_v1}}
    for manifest in (old, {"backbone": {"tokenizer_digest": backbone.tokenizer_digest}}, {"backbone": {}}):
        check_tokenizer(manifest, backbone.tokenizer_digests)
    _swap_two_entries(directory)
    changed = resolve_backbone(str(directory))
    with pytest.raises(AdapterError, match=rf"{backbone.tokenizer_digest_v1}.*{changed.tokenizer_digest}"):
        check_tokenizer(old, changed.tokenizer_digests)


def test_the_old_tokenizer_digest_of_packaged_backbones_is_what_committed_adapters_say():
    assert resolve_backbone("stories260K").tokenizer_digest_v1 == (
        "sha256:8c961496d45a5469e26aa88a4a97a6dd1a7f48bf404f048be51c11b950a0aa67"
    )


def test_what_resolves_is_what_the_methods_know():
    assert set(MODEL_TYPES) == set(LAYOUTS)
