"""The work on one batch, from its current state to its end: check its rows, send them, write out the answers.

Each step can be repeated: if a batch changes gateways, the next one continues from the stored answers. An interrupted
row is sent again, but answered only once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from pedro.errors import NotFoundError, PedroError
from pedro.files.names import BATCH_OUTPUT
from pedro.gateway.auth import backend_of
from pedro.gateway.batch_rows import MAX_ROWS, BatchRow, RowMistake, answer_line, read_rows, unasked_line
from pedro.gateway.in_process import post
from pedro.store import BatchRecord, BatchStatus

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pedro.files import Files
    from pedro.gateway.auth import Principal
    from pedro.gateway.in_process import Reply
    from pedro.gateway.quotas import OpenRequests
    from pedro.gateway.uploads import FileThreads
    from pedro.store import FileRecord, Store

READ_TOGETHER, READ_BYTES = 64, 1 << 20  # rows read at a time, and bytes after which to stop
MAX_MISTAKES = 100  # that are reported
AWAY = (429, 503, 504)  # statuses that may change on a later attempt
TRIES = 3  # of a row that got an internal error
LONGEST_WAIT_S = 30.0
MOST_ANSWERED = 1 << 30  # characters of a batch's answers stored in the database before they are written out
ASIDE_S = 0.05  # how often a row checks whether other requests are open
UNASKED = {
    BatchStatus.EXPIRED: ("batch_expired", "The completion window ended before this request was answered."),
    BatchStatus.CANCELLED: ("batch_cancelled", "The batch was cancelled before this request was answered."),
    BatchStatus.FAILED: ("batch_failed", "The batch failed before this request was answered."),
}


class BatchLostError(Exception):
    """The batch no longer belongs to this gateway."""


@dataclass(frozen=True)
class Ending:
    """How a batch ends before all its rows are answered."""

    status: BatchStatus
    mistakes: tuple[RowMistake, ...] = ()


@dataclass
class Bench:
    """Shared resources of all batches of one gateway."""

    app: FastAPI
    store: Store
    files: Files
    threads: FileThreads
    open_requests: OpenRequests
    clock: Callable[[], float]
    max_body_bytes: int
    rows_of_batch: int  # concurrent rows of one batch, while no other request is open
    rows: asyncio.Semaphore  # limit for all batches
    asking: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether requests other than batch rows are open."""
        return self.open_requests.total > self.asking


