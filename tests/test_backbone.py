"""Backbones: damaged directories, devices and dtypes that there are not, digests that must stay."""

import shutil

import pytest

from pedro.backbone import EMBEDDED, context_length, load_model, load_tokenizer, resolve_backbone
from pedro.errors import BackboneError, ConfigError


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
        ("config.json", load_tokenizer, "tokenizer"),
        ("config.json", load_model, "model"),
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


def test_a_backbone_without_tokenizer_files_is_told_in_one_line(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BackboneError, match=r"the tokenizer of .* cannot be loaded") as told:
        load_tokenizer(resolve_backbone(str(directory)))
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
