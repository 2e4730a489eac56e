"""`kubectl` as far as k8s/README.md types it, on the namespace of this host. Whatever else it is asked is an error."""

from __future__ import annotations

import io
import re
import shlex
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from kustomize import rendered

if TYPE_CHECKING:
    from integration.cluster import Namespace
    from integration.pods import LocalPod

NAMESPACE = "pedro"
UNITS = {"s": 1, "m": 60}


class Kubectl:
    """One namespace. `overlays` are renderings to use in place of a folder's, by its path in the repository."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.overlays: dict[str, list[dict[str, Any]]] = {}
        self.forwarded: dict[int, int] = {}  # a port of the guide: the one on this host

    def __call__(self, words: list[str], stdin: bytes, cwd: Path) -> bytes:
        """What it prints. Raises AssertionError for what fails."""
        line = shlex.join(words)
        if words[:1] == ["-n"]:
            assert words[1] == NAMESPACE, line
            words = words[2:]
        verbs: dict[str, Callable[[list[str], bytes, Path], bytes]] = {
            "apply": self._apply,
            "create": self._create,
            "wait": self._wait,
            "exec": self._exec,
            "port-forward": self._forward,
            "get": self._get,
            "cp": self._copy,
            "delete": self._delete,
        }
        assert words[0] in verbs, f"kubectl {line}: not played"
        return verbs[words[0]](words[1:], stdin, cwd)

    def _apply(self, words: list[str], _: bytes, cwd: Path) -> bytes:
        kind, place = words
        if kind == "-f":
            objects = list(yaml.safe_load_all((cwd / place).read_text("utf-8")))
        else:
            assert kind == "-k", kind
            objects = self.overlays.get(place) or rendered(cwd / place)
        self.namespace.apply(list(yaml.safe_load_all(yaml.safe_dump_all(objects))))
        return b"".join(f"{obj['kind'].lower()}/{obj['metadata']['name']} applied\n".encode() for obj in objects)

    def _create(self, words: list[str], stdin: bytes, _: Path) -> bytes:
        assert words[:2] == ["secret", "generic"], words
        option, place = words[3].rsplit("=", 1)
        assert place == "/dev/stdin", words
        assert len(words) == 4, words
        if option == "--from-env-file":
            values = dict(line.split("=", 1) for line in stdin.decode().splitlines())
        else:
            source, key = option.split("=")
            assert source == "--from-file", words
            values = {key: stdin.decode()}
        self.namespace.create_secret(words[2], values)
        return f"secret/{words[2]} created\n".encode()

    def _wait(self, words: list[str], _: bytes, __: Path) -> bytes:
        told = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
        assert told.keys() == {"for", "timeout"}, words
        (what,) = (word for word in words if not word.startswith("--"))
        limit_s = int(told["timeout"][:-1]) * UNITS[told["timeout"][-1]]
        self.namespace.wait(what, told["for"].removeprefix("condition="), limit_s)
        return f"{what} condition met\n".encode()

    def _exec(self, words: list[str], stdin: bytes, _: Path) -> bytes:
        if words[0] == "-i":
            words = words[1:]
        else:
            stdin = b""
        assert words[1] == "--", words
        done = self._pod(words[0]).run(self._pod(words[0]).container, words[2:], stdin)
        assert done.returncode == 0, f"{words}: {(done.stdout + done.stderr)[-3000:].decode(errors='replace')}"
        return done.stdout

    def _forward(self, words: list[str], _: bytes, __: Path) -> bytes:
        what, port = words
        name = what.removeprefix("svc/")
        self.forwarded[int(port)] = self.namespace.known.here.port(name, int(port))
        return f"Forwarding from 127.0.0.1:{port}\n".encode()

    def _get(self, words: list[str], _: bytes, __: Path) -> bytes:
        assert words[0] == "pod", words
        assert words[1] == "-l", words
        assert words[3:] == ["-o", "name"], words
        label, value = words[2].split("=")
        found = [name for name, pod in self.namespace.pods.items() if pod.pod.labels.get(label) == value]
        return "".join(f"pod/{name}\n" for name in found).encode()

    def _copy(self, words: list[str], _: bytes, cwd: Path) -> bytes:
        """By tar in the container, as it is done there."""
        source, target = words
        name, place = target.split(":")
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(cwd / source, Path(source).name)
        pod = self._pod(f"pod/{name}")
        done = pod.run(pod.container, ["tar", "-xmf", "-", "-C", place], packed.getvalue())
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return b""

    def _delete(self, words: list[str], _: bytes, __: Path) -> bytes:
        assert words[0] == "job", words
        assert words[2:] == ["--ignore-not-found"], words
        self.namespace.delete_job(words[1])
        return b""

    def _pod(self, what: str) -> LocalPod:
        name = re.sub(r"^(deploy|pod)/", "", what)
        assert name in self.namespace.pods, f"there is no {what}"
        pod = self.namespace.pods[name]
        self.namespace.wait(f"pod/{name}", "Ready", 600)
        return pod

    def answers(self, port: int, path: str) -> int:
        """The status of a page behind a port that was forwarded."""
        return httpx.get(f"http://127.0.0.1:{self.forwarded[port]}{path}", timeout=60).status_code