class BatchWork:
    """One batch, under one lease. `caller`, of the batch's key, may be replaced from outside."""

    def __init__(self, bench: Bench, batch: BatchRecord, caller: Principal | None) -> None:
        self._bench, self._batch, self.caller = bench, batch, caller
        self._rows: Iterator[BatchRow | RowMistake] = iter(())
        self._ready: deque[BatchRow] = deque()
        self._answered: set[int] = set()
        self._size = 0  # of the answers, in characters
        self._asking = self._waiting = 0  # rows sent or about to be; rows to be sent again later
        self._reading = asyncio.Lock()

    @property
    def only_waits(self) -> bool:
        """Whether none of its rows can be sent now, for instance because a budget is used up."""
        return self._waiting > 0 and not self._asking

    @property
    def _is_full(self) -> bool:
        """Whether its answers exceed what the database may store."""
        return self._size > MOST_ANSWERED

    @property
    def _asker(self) -> Principal:
        assert self.caller is not None, "batches of ended keys are ended"
        return self.caller

    async def run(self) -> None:
        """Run to the end. Raises BatchLostError, or PedroError if the store or the storage does not answer."""
        store, batch = self._bench.store, self._batch
        try:
            if batch.status is BatchStatus.VALIDATING:
                total, mistakes = await self._check()
                if mistakes:
                    await self.end(Ending(BatchStatus.FAILED, tuple(mistakes)))
                    return
                await self._mine(store.begin_batch, batch, total, self._bench.clock())
                self._batch = batch = replace(batch, total=total)
            if batch.status is not BatchStatus.FINALIZING:
                await self._ask_rows()
                if self._is_full:
                    reason = f"its answers have more than {MOST_ANSWERED:,} characters; split the file, or ask for less"
                    await self.end(Ending(BatchStatus.FAILED, (RowMistake("answers_too_large", reason),)))
                    return
                await self._mine(store.finalize_batch, batch, self._bench.clock())
            await self.end(Ending(BatchStatus.COMPLETED))
        except NotFoundError:
            reason = f"{batch.input_file_id} was deleted, or has expired"
            await self.end(Ending(BatchStatus.FAILED, (RowMistake("input_file_gone", reason, param="input_file_id"),)))

    async def end(self, ending: Ending) -> None:
        """Write the output and error files, and record the end."""
        await self._bench.threads.run(self._end, ending)

    async def _check(self) -> tuple[int, list[RowMistake]]:
        """Count the rows and validate the file."""
        stream = await self._open()
        try:
            total, models, mistakes = await self._bench.threads.run(self._scan, stream)
        finally:
            stream.close()
        backend = backend_of(self._bench.app, self._asker)
        for model, line in models.items():
            if len(mistakes) > MAX_MISTAKES:
                break
            try:
                await backend.get_model(self._asker.view, model)
            except PedroError as error:
                if error.status in AWAY:
                    raise
                mistakes.append(RowMistake(error.code or "invalid_model", error.message, line, "body.model"))
        return total, sorted(mistakes, key=lambda one: one.line or 0)[:MAX_MISTAKES]

    def _scan(self, stream: Any) -> tuple[int, dict[str, int], list[RowMistake]]:
        """The number of rows, each model's first line, and mistakes. On a thread."""
        total, models, mistakes = 0, dict[str, int](), list[RowMistake]()
        for row in read_rows(stream, self._batch.endpoint, self._bench.max_body_bytes):
            if isinstance(row, RowMistake):
                mistakes.append(row)
            else:
                models.setdefault(row.model, row.line)
            total += 1
            if total > MAX_ROWS:
                message = f"the file has more than {MAX_ROWS:,} requests, the most of a batch"
                return total, {}, [RowMistake("too_many_requests", message)]
            if len(mistakes) > MAX_MISTAKES:
                break
        if not total:
            mistakes.append(RowMistake("empty_file", "the file has no requests"))
        return total, models, mistakes

    async def _ask_rows(self) -> None:
        """Send the unanswered rows, a few at a time."""
        bench, batch = self._bench, self._batch
        self._answered = await asyncio.to_thread(bench.store.answered_lines, batch.id)
        self._size = await asyncio.to_thread(bench.store.answers_size, batch.id)
        stream = await self._open()
        try:
            self._rows = read_rows(stream, batch.endpoint, bench.max_body_bytes)
            askers = [asyncio.create_task(self._ask_in_turn(place)) for place in range(bench.rows_of_batch)]
            try:
                await asyncio.gather(*askers)
            finally:
                for asker in askers:
                    asker.cancel()
                await asyncio.gather(*askers, return_exceptions=True)
        finally:
            stream.close()

    async def _ask_in_turn(self, place: int) -> None:
        """Send one row after another. All but the first worker pause while other requests are open."""
        while not self._is_full and (row := await self._next_row()):
            while place and self._bench.is_busy:
                await asyncio.sleep(ASIDE_S)
            await self._ask(row)

    async def _next_row(self) -> BatchRow | None:
        async with self._reading:
            while not self._ready:
                block = await self._bench.threads.run(_some, self._rows)
                if not block:
                    return None
                self._ready += (row for row in block if isinstance(row, BatchRow) and row.line not in self._answered)
            return self._ready.popleft()

    async def _ask(self, row: BatchRow) -> None:
        batch, request_id = self._batch, f"{self._batch.id}-{row.line}"
        tries = 0
        while True:
            tries += 1
            self._asking += 1
            try:
                reply = await self._reply(row, request_id)
            finally:
                self._asking -= 1
            wait_s = _wait_s(reply, tries)
            if wait_s is None:
                break
            self._waiting += 1
            try:
                await asyncio.sleep(wait_s)
            finally:
                self._waiting -= 1
            if self._is_full:
                return
        line = await asyncio.to_thread(answer_line, batch.id, row, reply, request_id)
        self._size += len(line)
        if self._is_full:
            return
        await self._mine(self._bench.store.add_batch_answer, batch, row.line, reply.status, line)

    async def _reply(self, row: BatchRow, request_id: str) -> Reply:
        async with self._bench.rows:
            self._bench.asking += 1
            try:
                return await post(self._bench.app, self._batch.endpoint, row.body, self._asker, request_id)
            finally:
                self._bench.asking -= 1

    async def _mine(self, change: Callable[..., bool], *args: Any) -> None:
        if not await asyncio.to_thread(change, *args):
            raise BatchLostError

    async def _open(self) -> Any:
        files, batch = self._bench.files, self._batch
        record = await self._bench.threads.run(files.get, batch.input_file_id, batch.tenant)
        return await self._bench.threads.run(files.open, record)

    def _end(self, ending: Ending) -> None:
        """On a thread: write bytes first, then rows and state together; remove files that were not recorded."""
        bench, batch = self._bench, self._batch
        kept: list[FileRecord | None] = []
        try:
            kept.append(self._written(bench.store.read_answers(batch.id, good=True), "output"))
            kept.append(self._written(self._failures(ending), "error"))
            errors = [mistake.to_dict() for mistake in ending.mistakes] or None
            if not bench.store.end_batch(batch, ending.status, bench.clock(), kept, errors):
                raise BatchLostError
        except BaseException:
            for record in kept:
                if record is not None:
                    bench.files.contents.remove(record.location)
            raise

    def _failures(self, ending: Ending) -> Iterator[str]:
        """Answers that are errors, then a line for each unanswered row."""
        bench, batch = self._bench, self._batch
        yield from bench.store.read_answers(batch.id, good=False)
        if ending.status not in UNASKED or (ending.status is BatchStatus.FAILED and not batch.total):
            return
        answered = bench.store.answered_lines(batch.id)
        try:
            stream = bench.files.open(bench.files.get(batch.input_file_id, batch.tenant))
        except NotFoundError:  # a deleted file has no rows to list
            return
        with stream:
            for row in islice(read_rows(stream, batch.endpoint, bench.max_body_bytes), MAX_ROWS):  # may be unchecked
                if isinstance(row, BatchRow) and row.line not in answered:
                    yield unasked_line(batch.id, row, *UNASKED[ending.status])

    def _written(self, lines: Iterator[str], what: str) -> FileRecord | None:
        """A file of these lines, not visible yet; None if there are none."""
        upload, files, batch = None, self._bench.files, self._batch
        try:
            for line in lines:
                upload = upload or files.begin(batch.tenant, limited=False)
                upload.write(line.encode() + b"\n")
            if upload is None:
                return None
            name = f"{batch.id}_{what}.jsonl"
            return files.keep(upload, name, BATCH_OUTPUT, batch.output_expiry_s, key_id=batch.key_id)
        finally:
            if upload is not None:
                upload.abandon()


