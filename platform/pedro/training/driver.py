"""The process of a job or sweep: its log lines, its result, and its errors.

The last line on standard output is the result as one JSON object; a failure is one line on standard error that begins
with `error: `, and exit code 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError, UnavailableError

if TYPE_CHECKING:
    from pedro.training.job_record import OwnRecord


def drive(work: Callable[[], dict[str, Any]], what: str, remedy: str, record: OwnRecord | None = None) -> int:
    """Run `work`, print its result or error, and write the end to `record`; returns the exit code.

    `what` is a job or a sweep; `remedy` is what to do after an internal error.
    """
    try:
        result = work()
    except PedroError as error:
        ended = not isinstance(error, UnavailableError) or record is None or not record.unanswered(error.message)
        if record and ended:
            record.failed(error.message)
        return fail(error.message)
    except (KeyboardInterrupt, SystemExit):  # `pedro jobs stop`: Ray turns SIGTERM into an exit
        if record:
            record.stopped()
        return fail(f"the {what} was stopped")
    except Exception as error:  # noqa: BLE001 - the edge of the process: one line for users, the rest for the log
        for line in traceback.format_exc().splitlines():
            print(f"(driver pid={os.getpid()}) {line}", file=sys.stderr)
        broke = f"the {what} failed unexpectedly ({type(error).__name__}); {remedy}"
        if record:
            record.failed(broke)
        return fail(broke)
    if record:
        record.succeeded(result)
    print(json.dumps(result), flush=True)
    return 0


def fail(message: str) -> int:
    """Print the line of a failure; returns the exit code."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 1


def log_line(line: str) -> None:
    """Print a line without buffering, for those who follow the job."""
    print(line, flush=True)


def log_beside(line: str) -> None:
    """Print a line before the result, which is the last one on standard output."""
    print(line, file=sys.stderr, flush=True)


def connect_driver(log_to_driver: bool = True) -> None:
    """Join the cluster that runs this as a job, or that of RAY_ADDRESS, or (with neither) start a temporary one.

    Ray Train's actors find the cluster by RAY_ADDRESS; without it they search this host and may find another one.
    """
    import ray

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        variables = {"RAY_ADDRESS": address} if address else {}
        ray.init(
            address=address or "local",
            namespace="pedro",
            logging_level=logging.ERROR,
            log_to_driver=log_to_driver,
            runtime_env={"env_vars": variables},
        )
