"""`pedro adapters import` of a folder that PEFT alone wrote: registered as it is, or refused whole."""

import json
import shutil

import pytest
import torch
from cli_commands import command_runner
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving_adapters import backbone, settings_at

from pedro.backbone import load_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=True),
    "alora": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
    "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Folders as `save_pretrained` of PEFT leaves them."""
    folder = tmp_path_factory.mktemp("stock")
    for name, config in CONFIGS.items():
        get_peft_model(load_model(backbone()), config).save_pretrained(str(folder / name))
    return folder


@pytest.fixture
def pedro(tmp_path, monkeypatch, capfd):
    settings_at(tmp_path / "home")
    for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "RAY_ADDRESS", "PEDRO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    return command_runner(monkeypatch, capfd)


def one_value(result, status=0):
    """Assert the exit status and that standard output is one JSON value; gives the value."""
    assert result[0] == status, result[2]
    return json.loads(result[1])


def one_error(result, *parts):
    """Assert exit status 1 and that standard error ends in one message that holds `parts`; gives the message."""
    status, _, err = result
    assert status == 1, err
    message = err.partition("error: ")[2]
    assert message
    for part in parts:
        assert part in message
    return message


def imported(pedro, directory, *options):
    return pedro("adapters", "import", "acme.new", directory, "--backbone", "stories260K", *options, "--json")


def _declare(file, tensors, rank):
    """Write weights of that rank of which the header alone is there; the numbers are a hole of the file."""
    heads, end = {}, 0
    for name, tensor in tensors.items():
        shape = [rank if size == 4 else size for size in tensor.shape]
        heads[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * shape[0] * shape[1]]}
    header = json.dumps(heads).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(stream.tell() + end)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_peft_wrote_is_registered_with_its_own_weights(name, pedro, stock, tmp_path):
    result = imported(pedro, stock / name, "--format", "chat")
    assert one_value(result)["aliases"] == ["candidate"]
    assert "cannot be known" in result[2]
    pedro("adapters", "export", "acme.new@candidate", tmp_path / "out")
    before, after = load_file(stock / name / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_folder_that_is_not_whole_or_not_served_is_refused_and_nothing_is_registered(pedro, stock, tmp_path):
    def bad(what):
        return shutil.copytree(stock / "lora", tmp_path / what)

    one_error(pedro("adapters", "import", "acme.new", stock / "lora"), "--backbone")
    one_error(imported(pedro, stock / "lora", "--format", "odd"), "'odd'")
    short = bad("short")
    (short / WEIGHTS).write_bytes((short / WEIGHTS).read_bytes()[:-9])
    one_error(imported(pedro, short), WEIGHTS, "damaged")
    pickled = bad("pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    one_error(imported(pedro, pickled), "adapter_model.bin", "safe_serialization")
    linked = bad("linked")
    (linked / WEIGHTS).unlink()
    (linked / WEIGHTS).symlink_to(stock / "lora" / WEIGHTS)
    one_error(imported(pedro, linked), "is a link")
    for what, change, said in (
        ("nan", lambda tensor: tensor * float("nan"), "not finite"),
        ("wide", lambda tensor: torch.cat([tensor, tensor]), "has shape"),
    ):
        save_file({k: change(v) for k, v in load_file(stock / "lora" / WEIGHTS).items()}, bad(what) / WEIGHTS)
        one_error(imported(pedro, tmp_path / what), said)
    tensors = load_file(stock / "lora" / WEIGHTS)
    stray = {key.replace("q_proj", "k_proj"): torch.zeros(tensor.shape) for key, tensor in tensors.items()}
    save_file({**tensors, **stray}, bad("stray") / WEIGHTS)
    one_error(imported(pedro, tmp_path / "stray"), "k_proj.lora_A", "does not name")
    wide = {"r": 100_000}
    config = json.loads((bad("huge") / CONFIG).read_text())
    (tmp_path / "huge" / CONFIG).write_text(json.dumps(config | wide))
    _declare(tmp_path / "huge" / WEIGHTS, tensors, wide["r"])
    one_error(imported(pedro, tmp_path / "huge"), "more than the", "of stories260K")
    with (bad("padded") / WEIGHTS).open("ab") as stream:
        stream.truncate(1 << 34)  # sparse: nobody may read it
    one_error(imported(pedro, tmp_path / "padded"), "holds more than")
    for field, value in (("alora_invocation_tokens", []), ("use_dora", True), ("a_field_of_tomorrow", 3)):
        config = json.loads((bad(field) / CONFIG).read_text())
        (tmp_path / field / CONFIG).write_text(json.dumps(config | {field: value}))
        one_error(imported(pedro, tmp_path / field), field)
    assert one_value(pedro("adapters", "list", "--json")) == []
