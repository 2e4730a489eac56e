"""Log lines as JSON objects, one per line, for log collectors (`PEDRO_LOG_FORMAT=json`). Opens no file.

A line has `time` (UTC), `level`, `logger`, `message`, and where they are known `request_id`, `trace_id` and `tenant`,
or `job`, `trace_id`, `tenant` and `model`; of an exception the traceback. Lines of requests have their fields in place
of a message. Traces are those of `tracing.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from contextvars import ContextVar
from typing import Any

FORMATS = TEXT, JSON = "text", "json"
ABOUT: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)
"""What everything that is logged now is about: a request's id and, once it is known, its tenant."""
OF_JOB = re.compile(r"(?P<job>\S+) \((?P<model>(?P<tenant>[^\s.()]+)\.[^\s()]+)\): (?P<message>.*)", re.DOTALL)


class JsonLines(logging.Formatter):
    """Formats a record; its attribute `facts`, if it has one, takes the place of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        facts = getattr(record, "facts", None)
        told = {**(ABOUT.get() or {}), "message": record.getMessage()} if facts is None else facts
        line = {"time": _utc(record.created), "level": record.levelname, "logger": record.name, **told}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _dumped(line)


def use(form: str) -> None:
    """Have what this process logs of pedro go to standard error, if `form` is JSON; else as it did."""
    if form != JSON:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    log = logging.getLogger("pedro")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def log_job_line(line: str) -> None:
    """A line of the controller's to standard error; one about a job begins with its id and model."""
    found = OF_JOB.fullmatch(line)
    told = {**found.groupdict(), "trace_id": trace_of_job(found["job"])} if found else {"message": line}
    head = {"time": _utc(time.time()), "level": "INFO", "logger": "pedro.controller"}
    print(_dumped({**head, **told}), file=sys.stderr, flush=True)


def trace_of_job(job_id: str) -> str:
    """The id of a job's trace: of 32 hexadecimal digits, the same wherever the job is known."""
    return hashlib.sha256(job_id.encode()).hexdigest()[:32]


def _utc(seconds: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def _dumped(line: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in line.items() if value is not None}, default=str)
