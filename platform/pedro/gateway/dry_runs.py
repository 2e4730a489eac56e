"""Dry runs of jobs: what one would take, worked out in a process of its own, since the gateway does without torch.

One at a time, each bounded in time; it starts no job and trains nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

from pedro.errors import DeadlineError, OverloadedError, PedroError, RateLimitError, UnavailableError

MOST_WAITING = 16  # of all tenants
TIMEOUT_S = 120.0
log = logging.getLogger("pedro.gateway")


class DryRuns:
    """Asks the program `command`, which reads a spec and answers with one line. For one event loop."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
        self._command, self._env, self._timeout_s = tuple(command), dict(env), timeout_s
        self._turn = asyncio.Lock()
        self._asking: set[str] = set()

    async def ask(self, tenant: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The report. Raises the PedroError that the job would end with, RateLimitError for a tenant that has one under
        way, OverloadedError, DeadlineError, and UnavailableError where there is no such program."""
        if not self._command:
            raise UnavailableError("This server makes no dry runs; `pedro submit --dry-run` does.", code="environment")
        if tenant in self._asking:
            raise RateLimitError("A dry run of yours is under way; ask again when it is answered.")
        if len(self._asking) >= MOST_WAITING:
            raise OverloadedError("Many dry runs are waiting; try again in a moment.")
        self._asking.add(tenant)
        try:
            async with self._turn:
                answer = await self._run(spec)
        finally:
            self._asking.discard(tenant)
        if (error := answer.get("error")) is not None:
            raise PedroError(error["message"], param=error["param"], code=error["code"])
        report: dict[str, Any] = answer["report"]
        return report

    async def _run(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        pipe = asyncio.subprocess.PIPE
        with TemporaryFile() as given:  # a program that ends before it has read all would break a pipe
            given.write(json.dumps(spec).encode())
            given.seek(0)
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=given,
                stdout=pipe,
                stderr=pipe,
                env={**os.environ, **self._env},
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                out, wrong = await process.communicate()
        except TimeoutError:
            message = f"The dry run took longer than {self._timeout_s:g} s; start the job, or ask with fewer rows."
            raise DeadlineError(message) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        try:
            answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        except (ValueError, IndexError):
            log.error("a dry run broke (exit %s): %s", process.returncode, wrong.decode(errors="replace")[-4000:])
            raise RuntimeError("a dry run broke") from None
        return answer
