"""What is other on this host than in the cluster: the whole list.

1. A Service's name and port are 127.0.0.1 and a free port; one that the pod's network policies keep it from is a port
   on which nobody listens.
2. Folders of pods, and the image's /opt/pedro, are folders here.
3. 0.0.0.0 is 127.0.0.1.
4. Ports that a container itself opens are free ones.
5. The images of PostgreSQL and MinIO are a wheel's PostgreSQL and moto's S3 (`images`); the API server, KubeRay and the
   Service of gateways are played (`kubernetes_api`, `kuberay`, `service`), and so is `kubectl` as far as the guide
   types it.
6. Of KubeRay's `ray start`: ports, addresses, the folder for temporary files and the object store's size.

Knows nothing of processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from pedro.cluster import free_port

NOBODY_LISTENS = "127.0.0.1:1"
FOLDERS = ("var/lib/pedro", "etc/pedro", "tmp")
PROGRAM = "/opt/pedro"
KEPT = ("MLFLOW_SERVER_ALLOWED_HOSTS",)  # names by which clients call the server
Reach = Callable[[str, int], bool]
"""Whether a pod may talk to a Service at a port."""


class Here:
    """The free ports that stand for those of Services, and texts of manifests as they read on this host."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._ports: dict[tuple[str, int], int] = {}
        self._services: set[str] = set()

    def know(self, services: set[str]) -> None:
        """Names to be found in texts from now on."""
        self._services |= services

    def port(self, service: str, port: int) -> int:
        """The free port that stands for this one, always the same."""
        key = (service, port)
        if key not in self._ports:
            self._ports[key] = free_port()
        return self._ports[key]

    def text(self, text: str, folder: Path, reach: Reach) -> str:
        """A text of a pod whose files are in `folder`."""
        names = "|".join(sorted(map(re.escape, self._services))) or "(?!)"
        folders = "|".join(FOLDERS)
        pattern = re.compile(
            rf"(?<![\w.-])(?P<service>{names}):(?P<port>\d+)\b"
            rf"|(?<![\w/.-])/(?P<folder>{folders})(?![\w.-])"
            rf"|{PROGRAM}(?![\w.-])"
            r"|\b0\.0\.0\.0\b"
        )

        def replace(found: re.Match[str]) -> str:
            if name := found["service"]:
                at = int(found["port"])
                return f"127.0.0.1:{self.port(name, at)}" if reach(name, at) else NOBODY_LISTENS
            if found["folder"]:
                return f"{folder}/{found['folder']}"
            return "127.0.0.1" if found[0] == "0.0.0.0" else str(self._root)

        return pattern.sub(replace, text)


def with_ports(word: str, ports: dict[int, int]) -> str:
    """An argument such as --port=5000 or --address=:9000 with the free port in place of its own."""
    for theirs, ours in ports.items():
        word = re.sub(rf"(?<=[=:]){theirs}$", str(ours), word)
    return word
