"""Dry runs of jobs: estimated in a separate process, since the gateway does not import torch.

One at a time, each with a time limit; no job is started and nothing is trained.
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
    """Runs the program `command`, which reads a spec and prints one line. For one event loop."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float = TIMEOUT_S) -> None:
        self._command, self._env, self._timeout_s = tuple(command), dict(env), timeout_s
        self._turn = asyncio.Lock()
        self._asking: set[str] = set()

    async def ask(self, tenant: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The report. Raises the PedroError with which the job would fail, RateLimitError if the tenant has a dry run
        in progress, OverloadedError, DeadlineError, and UnavailableError without a program."""
        if not self._command:
            raise UnavailableError(
                "This server does not support dry runs; use `pedro submit --dry-run`.", code="environment"
            )
        if tenant in self._asking:
            raise RateLimitError("A dry run of yours is in progress; try again when it has finished.")
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
        with TemporaryFile() as given:  # if the program exits before reading everything, a pipe would break
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
            message = f"The dry run took longer than {self._timeout_s:g} s; start the job, or try fewer rows."
            raise DeadlineError(message) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        try:
            answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        except (ValueError, IndexError):
            log.error("a dry run failed (exit %s): %s", process.returncode, wrong.decode(errors="replace")[-4000:])
            raise RuntimeError("a dry run failed") from None
        return answer
