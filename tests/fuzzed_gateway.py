"""A gateway that is asked anything: what there is in it, and what every answer of it is held to.

`python tests/fuzzed_gateway.py FOLDER DATABASE_URL` is that gateway in a process of its own, whose memory can be told;
it prints how it is reached, and ends with its standard input.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import psutil

if TYPE_CHECKING:
    import httpx

LONGEST_S = 30  # a guard in the fast tests; in a long search, which has the machine to itself, an answer has AT_MOST_S
AT_MOST_S = 5.0
GROWTH = 1.05  # of memory, from a third of a search to its end
GROWTH_MB = 30  # what an allocator may gather meanwhile, whatever there was before
FUZZED = "acme.fuzzed"
DRY_RUNS = "POST /v1/fine_tuning/jobs"  # with `dry_run=true`: this gateway has no program for them
INSIDE = re.compile(
    r"Traceback|site-packages|\.py\b|<class |object at 0x|\b(?:pedro|sqlalchemy|psycopg|starlette|pydantic|torch)\."
    r"|\b[A-Z]\w+(?:Error|Exception)\b|sqlite3?|\b(?:SELECT|INSERT INTO|UPDATE|DELETE FROM) "
)
CHAT_ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
BATCH_ROW = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": FUZZED, "prompt": "a"}}
ROWS = {"fine-tune": json.dumps(CHAT_ROW) + "\n", "batch": json.dumps(BATCH_ROW) + "\n"}


class FuzzedGateway:
    """A client with a tenant's key and an operator's, and the names of things that there are."""

    def __init__(self, address: str, http: httpx.Client, keys: dict[str, str], folder: str, pid: int | None) -> None:
        self.address, self.http, self.folder = address, http, folder
        self.headers = {who: {"authorization": f"Bearer {key}"} for who, key in keys.items()}
        self.asked: Counter[int] = Counter()  # by status
        self.routes: Counter[str] = Counter()
        self._began = time.monotonic()
        self.unexpected_5xx = 0
        self.slowest = (0.0, "")
        self._process = None if pid is None else psutil.Process(pid)
        self.memory_mb: list[float] = []
        form: Any = {"files": {"file": ("rows.jsonl", ROWS["fine-tune"])}, "data": {"purpose": "fine-tune"}}
        file_id = self.ask("POST", "/v1/files", **form).json()["id"]
        job = {"model": "stories260K", "training_file": file_id}
        job_id = self.ask("POST", "/v1/fine_tuning/jobs", json=job).json()["id"]
        hook = {"url": "http://127.0.0.1:9/", "name": "hook", "event_types": ["batch.failed"]}
        hook_id = self.ask("POST", "/v1/webhook_endpoints", json=hook).json()["id"]
        self.known = {
            "name": FUZZED,
            "ref": FUZZED,
            "file_id": file_id,
            "job_id": job_id,
            "endpoint_id": hook_id,
            "model": FUZZED,
            "training_file": file_id,
            "input_file_id": file_id,
        }

    def ask(self, method: str, path: str, who: str = "tenant", **more: Any) -> httpx.Response:
        """One request with the key of `who`."""
        headers = {**self.headers[who], **more.pop("headers", {})}
        return self.http.request(method, self.address + path, headers=headers, **more)

    @property
    def schema(self) -> Any:
        """What the gateway says of itself, for Schemathesis."""
        import schemathesis

        return schemathesis.openapi.from_dict(self.ask("GET", "/openapi.json", "operator").json())

    def aim(self, case: Any) -> None:
        """Have a generated request name what there is."""
        case.path_parameters = {k: self.known.get(k, v) for k, v in (case.path_parameters or {}).items()}
        self.aim_body(case, self.known)

    def aim_body(self, case: Any, known: dict[str, str]) -> None:
        """The same for the fields of its body alone."""
        if isinstance(case.body, dict):
            found = {name: known[name] for name in known.keys() & case.body.keys() if isinstance(case.body[name], str)}
            case.body = {**case.body, **found}

    def look(self, reply: Any, route: str) -> None:
        """What every answer is held to: one of httpx, of requests or of Schemathesis. `route` is what was asked."""
        self.routes[route] += 1
        text, spent = reply.text, reply.elapsed
        seconds = spent if isinstance(spent, float) else spent.total_seconds()
        self.asked[reply.status_code] += 1
        self.slowest = max(self.slowest, (seconds, f"{reply.request.method} {reply.request.url}"))
        if self._process is not None and self.asked.total() % 50 == 0:
            self.memory_mb.append(self._process.memory_info().rss / 2**20)
        if reply.status_code >= 500 and not excused(reply, route, seconds, shared=self._process is None):
            self.unexpected_5xx += 1
            raise AssertionError(f"{route}: {reply.status_code} after {seconds:.2f} s: {text}")
        sent = unquote(str(reply.request.url))  # Hypothesis draws words of our own sources, too: "pedro."
        found = [match[0] for match in INSIDE.finditer(text) if match[0] not in sent]
        assert not found, f"{found}: {text}"
        assert self.folder not in text
        if reply.status_code >= 400:  # also of an address that is none of the document's
            assert "application/json" in reply.headers["content-type"]  # Schemathesis has a list of each header
            assert reply.json()["error"].keys() == {"message", "type", "param", "code"}

    def memory(self) -> tuple[float, float]:
        """MB after a third of the search, and at its end; medians of what was seen around then."""
        seen = self.memory_mb
        width = max(1, len(seen) // 20)
        return tuple(sorted(part)[len(part) // 2] for part in (seen[len(seen) // 3 :][:width], seen[-width:]))  # type: ignore[return-value]

    def row(self, database: str) -> dict[str, Any]:
        """What was asked and what came, as a result keeps it."""
        row: dict[str, Any] = {"database": database, "requests": self.asked.total()}
        row["seconds"] = round(time.monotonic() - self._began)
        row["statuses"] = {str(status): count for status, count in sorted(self.asked.items())}
        row["unexpected_5xx"] = self.unexpected_5xx
        row |= {"slowest_s": round(self.slowest[0], 3), "slowest": self.slowest[1][:100]}
        if self.memory_mb:
            row |= dict(zip(("mb_after_a_third", "mb_at_end"), (round(mb, 1) for mb in self.memory()), strict=True))
        return {**row, "routes": dict(sorted(self.routes.items()))}

    def told(self) -> str:
        """What was asked, in two lines."""
        statuses = ", ".join(f"{count} x {status}" for status, count in sorted(self.asked.items()))
        lines = f"{self.asked.total()} requests: {statuses}\nslowest: {self.slowest[0]:.2f} s, {self.slowest[1][:100]}"
        if self.memory_mb:
            lines += "; memory {:.0f} MB after a third, {:.0f} MB at the end".format(*self.memory())
        return lines


def excused(reply: Any, route: str, seconds: float, *, shared: bool) -> bool:
    """Whether an answer of 500 and above is no fault of the server's.

    504: the request itself gave so little time, and had it; the server's own limit, of 600 s, is longer than any client
    here waits. 503: a queue is full, or a dry run was asked for. 500, where the replica is `shared` with other tests,
    which broke adapters of theirs: such an adapter. This gateway has storage and a key for webhooks.
    """
    try:
        code = reply.json()["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return False
    if reply.status_code == 504:
        given = _seconds(reply.request.headers.get("x-request-timeout"))
        return given is not None and seconds >= min(given, 1.0)
    if reply.status_code == 503:
        dry_run = route == DRY_RUNS and "dry_run=true" in str(reply.request.url)
        return code == "overloaded" or (code == "environment" and dry_run)
    return reply.status_code == 500 and shared and code == "adapter_unusable" and FUZZED not in reply.text


def _seconds(given: str | bytes | None) -> float | None:
    """What the header `x-request-timeout` asks for, where it is valid."""
    try:
        seconds = float(given or "")
    except ValueError:
        return None
    return seconds if 0 < seconds < math.inf else None


@contextmanager
def apart(folder: Path, url: str) -> Iterator[tuple[str, dict[str, str], int]]:
    """A gateway in a process of its own: its address, keys and process id."""
    command = [sys.executable, __file__, str(folder), url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            told = json.loads(next(line for line in process.stdout if line.startswith("{")))
            yield told["address"], told["keys"], process.pid
        finally:
            process.stdin.close()
            process.wait(120)


def _serve(folder: Path, url: str) -> None:
    from serving_ingress import running_replica

    with running_replica(folder / "replica") as served, gateway(served, folder, url) as (address, keys):
        print(json.dumps({"address": address, "keys": keys}), flush=True)
        sys.stdin.read()


@contextmanager
def gateway(served: Any, folder: Path, url: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A gateway in this process with two versions of `FUZZED`, which are its own: what is asked moves aliases and
    deletes versions. Its address and keys."""
    from gateway_engine import served_engine
    from serving_adapters import register

    for _ in range(2):
        register(served.registry, served.folder / "1", FUZZED)
    with served_engine(served, folder, url) as (address, store):
        scopes = {"tenant": ("infer", "train", "read"), "operator": ("admin",)}
        yield (
            address,
            {who: store.create_key("acme" if who == "tenant" else "ops", of)[1] for who, of in scopes.items()},
        )


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2])
