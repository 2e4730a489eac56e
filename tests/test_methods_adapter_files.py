"""Adapter directories: whole or not there, tied to one backbone, never trusted unchecked, never pickled."""

import errno
import json
import struct
import subprocess
import sys

import pytest
import torch
from methods_models import randomize, tiny_backbone, tokens
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pedro import adapter_directory
from pedro.adapter_check import check_adapter
from pedro.adapter_directory import (
    CONFIG,
    MANIFEST,
    WEIGHTS,
    config_digest,
    read_manifest,
    verify_adapter,
    weights_digest,
    write_manifest,
)
from pedro.errors import AdapterError, UnavailableError
from pedro.methods import get_method
from pedro.methods.adapter_files import read_config, save_adapter

BACKBONE = "sha256:" + "a" * 64
GIVEN = {
    "backbone": {"id": "tiny", "digest": BACKBONE, "tokenizer_digest": "sha256:t"},
    "method": {"name": "pedro", "options": {"r": 4}},
    "metrics": {"accuracy": 0.9},
}


def pedro_model():
    return randomize(get_method("pedro").apply(tiny_backbone(), {"r": 4})).eval()


@pytest.fixture
def adapter(tmp_path):
    save_adapter(pedro_model(), tmp_path / "adapter", GIVEN)
    return tmp_path / "adapter"


@torch.no_grad()
def test_what_is_saved_comes_back_to_the_bit_with_its_manifest(adapter):
    manifest = verify_adapter(adapter, BACKBONE)
    assert manifest["digest"] == weights_digest(adapter)
    assert manifest["format_version"] == 1
    assert manifest["trainable_parameters"] == sum(t.numel() for t in load_file(adapter / WEIGHTS).values())
    assert manifest["versions"].keys() >= {"torch", "transformers", "peft"}
    assert manifest["created"].endswith("+00:00")
    assert {key: manifest[key] for key in GIVEN} == GIVEN
    again = PeftModel.from_pretrained(tiny_backbone(), adapter)
    assert torch.equal(again(tokens()).logits, pedro_model()(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "ia3", "para"])
def test_other_methods_share_the_format(tmp_path, name):
    method = get_method(name)
    model = method.apply(tiny_backbone()).eval()
    for _, p in method.parameter_groups(model)[0]:
        p.add_(0.1)
    save_adapter(model, tmp_path / "adapter", {**GIVEN, "method": {"name": name, "options": {}}})
    verify_adapter(tmp_path / "adapter", BACKBONE)
    again = method.wrap(PeftModel.from_pretrained(tiny_backbone(), tmp_path / "adapter"))
    prompt_lens = torch.tensor([3, 3])
    assert torch.equal(again(tokens(), prompt_lens=prompt_lens).logits, model(tokens(), prompt_lens=prompt_lens).logits)


@torch.no_grad()
def test_full_fine_tuning_is_saved_as_a_transformers_directory(tmp_path):
    model = get_method("full").apply(tiny_backbone())
    digest = save_adapter(model, tmp_path / "full", GIVEN)
    assert verify_adapter(tmp_path / "full", BACKBONE)["digest"] == digest
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "full")(tokens()).logits, model(tokens()).logits)


def test_the_directory_holds_the_adapter_only_and_no_pickle(adapter):
    assert {path.name for path in adapter.iterdir()} == {WEIGHTS, "adapter_config.json", MANIFEST, "README.md"}
    assert all(".pedro_" in name or ".modulation." in name for name in load_file(adapter / WEIGHTS))
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "PEDRO"


def test_the_digest_depends_on_values_names_types_and_shapes_but_not_on_order(tmp_path):
    def digest_of(tensors: dict) -> str:
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return weights_digest(tmp_path)

    one, two = torch.arange(6.0).view(2, 3), torch.ones(4)
    first = digest_of({"one": one, "two": two})
    assert first == digest_of({"two": two, "one": one})
    changed = one.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        {"one": changed, "two": two},
        {"one": one.view(3, 2), "two": two},
        {"uno": one, "two": two},
        {"one": one.to(torch.int32), "two": two},
        {"one": one},
        {"one": one, "two": two.to(torch.bfloat16)},
    ]
    assert len({first, *map(digest_of, others)}) == 7


def test_the_digest_is_the_same_wherever_it_is_computed(adapter):
    import hashlib

    total = hashlib.sha256()
    for name, tensor in sorted(load_file(adapter / WEIGHTS).items()):
        total.update(json.dumps([name, "F32", list(tensor.shape)]).encode())
        total.update(tensor.numpy().tobytes())
    assert weights_digest(adapter) == f"sha256:{total.hexdigest()}"


