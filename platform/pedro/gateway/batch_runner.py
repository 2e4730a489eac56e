"""Processes batches beside the gateway's requests: leases them, starts and ends the work on each.

Every gateway runs one and renews its leases; once the lease of a killed gateway expires, another one takes the batch. A
tenant's batches are processed one after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.errors import PedroError
from pedro.gateway.auth import Principal
from pedro.gateway.batch_work import BatchLostError, BatchWork, Bench, Ending, ending_of
from pedro.gateway.poll_loop import PollLoop

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pedro.files import Files
    from pedro.store import BatchRecord, Store

POLL_S = 2.0
MOST = 32  # active batches per gateway
MOST_WAITING = 256  # additional batches of which no row can be sent now
RETRY_S = 5.0  # before continuing a batch after a service did not answer
log = logging.getLogger("pedro.gateway")


@dataclass
class _Active:
    """An active batch under one lease, and how it is being ended, if it is."""

    work: BatchWork
    fence: int
    ending: Ending | None
    task: asyncio.Task[None]


class BatchRunner:
    """For one event loop. `clock` gives Unix seconds."""

    def __init__(self, app: FastAPI, store: Store, files: Files, clock: Callable[[], float] = time.time) -> None:
        settings = app.state.settings
        self._store, self.clock = store, clock
        self._lease_s: float = settings.batch_lease_s
        self._owner = f"gateway-{secrets.token_hex(8)}"
        self._bench = Bench(
            app=app,
            store=store,
            files=files,
            threads=app.state.file_threads,
            open_requests=app.state.open_requests,
            clock=lambda: self.clock(),
            max_body_bytes=settings.max_body_bytes,
            rows_of_batch=settings.rows_of_batch,
            rows=asyncio.Semaphore(settings.batch_rows),
        )
        self._active: dict[str, _Active] = {}
        self._loop = PollLoop(self._look, min(POLL_S, self._lease_s / 4), "batches are not processed")

    def start(self) -> None:
        """Look for batches from now on."""
        self._loop.start()

    def wake(self) -> None:
        """Wake up: there is work."""
        self._loop.wake()

    async def close(self) -> None:
        """Stop every batch where it is, for the next gateway."""
        await self._loop.end(active.task for active in self._active.values())
        with contextlib.suppress(PedroError):  # then the leases expire
            await asyncio.to_thread(self._store.release_batches, self._owner)

    async def _look(self) -> None:
        """Start and stop work to match the leased batches and their state."""
        before = set(self._active)
        held = await asyncio.to_thread(self._lease)
        for batch_id in self._active.keys() - {batch.id for batch, _ in held}:
            await self._stop(batch_id)
        for batch, caller in held:
            ending, active = ending_of(batch, self.clock(), caller), self._active.get(batch.id)
            if active is not None and active.fence == batch.fence and (active.ending or not ending):
                active.work.caller = caller
                continue
            if active is None and batch.id in before:
                continue  # it ended meanwhile: the next look sees its new state
            if active is not None:
                await self._stop(batch.id)
            work = BatchWork(self._bench, batch, caller)
            task = asyncio.create_task(self._work(work, batch.id, ending))
            self._active[batch.id] = _Active(work, batch.fence, ending, task)

    def _lease(self) -> list[tuple[BatchRecord, Principal | None]]:
        """The batches to process, each with the caller of its key, unless that has ended. On a thread."""
        now = time.time()
        waiting = sum(active.work.only_waits for active in list(self._active.values()))
        most = MOST + min(waiting, MOST_WAITING)
        batches = self._store.lease_batches(self._owner, now, now + self._lease_s, self.clock(), most)
        keys = [self._store.find_key(batch.key_id) for batch in batches]
        callers = [None if key is None else Principal.of(*key) for key in keys]
        return list(zip(batches, callers, strict=True))

    async def _work(self, work: BatchWork, batch_id: str, ending: Ending | None) -> None:
        try:
            await (work.run() if ending is None else work.end(ending))
        except BatchLostError:
            log.info("%s was taken by another gateway or has ended", batch_id)
        except Exception as error:  # any error: the batch is continued later
            log.warning("%s stands: %s", batch_id, error, exc_info=not isinstance(error, PedroError))
            await asyncio.sleep(RETRY_S)
        self._active.pop(batch_id, None)
        self.wake()

    async def _stop(self, batch_id: str) -> None:
        active = self._active.pop(batch_id, None)
        if active is not None:
            active.task.cancel()
            await asyncio.gather(active.task, return_exceptions=True)
