"""Starts the engines' processes, has them compute one at a time, and ends them. Standard library only.

A peer that is not installed, or does not start, is left out by name and reason; nothing outlives a `with Stable()`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.benchmarks.model_sizes import bench_folder

START_S, RUN_S = 600, 600
ROOT = Path(__file__).parents[2]  # the checkout
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
Say = Callable[[str], None]


class RivalError(Exception):
    """An engine could not be started or failed while it ran; the message is the engine's own."""


class Rival:
    """One engine in a process of its own."""

    def __init__(self, name: str, kind: str, python: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = bench_folder() / "logs" / f"{name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-m", "jobs.benchmarks.workers", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": python_path(), **environment},
                start_new_session=True,
            )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, order: Mapping[str, Any]) -> None:
        """Give an order without waiting for its answer."""
        assert self._process.stdin is not None, "made with a pipe"
        with suppress(BrokenPipeError):  # a process that ended is seen by `receive`
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer. Raises RivalError if the engine failed, ended or takes longer."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise RivalError(f"no answer within {timeout_s:g} s; its log is {self.log}") from None
        if not line:
            raise RivalError(f"its process ended; its log is {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RivalError(f"{answer['error']} (log: {self.log})")
        return answer

    def end(self) -> None:
        """End the process and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "made with a pipe"
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")


class Stable:
    """The engines of one benchmark. `start` several, then `run` them in turn; leaving the `with` ends them all."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._rivals: dict[str, Rival] = {}
        self.skipped: dict[str, str] = {}

    def __enter__(self) -> Stable:
        return self

    def __exit__(self, *_exc: object) -> None:
        for rival in self._rivals.values():
            rival.end()

    def start(
        self, name: str, kind: str, setup: Mapping[str, Any], python: str = sys.executable, **environment: str
    ) -> None:
        """Have an engine get ready; `wait` says which did."""
        if not Path(python).is_file():
            self.skip(name, f"{python} is no Python; give --peer {name.partition('+')[0]}=/path/to/python")
            return
        rival = self._rivals[name] = Rival(name, kind, python, environment)
        rival.send(setup)

    def wait(self) -> dict[str, dict[str, Any]]:
        """What the engines say of themselves that are ready to run, in the order of their start."""
        began, facts = time.monotonic(), {}
        for name, rival in list(self._rivals.items()):
            try:
                facts[name] = rival.receive(max(1.0, START_S - (time.monotonic() - began)))
            except RivalError as error:
                self.skip(name, str(error))
            else:
                self._say(f"  {name} is ready after {time.monotonic() - began:.0f} s")
        return facts

    def run(self, name: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """One engine's figures. Raises RivalError from an engine that cannot do it."""
        self.send(name, order)
        return self.receive(name)

    def send(self, name: str, order: Mapping[str, Any]) -> None:
        """Have one engine begin, beside others."""
        self._rivals[name].send(order)

    def receive(self, name: str) -> dict[str, Any]:
        """The figures of what `send` began."""
        return self._rivals[name].receive(RUN_S)

    def skip(self, name: str, reason: str) -> None:
        """Leave an engine out from here on, and say so."""
        self.skipped[name] = reason
        self._say(f"  skipped {name}: {reason}")
        if (rival := self._rivals.pop(name, None)) is not None:
            rival.end()


def python_path() -> str:
    """PYTHONPATH with which another Python, started anywhere, finds this room and the package."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), str(ROOT / "platform"), *([inherited] if inherited else [])])


def peer_environment(python: str, threads: int) -> dict[str, str]:
    """What vLLM's documentation asks for on a CPU: pinned threads, tcmalloc and its own OpenMP, where they are."""
    openmp = Path(python).parents[1] / "lib" / "libiomp5.so"
    preload = [path for path in (TCMALLOC, str(openmp)) if Path(path).is_file()]
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "1",
        **({"LD_PRELOAD": ":".join(preload)} if preload else {}),
    }