def _some(rows: Iterator[BatchRow | RowMistake]) -> list[BatchRow | RowMistake]:
    """The next rows, limited by bytes too: a row may be as large as a request."""
    block: list[BatchRow | RowMistake] = []
    size = 0
    for row in islice(rows, READ_TOGETHER):
        block.append(row)
        size += len(row.body) if isinstance(row, BatchRow) else 0
        if size > READ_BYTES:
            break
    return block


def _wait_s(reply: Reply, tries: int) -> float | None:
    """How long to wait before a row is sent again; None: this is its answer."""
    backoff = min(2.0 ** min(tries - 1, 10), LONGEST_WAIT_S)
    after = reply.headers.get("retry-after")
    if reply.status in (429, 503) and after is not None:  # over a quota, or a full queue: wait
        return min(max(float(after), backoff), LONGEST_WAIT_S)
    if reply.status == 503 and _code(reply) != "overloaded":  # the engine is not available
        return backoff
    if reply.status >= 500 and _code(reply) != "adapter_unusable" and tries < TRIES:
        return backoff
    return None


def _code(reply: Reply) -> str:
    return str(reply.json()["error"].get("code"))


def ending_of(batch: BatchRecord, now: float, caller: Principal | None) -> Ending | None:
    """How the batch must be ended now; None: it continues."""
    if batch.status is BatchStatus.FINALIZING:
        return None
    if batch.status is BatchStatus.CANCELLING:
        return Ending(BatchStatus.CANCELLED)
    if now >= batch.expires:
        return Ending(BatchStatus.EXPIRED)
    if caller is None:
        reason = "the API key that made the batch has ended"
        return Ending(BatchStatus.CANCELLED, (RowMistake("invalid_api_key", reason),))
    return None