def test_another_backbone_is_refused_with_both_digests(adapter):
    other = "sha256:" + "b" * 64
    with pytest.raises(AdapterError) as caught:
        verify_adapter(adapter, other)
    assert BACKBONE in caught.value.message
    assert other in caught.value.message


def test_tampered_weights_are_refused_with_both_digests(adapter):
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1e-6
    save_file(tensors, adapter / WEIGHTS)
    expected = read_manifest(adapter)["digest"]
    with pytest.raises(AdapterError) as caught:
        verify_adapter(adapter, BACKBONE)
    assert expected in caught.value.message
    assert weights_digest(adapter) in caught.value.message


def test_a_changed_config_is_refused_with_both_digests(adapter):
    config = (adapter / CONFIG).read_text()
    (adapter / CONFIG).write_text(config.replace('"pool": "last"', '"pool": "max"'))
    assert (adapter / CONFIG).read_text() != config
    with pytest.raises(AdapterError) as caught:
        verify_adapter(adapter, BACKBONE)
    assert caught.value.param == "config_digest"
    assert read_manifest(adapter)["config_digest"] in caught.value.message
    assert config_digest(adapter) in caught.value.message


@pytest.mark.parametrize("field", ["prompt_format", "method", "metrics", "data_digest"])
def test_a_changed_manifest_is_refused_whichever_field_was_changed(adapter, field):
    changed = json.loads((adapter / MANIFEST).read_text()) | {field: {"id": "raw", "template": "x", "name": "lora"}}
    (adapter / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(AdapterError) as caught:
        verify_adapter(adapter, BACKBONE)
    assert caught.value.param == "manifest_digest"
    assert changed["manifest_digest"] in caught.value.message


def test_a_manifest_that_was_only_laid_out_anew_is_taken(adapter):
    manifest = read_manifest(adapter)
    (adapter / MANIFEST).write_text(json.dumps(dict(reversed(manifest.items())), ensure_ascii=False))
    assert verify_adapter(adapter, BACKBONE) == manifest


@pytest.mark.parametrize("earlier", [("manifest_digest",), ("config_digest", "manifest_digest")])
def test_an_adapter_of_a_release_without_a_digest_is_still_taken(adapter, earlier):
    manifest = read_manifest(adapter)
    for field in earlier:
        del manifest[field]
    (adapter / MANIFEST).write_text(json.dumps(manifest))
    assert verify_adapter(adapter, BACKBONE) == manifest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": {}}, "backbone.id: expected text, got None"),
        ({"backbone": "tiny"}, "backbone: expected an object, got 'tiny'"),
        ({"backbone": {"id": ["tiny"], "digest": BACKBONE}}, "backbone.id: expected text"),
        ({"method": None}, "method: expected an object, got None"),
        ({"method": {"name": ["pedro"]}}, "method.name: expected text"),
        ({"method": {"name": "pedro", "options": []}}, "method.options: expected an object"),
        ({"digest": 3}, "digest: expected text, got 3"),
        ({"prompt_format": "chat"}, "prompt_format: expected an object"),
        ({"metrics": [1]}, "metrics: expected an object"),
    ],
)
def test_a_manifest_with_a_field_of_another_type_is_told(adapter, fields, message):
    (adapter / MANIFEST).write_text(json.dumps(read_manifest(adapter) | fields))
    with pytest.raises(AdapterError, match=message):
        verify_adapter(adapter, BACKBONE)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"peft_type": "NONE_SUCH"}', '{"peft_type": []}'])
def test_a_config_that_peft_does_not_take_is_told(adapter, text):
    (adapter / CONFIG).write_text(text)
    with pytest.raises(AdapterError, match=f"{CONFIG}: cannot be read"):
        read_config(adapter)


def test_a_folder_that_cannot_be_read_now_is_not_taken_unseen(adapter, monkeypatch):
    def full(_path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("os.scandir", full)
    with pytest.raises(OSError, match="Too many open files"):
        verify_adapter(adapter, None)


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "extra.pt", "deep/inside/state.PKL", "training_args.bin", "a.npy"]
)
def test_a_pickle_anywhere_is_refused(adapter, name):
    (adapter / name).parent.mkdir(parents=True, exist_ok=True)
    (adapter / name).write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match=r"may contain code \(pickle\)"):
        verify_adapter(adapter, BACKBONE)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST, "other.txt"])
