"""Starts the engines' processes, has them compute one at a time, and ends them. Standard library only.

A peer that is not installed or does not start is skipped, with its reason; no process outlives its `EnginePool`.
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
Log = Callable[[str], None]


class EngineProcessError(Exception):
    """An engine could not be started or failed while it ran; the message is the engine's own."""


class EngineProcess:
    """One engine in a process of its own."""

    def __init__(self, name: str, kind: str, python: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log_file = bench_folder() / "logs" / f"{name}.log"
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as stream:
            self._process = subprocess.Popen(
                [python, "-m", "jobs.benchmarks.workers", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
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
        """The next answer. Raises EngineProcessError if the engine failed, ended or takes longer."""
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise EngineProcessError(f"no answer within {timeout_s:g} s; its log is {self.log_file}") from None
        if not line:
            raise EngineProcessError(f"its process ended; its log is {self.log_file}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineProcessError(f"{answer['error']} (log: {self.log_file})")
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


class EnginePool:
    """The engines of one benchmark. `start` several, then `run` them in turn; leaving the `with` ends them all."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._processes: dict[str, EngineProcess] = {}
        self.skipped: dict[str, str] = {}

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self._processes.values():
            process.end()

    def start(
        self, name: str, kind: str, setup: Mapping[str, Any], python: str = sys.executable, **environment: str
    ) -> None:
        """Have an engine get ready; `wait` says which did."""
        if not Path(python).is_file():
            self.skip(name, f"{python} is no Python; give --peer {name.partition('+')[0]}=/path/to/python")
            return
        process = self._processes[name] = EngineProcess(name, kind, python, environment)
        process.send(setup)

    def wait(self) -> dict[str, dict[str, Any]]:
        """What the engines that are ready to run say of themselves, in the order of their start."""
        began, facts = time.monotonic(), {}
        for name, process in list(self._processes.items()):
            try:
                facts[name] = process.receive(max(1.0, START_S - (time.monotonic() - began)))
            except EngineProcessError as error:
                self.skip(name, str(error))
            else:
                self._log(f"  {name} is ready after {time.monotonic() - began:.0f} s")
        return facts

    def run(self, name: str, order: Mapping[str, Any]) -> dict[str, Any]:
        """One engine's figures. Raises EngineProcessError from an engine that cannot do it."""
        self.send(name, order)
        return self.receive(name)

    def in_turn(self, name: str, option: str, rounds: int) -> dict[bool, list[dict[str, Any]]]:
        """One engine's figures with an option of its order on and off, in turn; a first round only warms up."""
        figures: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for number in range(rounds + 1):
            for on in (True, False)[:: -1 if number % 2 else 1]:
                found = self.run(name, {option: on})
                if number:
                    figures[on].append(found)
        return figures

    def send(self, name: str, order: Mapping[str, Any]) -> None:
        """Have one engine begin, beside others."""
        self._processes[name].send(order)

    def receive(self, name: str) -> dict[str, Any]:
        """The figures of what `send` began."""
        return self._processes[name].receive(RUN_S)

    def has(self, name: str) -> bool:
        """Whether this engine is ready to run."""
        return name in self._processes

    def skip(self, name: str, reason: str) -> None:
        """Leave an engine out from here on, and say so."""
        self.skipped[name] = reason
        self._log(f"  skipped {name}: {reason}")
        if (process := self._processes.pop(name, None)) is not None:
            process.end()


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
