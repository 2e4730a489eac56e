"""Runs work on untrusted input in a separate process, which is killed if it takes too long or too much memory.

The process is `python -m` a module that calls `serve` and does the work. Standard library only.
"""

from __future__ import annotations

import os
import resource
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from pedro.errors import UnavailableError

_HEAD = struct.Struct("!cI")
Message = tuple[bytes, bytes]  # its kind, one byte, and its content


class BoundedWorker:
    """The process: started when it is first needed and after it was killed. Thread-safe, one request at a time."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, wall_s: float) -> Message:
        """What the process answers. Raises TimeoutError after `wall_s`, EOFError where the process is lost."""
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self.process = _start(self._module)
            try:
                return _exchange(self.process, request, time.monotonic() + wall_s)
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()


def serve(answer: Callable[[bytes], Message], memory_bytes: int) -> None:
    """In the process: answer what comes on stdin until it ends, with so many bytes of addresses at most."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with suppress(BrokenPipeError, KeyboardInterrupt):
        while head := requests.read(_HEAD.size):
            kind, content = answer(requests.read(_HEAD.unpack(head)[1]))
            answers.write(_HEAD.pack(kind, len(content)) + content)
            answers.flush()


def _start(module: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [sys.executable, "-m", module],
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
        raise UnavailableError("no worker process could be started; try again in a moment") from error


def _exchange(process: subprocess.Popen[bytes], request: bytes, until: float) -> Message:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(_HEAD.pack(b"?", len(request)) + request)
        process.stdin.flush()
        kind, size = _HEAD.unpack(_read(process.stdout.fileno(), _HEAD.size, until))
        return kind, _read(process.stdout.fileno(), size, until)
    except TimeoutError:
        raise
    except OSError as error:
        raise EOFError from error


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