def test_a_link_out_of_the_directory_is_refused(adapter, tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_bytes((adapter / name).read_bytes() if (adapter / name).exists() else b"secret")
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to(outside)
    with pytest.raises(AdapterError, match="is a link"):
        verify_adapter(adapter, BACKBONE)


def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path):
    save_adapter(get_method("full").apply(tiny_backbone()), tmp_path / "full", GIVEN)
    (tmp_path / "full" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../../elsewhere.safetensors"}})
    )
    with pytest.raises(AdapterError, match=r"elsewhere\.safetensors"):
        verify_adapter(tmp_path / "full", BACKBONE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("{", "cannot be read"),
        ("[]", "expected an object with"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "cannot be read"),
        ('{"format_version": 1}', "expected an object with"),
        ('{"format_version": 2, "digest": "", "backbone": {}, "method": {}}', "format_version 2 is not 1"),
    ],
)
def test_a_missing_or_broken_manifest_is_told(adapter, content, message):
    (adapter / MANIFEST).unlink()
    if content is not None:
        (adapter / MANIFEST).write_text(content)
    with pytest.raises(AdapterError, match=message):
        verify_adapter(adapter, BACKBONE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04}.",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 30_001) + b'{"a":' * 5000 + b"1" + b"}" * 5000,
        struct.pack("<Q", 2) + b"{}"[:1],
        struct.pack("<Q", 4) + b"[1]]",
        struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
        struct.pack("<Q", 62) + b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [-8, 3]}}',
    ],
)
def test_weights_that_are_no_safetensors_are_told(adapter, content):
    (adapter / WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match="damaged or not a safetensors"):
        verify_adapter(adapter, BACKBONE)


def test_an_adapter_without_weights_is_told(adapter):
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: not found"):
        verify_adapter(adapter, BACKBONE)


def test_saving_never_writes_over_another_adapter(adapter):
    before = weights_digest(adapter)
    with pytest.raises(AdapterError, match="exists already"):
        save_adapter(get_method("pedro").apply(tiny_backbone()), adapter, GIVEN)
    assert weights_digest(adapter) == before


def test_an_empty_directory_may_be_given(tmp_path):
    (tmp_path / "made").mkdir()
    save_adapter(pedro_model(), tmp_path / "made", GIVEN)
    verify_adapter(tmp_path / "made", BACKBONE)


class _DiskFull:
    """Lets some bytes be written to the disk and then has no more space, as the kernel does by a file size limit."""

    def __init__(self, limit: int) -> None:
        import resource
        import signal

        self._resource, self._limit = resource, limit
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def __enter__(self):
        self._before = self._resource.getrlimit(self._resource.RLIMIT_FSIZE)
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, (self._limit, self._before[1]))

    def __exit__(self, *exception):
        self._resource.setrlimit(self._resource.RLIMIT_FSIZE, self._before)


@pytest.mark.parametrize("limit", [0, 300, 5_000])
def test_nothing_is_left_when_the_disk_is_full(tmp_path, limit):
    model = pedro_model()
    with _DiskFull(limit), pytest.raises(UnavailableError, match="could not be written"):
        save_adapter(model, tmp_path / "adapter", GIVEN)
    assert list(tmp_path.iterdir()) == []
    save_adapter(model, tmp_path / "adapter", GIVEN)
    verify_adapter(tmp_path / "adapter", BACKBONE)


def test_nothing_is_left_when_the_manifest_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        save_adapter(pedro_model(), tmp_path / "adapter", {**GIVEN, "metrics": {"loss": float("nan")}})
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_cannot_be_told_another_digest(tmp_path):
    digest = save_adapter(pedro_model(), tmp_path / "adapter", {**GIVEN, "digest": "sha256:0", "format_version": 9})
    assert read_manifest(tmp_path / "adapter")["digest"] == digest
    assert read_manifest(tmp_path / "adapter")["format_version"] == adapter_directory.FORMAT_VERSION


WITHOUT_TORCH = """
import sys
from pedro.adapter_check import check_adapter
import pedro.training.job
check_adapter(sys.argv[1])
assert not {"torch", "transformers", "peft"} & sys.modules.keys()
"""


def test_an_adapter_is_checked_for_registration_without_torch_or_peft(adapter):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.5])
def test_numbers_that_are_not_finite_are_found_in_every_dtype(adapter, dtype, value):
    numbers = torch.tensor([0.0, -1.0, value]).to(getattr(torch, dtype))
    finite = bool(torch.isfinite(numbers.float()).all())
    save_file({"weight": numbers}, adapter / WEIGHTS)
    write_manifest(adapter, GIVEN)
    if finite:
        assert check_adapter(adapter)["backbone"] == GIVEN["backbone"]
    else:
        with pytest.raises(AdapterError, match="weight contains numbers that are not finite"):
            check_adapter(adapter)
