"""Models pulled from a hub: a small one of loopback that speaks as much of its API as a download asks."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest
from cli_commands import command_runner

from pedro.backbone import EMBEDDED, kept_backbones, resolve_backbone


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download of a model asks; breaks off the first download of the weights."""

    protocol_version = "HTTP/1.1"
    commit = "c" * 40
    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        source, path = EMBEDDED / "stories260K", self.path.partition("?")[0]
        files = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
        if path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name, "size": len(data), **self._lfs(name, data)} for name, data in files.items()]
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "1" * 40, **self._lfs(name, data)}
                for name, data in files.items()
            ]
            info = {"id": "someone/tiny", "sha": self.commit, "siblings": siblings, "cardData": {"license": "mit"}}
            return self._send(200, json.dumps(entries if "/tree/" in path else info).encode(), body)
        name = path.rpartition("/")[2]
        if f"/someone/tiny/resolve/{self.commit}/" not in path or name not in files:
            return self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        data, range_ = files[name], self.headers.get("Range")
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        if not body:
            return self._send(200, data, body, headers)
        type(self).asked.append(name)
        start = int(range_.removeprefix("bytes=").partition("-")[0]) if range_ else 0
        if range_:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = name == "model.safetensors" and self.server.breaks
        return self._send(206 if range_ else 200, data[start:], body, headers, cut)

    def _lfs(self, name, data):
        if not name.endswith(".safetensors"):
            return {}
        digest = hashlib.sha256(data).hexdigest() if not self.server.lies else "9" * 64
        return {"lfs": {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 130}}

    def _send(self, status, data, body, headers=None, cut=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.breaks = server.lies = False
    _Hub.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pull(home, monkeypatch, capfd):
    """`pedro backbones pull` in this process, from this hub instead of the one that was set when the library loaded."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))  # a second before each new try
    pedro = command_runner(monkeypatch, capfd)

    def pull(hub, what="someone/tiny"):
        address = _address(hub)
        for name, value in {
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(home.parent / "hf"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        }.items():
            monkeypatch.setattr(constants, name, value)
        status, out, err = pedro("backbones", "pull", what, "--json", HF_TOKEN="")
        return status, json.loads(out), err

    return pull


def _address(hub):
    return f"http://127.0.0.1:{hub.server_address[1]}" if hub else "http://127.0.0.1:9"


def _pull_from(hub, home):
    """The same in a process of its own, by the variables that a user sets."""
    names = ("HF_ENDPOINT", "HF_HUB_DISABLE_XET", "HF_HOME", "HF_HUB_DOWNLOAD_TIMEOUT")
    values = dict(zip(names, (_address(hub), "1", str(home.parent / "hf"), "5"), strict=True))
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        values[name] = ""
    command = [sys.executable, "-m", "pedro.cli", "backbones", "pull", "someone/tiny", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, **values})
    assert "Traceback" not in run.stderr, run.stderr
    return run.returncode, json.loads(run.stdout), run.stderr


def test_a_model_of_the_hub_is_kept_at_its_commit(home, hub, pull):
    status, said, err = _pull_from(hub, home)
    assert status == 0, err
    assert said["name"] == "tiny"
    origin = said["origin"]
    assert (origin["kind"], origin["source"], origin["revision"]) == ("hub", "someone/tiny", "c" * 40)
    assert origin["licence"] == "mit"
    assert resolve_backbone("tiny").digest == resolve_backbone("stories260K").digest
    assert not (home / "cache" / "backbones" / "hub-tiny").exists()
    asked = list(_Hub.asked)
    assert pull(hub)[1]["made"] is False
    assert _Hub.asked == asked


def test_a_pull_that_broke_off_keeps_the_files_that_came(hub, pull):
    hub.breaks = True
    status, said, _ = pull(hub)
    assert status == 1
    assert "someone/tiny' could not be fetched from the hub" in said["error"]["message"]
    assert "keeps the files that have come" in said["error"]["message"]
    assert kept_backbones() == []
    hub.breaks = False
    _Hub.asked = []
    status, _, err = pull(hub)
    assert status == 0, err
    assert set(_Hub.asked).isdisjoint({"config.json", "tokenizer_config.json"})


def test_a_file_of_the_hub_that_is_not_the_one_it_names_is_refused(hub, pull):
    hub.lies = True
    status, said, _ = pull(hub)
    assert status == 1
    assert "model.safetensors of someone/tiny has sha256 " in said["error"]["message"]
    assert f"not {'9' * 64}" in said["error"]["message"]
    assert kept_backbones() == []


def test_a_hub_id_without_a_connection_or_that_there_is_not_is_one_line(hub, pull):
    status, said, _ = pull(None)
    assert status == 1
    assert "backbone: 'someone/tiny' could not be fetched from the hub (" in said["error"]["message"]
    status, said, _ = pull(hub, "someone/else")
    assert status == 1
    assert "the hub has no model 'someone/else' that is open to you" in said["error"]["message"]
    assert kept_backbones() == []
