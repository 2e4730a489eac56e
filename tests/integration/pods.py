"""A pod of the manifests as processes of this host: settings, Secrets, mounts, commands and probes are its own.

Knows nothing of what else runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from k8s_render import ROOT, Pod, matches, one

from integration.substitutions import KEPT, Here, Reach, with_ports
from pedro.cluster import free_port

REFERENCE = re.compile(r"\$\((\w+)\)")
AGENT = 52365  # Ray's, which probes ask
PROBE_S = 60.0  # a probe's patience: this host has two cores where a cluster has many
PASSED_ON = ("LANG", "OMP_NUM_THREADS")


def image_environment() -> dict[str, str]:
    """The last ENV of the Dockerfile, which every container of our image has."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = text[text.rindex("\nENV ") :].split("ENV ", 1)[1].split("\nVOLUME")[0]
    return dict(word.split("=", 1) for word in lines.replace("\\\n", " ").split())


@dataclass
class Known:
    """What the API server knows: objects, the values of Secrets, and where things are on this host."""

    folder: Path
    here: Here
    objects: list[dict[str, Any]] = field(default_factory=list)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)


class LocalPod:
    """One pod. `added` are variables that an operator gives to its containers."""

    def __init__(self, known: Known, pod: Pod, name: str, reach: Reach, added: Mapping[str, str] | None = None) -> None:
        self.known, self.pod, self.name = known, pod, name
        self.folder = known.folder / name
        self.ports = dict(self._ports())
        self.restarts = 0
        self.log = known.folder / f"{name}.log"
        self._reach, self._added = reach, dict(added or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._words: list[str] | None = None
        self._mount()

    def add(self, variables: Mapping[str, str]) -> None:
        """Variables that an operator gives, too."""
        self._added |= variables

    @property
    def container(self) -> dict[str, Any]:
        """The only one that stays."""
        (container,) = self.pod.spec["containers"]
        return dict(container)

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """Its variables as Kubernetes makes them, with this host's places. Raises LookupError for a Secret or a key
        that there is not, without which a container is not created."""
        image = image_environment()
        found = {name: value for name, value in os.environ.items() if name in PASSED_ON} | image
        for source in container.get("envFrom", []):
            found |= one(self.known.objects, "ConfigMap", source["configMapRef"]["name"])["data"]
        for entry in container.get("env", []):
            value = self._value(entry)
            if value is not None:
                found[entry["name"]] = _expanded(value, found)
        found = {name: value if name in KEPT else self._text(value) for name, value in found.items()}
        program = [str(ROOT / "platform"), found["PYTHONPATH"]]  # the image has the package installed
        found["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**found, "PYTHONPATH": ":".join(program), "TMPDIR": f"{self.folder}/tmp", **self._added}

    def words(self, container: dict[str, Any], words: list[str] | None = None) -> list[str]:
        """Its command and arguments, or others that are run in it, as they are on this host."""
        said = [*container.get("command", []), *container.get("args", [])] if words is None else words
        variables = self.environment(container)
        return [with_ports(self._text(_expanded(word, variables)), self.ports) for word in said]

    def run(
        self, container: dict[str, Any], words: list[str] | None = None, stdin: bytes = b"", limit_s: float = 600
    ) -> subprocess.CompletedProcess[bytes]:
        """A command to its end, as an init container, a Job or `kubectl exec` has one."""
        return subprocess.run(
            self.words(container, words),
            env=self.environment(container),
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )

    def start(self, words: list[str] | None = None) -> None:
        """Start the container that stays, in a session of its own."""
        self._words = words
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.words(self.container) if words is None else words,
                env=self.environment(self.container),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_again(self) -> None:
        """What has ended, with what it was started with."""
        for process in self.processes():
            process.kill()
        self.restarts += 1
        self.start(self._words)

    @property
    def ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def fails(self, probe: str) -> str:
        """Why a probe of the container says no; empty where it says yes, or there is none."""
        told = self.container.get(probe)
        if told is None:
            return ""
        if self.ended:
            return f"the container has ended: {self.last_words()}"
        if "exec" in told:
            done = self.run(self.container, told["exec"]["command"], limit_s=PROBE_S)
            return "" if done.returncode == 0 else f"{told['exec']['command']} gives {done.returncode}"
        port = told["httpGet"]["port"]
        names = {each["name"]: each["containerPort"] for each in self.container.get("ports", [])}
        url = f"http://127.0.0.1:{self.ports[names.get(port, port)]}{told['httpGet']['path']}"
        try:
            status = httpx.get(url, timeout=PROBE_S).status_code
        except httpx.HTTPError as error:
            return f"{url}: {error!r}"
        return "" if 200 <= status < 400 else f"{url}: {status}"

    def last_words(self, most: int = 1500) -> str:
        return self.log.read_text("utf-8", "replace")[-most:] if self.log.is_file() else ""

    def terminate(self) -> None:
        """SIGTERM to the container's first process, as its node sends it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self, grace_s: float) -> float:
        """SIGTERM, then SIGKILL of what is left after the grace period; the seconds that it took."""
        began = time.monotonic()
        self.terminate()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        took = time.monotonic() - began
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        if self._process is not None:
            self._process.wait(30)
        return took

    def processes(self) -> Iterator[psutil.Process]:
        """Those of its session, by their ids."""
        for pid in psutil.pids():
            with suppress(OSError, psutil.Error):
                if self._process is not None and os.getsid(pid) == self._process.pid:
                    yield psutil.Process(pid)

    def _text(self, text: str) -> str:
        return self.known.here.text(text, self.folder, self._reach)

    def _value(self, entry: dict[str, Any]) -> str | None:
        source = entry.get("valueFrom")
        if source is None:
            return str(entry.get("value", ""))
        if told := source.get("configMapKeyRef"):
            return str(one(self.known.objects, "ConfigMap", told["name"])["data"][told["key"]])
        told = source["secretKeyRef"]
        value = self.known.secrets.get(told["name"], {}).get(told["key"])
        if value is None and not told.get("optional"):
            raise LookupError(f"{self.name}: there is no key {told['key']} of a Secret {told['name']}")
        return value

    def _mount(self) -> None:
        """Folders for volumes, and files for Secrets."""
        volumes = {volume["name"]: volume for volume in self.pod.spec.get("volumes", [])}
        for container in self.pod.containers:
            for mount in container["volumeMounts"]:
                at = self.folder / mount["mountPath"].lstrip("/")
                at.mkdir(parents=True, exist_ok=True)
                if secret := volumes.get(mount["name"], {}).get("secret"):
                    if secret["secretName"] not in self.known.secrets:
                        if not secret.get("optional"):
                            raise LookupError(f"{self.name}: there is no Secret {secret['secretName']}")
                        continue
                    for key, value in self.known.secrets[secret["secretName"]].items():
                        (at / key).write_text(value, "utf-8")
                        (at / key).chmod(0o440)

    def _ports(self) -> Iterator[tuple[int, int]]:
        """Ports that its containers open, each with the free one that stands for it."""
        services = [obj for obj in self.known.objects if obj["kind"] == "Service"]
        for container in self.pod.containers:
            for port in container.get("ports", []):
                number = port["containerPort"]
                for service in services:
                    if matches({"matchLabels": service["spec"]["selector"]}, self.pod.labels):
                        yield number, self.known.here.port(service["metadata"]["name"], number)
                        break
                else:
                    yield number, free_port()
        if "ray.io/node-type" in self.pod.labels:
            yield AGENT, free_port()


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` of Kubernetes; one that is not known stays as it is."""
    return REFERENCE.sub(lambda found: variables.get(found[1], found[0]), text)
