"""Runs untrusted templates in a process of their own, which is killed if it takes too long.

A sandboxed template reaches nothing, but it may loop or grow without end. Here it has bounds: computing time, memory,
size of what it writes. `python -m pedro.data.template_worker` is the process.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from typing import Any

from pedro.bounded_worker import BoundedWorker, serve
from pedro.data import templates
from pedro.errors import DataError

CPU_S = 0.5  # of computing, for one prompt
WALL_S = 5.0  # a machine that is busy with other things delays a template longer than that one takes
MEMORY_BYTES = 1 << 30  # of addresses; the interpreter itself takes a fifth
MAX_CHARS = 8_000_000  # of a prompt: no context is so long
_TEXT, _REFUSED, _BOUNDS = b"t", b"r", b"b"


class TemplateBoundsError(DataError):
    """A template took more than it may."""

    code = "template_bounds"


class TemplateWorker:
    """The process, started when it is first needed and again after it was killed. Thread-safe: one prompt at a time."""

    def __init__(self) -> None:
        self._worker = BoundedWorker(__name__)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """As `pedro.data.templates.render`. Raises TemplateBoundsError where the template goes beyond its bounds."""
        try:
            kind, answer = self._worker.ask(json.dumps([template, variables]).encode(), WALL_S)
        except TimeoutError:
            raise _beyond(f"did not end within {WALL_S:g} s") from None
        except EOFError:
            raise _beyond("took down the process that ran it") from None
        if kind == _TEXT:
            return answer.decode("utf-8", "surrogatepass")
        message, param = json.loads(answer)
        raise (TemplateBoundsError if kind == _BOUNDS else DataError)(message, param=param)

    def close(self) -> None:
        """End the process."""
        self._worker.close()


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


if __name__ == "__main__":
    serve(_answer, MEMORY_BYTES)
