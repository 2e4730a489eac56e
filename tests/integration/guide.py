"""k8s/README.md as a reader types it: its blocks are run by bash, with `kubectl` played and two programs left out."""

from __future__ import annotations

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from k8s_render import ROOT

GUIDE = ROOT / "k8s" / "README.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = ("kind", "docker")  # they make the cluster and the image
LIMIT_S = 900
SHIM = """#!{python}
import base64, json, os, socket, sys
stdin = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect({address!r})
    words = {{"words": sys.argv[1:], "cwd": os.getcwd(), "stdin": base64.b64encode(stdin).decode()}}
    sock.sendall(json.dumps(words).encode() + b"\\n")
    answer = json.loads(sock.makefile("rb").readline())
sys.stdout.write(answer["stdout"])
sys.stderr.write(answer["stderr"])
sys.exit(answer["status"])
"""
Command = Callable[[list[str], bytes, Path], bytes]


def blocks(section: str) -> list[str]:
    """The commands of a section, block by block."""
    text = GUIDE.read_text("utf-8")
    titles = list(SECTION.finditer(text))
    (at,) = (number for number, title in enumerate(titles) if title[1] == section)
    end = titles[at + 1].start() if at + 1 < len(titles) else len(text)
    return BLOCK.findall(text[titles[at].end() : end])


@contextmanager
def terminal(folder: Path, kubectl: Command) -> Iterator[Callable[..., str]]:
    """A function `run(block, ports={}, **variables)` that types a block into bash and gives what it prints; ports of
    127.0.0.1 in it are those that were forwarded."""
    bin_, address = folder / "bin", str(folder / "k.sock")
    bin_.mkdir()
    (bin_ / "kubectl").write_text(SHIM.format(python=sys.executable, address=address), "utf-8")
    for name in LEFT_OUT:
        (bin_ / name).write_text(f'#!/bin/sh\necho "{name}: left out" >&2\n', "utf-8")
    for path in bin_.iterdir():
        path.chmod(0o755)
    env = {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": str(folder)}

    def run(block: str, ports: dict[int, int] | None = None, cwd: Path = ROOT, **variables: str) -> str:
        for theirs, ours in (ports or {}).items():
            block = block.replace(f"127.0.0.1:{theirs}", f"127.0.0.1:{ours}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env={**env, **variables},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-1500:]}\n{done.stderr[-4000:]}"
        return done.stdout

    with _listening(address, kubectl):
        yield run


@contextmanager
def _listening(address: str, command: Command) -> Iterator[None]:
    """Answers what the shim sends."""
    import base64

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = json.loads(self.rfile.readline())
            answer = {"status": 0, "stdout": "", "stderr": ""}
            try:
                answer["stdout"] = command(asked["words"], base64.b64decode(asked["stdin"]), Path(asked["cwd"])).decode(
                    errors="replace"
                )
            except Exception as error:  # noqa: BLE001 (the command has failed, and says why)
                answer |= {"status": 1, "stderr": f"{error}\n"}
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    server = Server(address, Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
