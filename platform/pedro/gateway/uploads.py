"""Receives an upload: stores a form's file for the tenant, or leaves nothing behind.

Data are written by threads in blocks, so that the event loop never waits for a disk. A tenant may have a few uploads
open at once, since each occupies a connection and storage.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from pedro.errors import PedroError, RateLimitError
from pedro.files import check_expiry, check_filename, check_purpose
from pedro.gateway.answer import to_its_end
from pedro.gateway.auth import actor_of
from pedro.gateway.errors import RequestTimeoutError
from pedro.gateway.multipart import FormPart, read_form

if TYPE_CHECKING:
    from fastapi import Request

    from pedro.files import Files, Upload
    from pedro.gateway.auth import Principal
    from pedro.store import FileRecord

BLOCK = 1 << 20
THREADS = 8
MAX_FIELD = 1024  # bytes of a plain field
OVERHEAD = 64 * 2**10  # of a form, around its file
PURPOSE, ANCHOR, SECONDS = "purpose", "expires_after[anchor]", "expires_after[seconds]"
FIELDS = (PURPOSE, ANCHOR, SECONDS)
FILE = "file"
P = ParamSpec("P")
T = TypeVar("T")


class FileThreads:
    """Threads for storage access: a slow storage blocks nothing else in the gateway."""

    def __init__(self, count: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(count, "files")

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `work`, run on one of them."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args, **kwargs))

    def close(self) -> None:
        """Let them finish; queued work is not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class OpenUploads:
    """How many uploads each tenant has open. For one event loop: not thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @contextmanager
    def enter(self, tenant: str) -> Iterator[None]:
        """Raises RateLimitError if the tenant has too many."""
        if self._held[tenant] >= self._most:
            raise RateLimitError(f"{self._most} of your uploads are open, which is the limit; wait for one to end.")
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]


async def receive_file(request: Request, caller: Principal, files: Files) -> FileRecord:
    """Read the request's form and store its file. If it raises PedroError, nothing is stored."""
    settings = request.app.state.settings
    declared = request.headers.get("content-length", "")
    threads: FileThreads = request.app.state.file_threads
    await threads.run(files.check_room, caller.tenant, max(0, int(declared) - OVERHEAD) if _number(declared) else 0)
    receiver = _Receiver(request, caller, files)
    try:
        async with asyncio.timeout(settings.upload_timeout_s):
            async for event in read_form(request):
                await receiver.accept(event)
        return await receiver.finish()
    except TimeoutError:
        raise RequestTimeoutError(f"The upload did not arrive within {settings.upload_timeout_s:g} s.") from None
    finally:
        await to_its_end(receiver.abandon())


class _Receiver:
    """One form on its way in."""

    def __init__(self, request: Request, caller: Principal, files: Files) -> None:
        self._files, self._caller = files, caller
        self._actor = actor_of(request, caller)
        self._threads: FileThreads = request.app.state.file_threads
        self._fields: dict[str, bytearray] = {}
        self._into: str = ""
        self._upload: Upload | None = None
        self._beginning: asyncio.Future[Upload] | None = None
        self._filename = ""
        self._block = bytearray()

    async def accept(self, event: FormPart | bytes) -> None:
        if isinstance(event, FormPart):
            await self._start(event)
        elif self._into == FILE:
            self._block += event
            if len(self._block) >= BLOCK:
                await self._flush()
        else:
            field = self._fields[self._into]
            field += event
            if len(field) > MAX_FIELD:
                raise PedroError(f"{self._into}: longer than {MAX_FIELD} bytes", param=self._into, code="invalid_value")

    async def finish(self) -> FileRecord:
        purpose, expires_after_s = self._checked()
        if self._upload is None:
            raise PedroError("file: is required", param=FILE, code="missing_required_parameter")
        await self._flush()
        key_id, actor = self._caller.key_id, self._actor
        return await self._threads.run(
            self._files.finish, self._upload, self._filename, purpose, expires_after_s, key_id=key_id, actor=actor
        )

    async def abandon(self) -> None:
        """Remove an incomplete file."""
        if self._upload is None and self._beginning is not None:
            with suppress(PedroError):
                self._upload = await self._beginning
        if self._upload is not None:
            await self._threads.run(self._upload.abandon)

    async def _start(self, part: FormPart) -> None:
        if part.name in self._fields or (part.name == FILE and self._upload is not None):
            raise PedroError(f"{part.name}: given twice", param=part.name, code="invalid_value")
        self._into = part.name
        if part.name != FILE:
            if part.name not in FIELDS:
                message = (
                    f"Unrecognized request argument supplied: {part.name[:80]}; known: {', '.join(FIELDS)}, {FILE}"
                )
                raise PedroError(message, param=part.name[:80], code="unknown_parameter")
            self._fields[part.name] = bytearray()
            return
        if part.filename is None:
            raise PedroError("file: expected a file with a name, got a plain field", param=FILE, code="invalid_value")
        self._filename = check_filename(part.filename)
        if PURPOSE in self._fields:  # clients send fields first: report their errors before reading the bytes
            self._checked()
        self._beginning = asyncio.ensure_future(self._threads.run(self._files.begin, self._caller.tenant))
        self._upload = await asyncio.shield(self._beginning)  # a started thread continues

    def _checked(self) -> tuple[str, int | None]:
        purpose = self._field(PURPOSE)
        if purpose is None:
            raise PedroError("purpose: is required", param=PURPOSE, code="missing_required_parameter")
        return check_purpose(purpose), check_expiry(self._field(ANCHOR), self._field(SECONDS))

    def _field(self, name: str) -> str | None:
        raw = self._fields.get(name)
        return None if raw is None else raw.decode(errors="replace")

    async def _flush(self) -> None:
        assert self._upload is not None, "bytes of a file come after its head"
        block, self._block = bytes(self._block), bytearray()
        if block:
            await self._threads.run(self._upload.write, block)


def _number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19
