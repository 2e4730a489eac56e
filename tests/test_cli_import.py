"""`pedro adapters import` of a folder that PEFT alone wrote: registered as it is, or refused whole."""

import json
import shutil
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest
import torch
from cli_commands import command_runner
from peft import IA3Config, LoraConfig, MissConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving_adapters import backbone, settings_at

from pedro.backbone import load_model
from pedro.methods.reft import ReftConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=True),
    "alora": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
    "loreft": ReftConfig(r=2, task_type="CAUSAL_LM"),
    "miss": MissConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
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


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an import asks: one repository, `main` of which is at one commit."""

    commit = "c" * 40

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send(404, b"{}")

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        files = {file.name: file.read_bytes() for file in self.server.folder.iterdir()}
        entries = [{"type": "file", "path": f"sub/{n}", "size": len(d), "oid": "1" * 40} for n, d in files.items()]
        if path.startswith("/api/models/someone/tiny/tree/"):
            return self._send(200, json.dumps(entries).encode())
        if path.startswith("/api/models/someone/tiny"):
            return self._send(200, json.dumps({"id": "someone/tiny", "sha": self.commit, "siblings": []}).encode())
        name = path.removeprefix(f"/someone/tiny/resolve/{self.commit}/sub/")
        return self._send(200, files[name]) if name in files else self._send(404, b"{}")

    def _send(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(stock, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.folder, server.asked = stock / "lora", []
    options = {"endpoint": f"http://127.0.0.1:{server.server_address[1]}", "token": False}
    monkeypatch.setitem(fsspec.config.conf, "hf", options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def check_registered(pedro, stock, tmp_path):
    pedro("adapters", "export", "acme.new@candidate", tmp_path / "out")
    before, after = load_file(stock / "lora" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_adapter_is_imported_from_the_hub_at_one_commit(pedro, stock, hub, tmp_path):
    assert one_value(imported(pedro, "hf://someone/tiny/sub"))["aliases"] == ["candidate"]
    check_registered(pedro, stock, tmp_path)
    assert {path for path in hub.asked if "/resolve/" in path} == {
        f"/someone/tiny/resolve/{_Hub.commit}/sub/{name}" for name in (WEIGHTS, CONFIG, "README.md")
    }
    one_error(imported(pedro, "hf://someone/none"), "hf://someone/none", "is not there")


def test_an_adapter_is_imported_from_a_bucket(pedro, stock, tmp_path):
    """`memory://` in place of `s3://`: both are file systems of fsspec."""
    place = f"memory://{uuid.uuid4().hex}/folder"
    bucket = fsspec.filesystem("memory")
    bucket.put(str(stock / "lora"), place, recursive=True)
    bucket.pipe_file(f"{place}/notes.txt", b"not of an adapter, so not fetched")
    one_value(imported(pedro, place))
    check_registered(pedro, stock, tmp_path)
    pedro("adapters", "export", "acme.new@candidate", tmp_path / "whole")
    bucket.put(str(tmp_path / "whole"), f"{place}-2", recursive=True)
    assert one_value(pedro("adapters", "import", "acme.again", f"{place}-2", "--json"))["aliases"] == ["candidate"]
    bucket.mv(f"{place}/{WEIGHTS}", f"{place}/adapter_model.bin")
    one_error(imported(pedro, place), "adapter_model.bin", "pickle", "safe_serialization")
    one_error(imported(pedro, f"{place}-none"), "is not there")
    one_error(imported(pedro, "nosuch://bucket/x"), "nosuch://bucket/x could not be read", "Protocol not known")


def test_what_pyreft_saved_is_refused_with_what_to_do(pedro, tmp_path):
    saved = tmp_path / "reft"
    saved.mkdir()
    (saved / "config.json").write_text(json.dumps({"intervention_types": ["LoreftIntervention"], "sorted_keys": []}))
    (saved / "intkey_layer.3.comp.block_output.unit.pos.nunit.1#0.bin").write_bytes(b"a pickle")
    one_error(imported(pedro, saved), "pyreft", "pickle", "loreft")


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
    save_file({}, bad("empty") / WEIGHTS)
    one_error(imported(pedro, tmp_path / "empty"), "holds no tensors")
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
    for kind, part in (("miss", "k_proj.miss_block"), ("lora", "k_proj.lora_A")):
        tensors = load_file(stock / kind / WEIGHTS)
        stray = {key.replace("q_proj", "k_proj"): torch.zeros(tensor.shape) for key, tensor in tensors.items()}
        shutil.copytree(stock / kind, tmp_path / f"stray-{kind}")
        save_file({**tensors, **stray}, tmp_path / f"stray-{kind}" / WEIGHTS)
        one_error(imported(pedro, tmp_path / f"stray-{kind}"), part, "does not name")
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


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": 0}, "r: expected a whole number > 0, got 0"),
        ({"r": True}, "r: expected a whole number > 0, got True"),
        ({"r": 65}, "r: expected at most 64, the inputs of self_attn.q_proj, got 65"),
        ({"r": 20_000, "init_weights": "mini", "mini_r": 1}, "r: expected at most 64"),
        ({"r": 64, "init_weights": "mini", "mini_r": 1, "target_modules": EVERY}, "opened for serving it has"),
        ({"init_weights": "mini", "mini_r": 3}, "mini_r: expected a divisor of the 64 outputs"),
    ],
)
def test_a_miss_of_which_a_few_numbers_would_be_many_or_none_is_refused(pedro, stock, tmp_path, changed, said):
    folder = shutil.copytree(stock / "miss", tmp_path / "odd")
    config = json.loads((folder / CONFIG).read_text()) | changed
    (folder / CONFIG).write_text(json.dumps(config))
    columns = config["mini_r"] if config["init_weights"] == "mini" else 64
    named = {
        f"{layer.partition('.self_attn.')[0]}.{part}.{name}.miss_block": torch.zeros(int(config["r"]), columns)
        for layer in load_file(stock / "miss" / WEIGHTS)
        for name in config["target_modules"]
        for part in ["self_attn" if name in EVERY[:4] else "mlp"]
        if ".self_attn." in layer
    }
    save_file(named, folder / WEIGHTS)
    one_error(imported(pedro, folder), said)
    assert one_value(pedro("adapters", "list", "--json")) == []
