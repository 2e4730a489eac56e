"""Runs templates that strangers wrote in a process of their own, which is killed where it takes too long.

A sandboxed template reaches nothing, but it may loop or grow without end. Here it has bounds: computing time, memory,
size of what it writes. `python -m pedro.data.template_worker` is the process.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pedro.data import templates
from pedro.errors import DataError, UnavailableError

CPU_S = 0.5  # of computing, for one prompt
WALL_S = 5.0  # a machine that is busy with other things delays a template longer than that one takes
MEMORY_BYTES = 1 << 30  # of addresses; the interpreter itself takes a fifth
MAX_CHARS = 8_000_000  # of a prompt: no context is so long
_HEAD = struct.Struct("!cI")
_TEXT, _REFUSED, _BOUNDS = b"t", b"r", b"b"


class TemplateBoundsError(DataError):
    """A template took more than it may."""

    code = "template_bounds"


class TemplateWorker:
    """The process, started when it is first needed and again after it was killed. Thread-safe: one prompt at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """As `pedro.data.templates.render`. Raises TemplateBoundsError where the template goes beyond its bounds."""
        request = json.dumps([template, variables]).encode()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = _start()
            try:
                kind, answer = self._ask(self._process, request)
            except BaseException:
                self._end()
                raise
        if kind == _TEXT:
            return answer.decode("utf-8", "surrogatepass")
        message, param = json.loads(answer)
        raise (TemplateBoundsError if kind == _BOUNDS else DataError)(message, param=param)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _ask(self, process: subprocess.Popen[bytes], request: bytes) -> tuple[bytes, bytes]:
        until = time.monotonic() + WALL_S
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(_HEAD.pack(_TEXT, len(request)) + request)
            process.stdin.flush()
            kind, size = _HEAD.unpack(_read(process.stdout.fileno(), _HEAD.size, until))
            return kind, _read(process.stdout.fileno(), size, until)
        except TimeoutError:
            raise _beyond(f"did not end within {WALL_S:g} s") from None
        except (OSError, EOFError):
            raise _beyond("took down the process that ran it") from None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={  # nothing else: variables hold passwords
                **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            start_new_session=True,  # an interrupt of the terminal is not for it
        )
    except OSError as error:
        raise UnavailableError("no process for prompt templates could be started; try again in a moment") from error


def _read(pipe: int, size: int, until: float) -> bytes:
    """`size` bytes. Raises EOFError where the other end is gone, TimeoutError after `until`."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    got = bytearray()
    while len(got) < size:
        left_ms = (until - time.monotonic()) * 1000
        if left_ms <= 0 or not poll.poll(left_ms):
            raise TimeoutError
        part = os.read(pipe, min(size - len(got), 1 << 20))
        if not part:
            raise EOFError
        got += part
    return bytes(got)


def _beyond(what: str) -> TemplateBoundsError:
    return TemplateBoundsError(
        f"prompt_format: the template {what}; use a template that does less", param="prompt_format"
    )


class _TimeIsUp(BaseException):
    """Nothing that a template does catches it."""


def _answer(request: bytes) -> tuple[bytes, bytes]:
    """What the process answers: the text, or why there is none."""

    def stop(*_: object) -> None:
        raise _TimeIsUp

    signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            template, variables = json.loads(request)
            return _TEXT, templates.render(template, variables, MAX_CHARS).encode("utf-8", "surrogatepass")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _TimeIsUp:
        error: DataError = _beyond(f"takes more than {CPU_S:g} s of computing")
    except MemoryError:
        error = _beyond(f"takes more than {MEMORY_BYTES >> 20} MB of memory")
    except templates.TooLongError:
        error = _beyond(f"writes more than {MAX_CHARS:,} characters")
    except DataError as refused:
        error = refused
    kind = _BOUNDS if isinstance(error, TemplateBoundsError) else _REFUSED
    return kind, json.dumps([error.message, error.param]).encode()


def _serve() -> None:
    """Answer what comes on stdin until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := requests.read(_HEAD.size):
        kind, answer = _answer(requests.read(_HEAD.unpack(head)[1]))
        answers.write(_HEAD.pack(kind, len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        _serve()
