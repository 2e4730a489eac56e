"""A batch of 2,000 rows whose engine replica is killed in the middle, beside the same batch that nobody disturbs.

Knows what a client knows, and which process to kill. Each row must be answered once, with what the undisturbed batch
answered, and stand in the ledger once.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from jobs.benchmarks.demo_server import MODEL, RunningServer, running_server
from jobs.benchmarks.home_processes import kill, of_home
from jobs.benchmarks.local_server import TENANT
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.errors import PedroError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.store import Usage

COLUMNS = ("case", "rows", "killed_at", "answered", "failed", "once", "as_undisturbed", "in_ledger", "seconds")
ROWS, QUICK_ROWS = 2_000, 100
PROMPT_TOKENS, NEW_TOKENS = 32, 16
ENDPOINT = "/v1/completions"
OVER = ("completed", "failed", "expired", "cancelled")
GUARD_S, LEDGER_S = 1_800.0, 60.0
UNDISTURBED, KILLED = "undisturbed", "replica killed"


def batch_report(options: Options, log: Log) -> BenchmarkReport:
    """The batch undisturbed, then with a kill of the replica once a quarter is answered."""
    count = QUICK_ROWS if options.quick else ROWS
    with running_server(options, log) as running:
        size = running.server.size
        report = BenchmarkReport("batch", {"model": size, "rows": count, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS})
        batches = _Batches(running, prompts(MODEL_SIZES[size], count, PROMPT_TOKENS, seed=0), log)
        wanted, row = batches.run(UNDISTURBED)
        report.rows.append({**row, "as_undisturbed": count})
        found, row = batches.run(KILLED, kill_at=count // 4)
        same = sum(name in found and found[name] == text for name, text in wanted.items())
        report.rows.append({**row, "as_undisturbed": same})
    for row in report.rows:
        for what in ("answered", "once", "as_undisturbed", "in_ledger"):
            report.targets.append(Target(f"{row['case']}: {what}", count, exactly(row[what])))
        report.targets.append(Target(f"{row['case']}: failed", 0, exactly(row["failed"]), at_most=True))
    return report


class _Batches:
    """The same rows again and again, as a batch of its own each time."""

    def __init__(self, running: RunningServer, rows: list[list[int]], log: Log) -> None:
        self._running, self._log = running, log
        self._lines = [json.dumps(_line(f"row{number}", prompt)) for number, prompt in enumerate(rows)]
        key = running.local.key(TENANT, "infer", "train")
        self._client = httpx.Client(base_url=running.local.url, headers={"authorization": f"Bearer {key}"}, timeout=120)

    def run(self, case: str, kill_at: int | None = None) -> tuple[dict[str, str], dict[str, Any]]:
        """What each row was answered, and the figures. With `kill_at`, the replica dies after so many answers."""
        used, began = self._used(), time.monotonic()
        file = self._ask("POST", "/v1/files", files={"file": ("rows.jsonl", "\n".join(self._lines).encode())},
                         data={"purpose": "batch"}).json()  # fmt: skip
        asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
        made = self._ask("POST", "/v1/batches", json=asked).json()
        killed_at: int | None = None
        if kill_at is not None:
            _until(lambda: self._completed(made["id"]) >= kill_at)
            kill(of_home(self._running.local.settings.home, "ServeReplica:pedro:engine"))
            killed_at = self._completed(made["id"])
            self._log(f"  the replica was killed after {killed_at:,} answers")
            if killed_at == len(self._lines):
                raise PedroError("the batch was over before its replica was killed; ask for more rows")
        _until(lambda: self._ask("GET", f"/v1/batches/{made['id']}").json()["status"] in OVER)
        ended = self._ask("GET", f"/v1/batches/{made['id']}").json()
        if ended["status"] != "completed":
            raise PedroError(f"the batch ended {ended['status']}: {ended['errors']}")
        seconds = time.monotonic() - began
        output = self._ask("GET", f"/v1/files/{ended['output_file_id']}/content").text.splitlines()
        answers = [json.loads(answer) for answer in output]
        found = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in answers}
        times = Counter(one["custom_id"] for one in answers)
        counts = ended["request_counts"]
        row: dict[str, Any] = {
            "case": case,
            "rows": len(self._lines),
            "killed_at": killed_at,
            "answered": counts["completed"],
        }
        row |= {"failed": counts["failed"], "once": sum(count == 1 for count in times.values())}
        row |= {"in_ledger": self._entered(used), "seconds": round(seconds, 1)}
        self._log(f"  {case}: {row['once']:,} rows answered once in {seconds:.0f} s, {counts['failed']} failed")
        return found, row

    def _entered(self, before: Usage) -> int:
        """Requests that the ledger has more than before, once it has all of their tokens; those it has, if not."""
        expected, until = len(self._lines), time.monotonic() + LEDGER_S
        while True:
            now = self._used()
            requests = now.requests - before.requests
            tokens = now.completion_tokens - before.completion_tokens
            if requests >= expected or time.monotonic() > until:
                return requests if tokens == requests * NEW_TOKENS else 0
            time.sleep(0.5)

    def _used(self) -> Usage:
        from pedro.store import Usage

        return next(iter(self._running.local.store.usage(TENANT, by=[])), Usage())

    def _completed(self, batch: str) -> int:
        """How many rows of a batch are answered."""
        counts = self._ask("GET", f"/v1/batches/{batch}").json()["request_counts"]
        return int((counts or {}).get("completed", 0))

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        reply = self._client.request(method, path, **request)
        if reply.status_code != 200:
            raise PedroError(f"{method} {path} answered {reply.status_code}: {reply.text[:300]}")
        return reply


def _line(name: str, prompt: list[int]) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": body}


def _until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + GUARD_S
    while not condition():
        if time.monotonic() > until:
            raise PedroError(f"the batch did not go on within {GUARD_S:g} s")
        time.sleep(0.2)
