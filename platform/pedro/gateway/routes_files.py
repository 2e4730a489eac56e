"""/v1/files: a tenant's uploaded files, for OpenAI's clients.

Reference: https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from pedro.errors import ScopeError, UnavailableError
from pedro.files import Files, check_purpose
from pedro.files.names import MADE
from pedro.gateway.auth import Principal, actor_of, require
from pedro.gateway.pages import known_parameters, page, page_limit, wrong_value
from pedro.gateway.quotas import admit
from pedro.gateway.uploads import FileThreads, receive_file
from pedro.store import READ, TRAIN, FileRecord

router = APIRouter(prefix="/v1/files")
Trainer = Annotated[Principal, Depends(require(TRAIN))]
Reader = Annotated[Principal, Depends(require(READ, TRAIN))]
MAX_LISTED = 10_000
BLOCK = 1 << 18


@router.post("")
async def create_file(request: Request, caller: Trainer) -> dict[str, Any]:
    await admit(request, caller)
    with request.app.state.open_uploads.enter(caller.tenant):
        return _file(await receive_file(request, caller, _files(request, caller)))


@router.get("")
async def list_files(request: Request, caller: Reader) -> dict[str, Any]:
    await admit(request, caller)
    query = _ListQuery(request.query_params.multi_items())
    found = await _threads(request).run(
        _files(request, caller).list_files,
        caller.tenant,
        purpose=query.purpose,
        after=query.after,
        limit=query.limit + 1,
        oldest_first=query.oldest_first,
    )
    return page(found, query.limit, _file)


@router.get("/{file_id}")
async def get_file(request: Request, file_id: str, caller: Reader) -> dict[str, Any]:
    await admit(request, caller)
    return _file(await _threads(request).run(_files(request, caller).get, file_id, caller.tenant))


@router.get("/{file_id}/content")
async def get_content(request: Request, file_id: str, caller: Reader) -> StreamingResponse:
    await admit(request, caller)
    files = _files(request, caller)
    record = await _threads(request).run(files.get, file_id, caller.tenant)
    stream = await _threads(request).run(files.open, record)
    headers = {
        "content-length": str(record.bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    blocks = _blocks(_threads(request), stream)
    return StreamingResponse(blocks, headers=headers, media_type="application/octet-stream")


@router.delete("/{file_id}")
async def delete_file(request: Request, file_id: str, caller: Trainer) -> dict[str, Any]:
    await admit(request, caller)
    files = _files(request, caller)
    record = await _threads(request).run(files.get, file_id, caller.tenant)
    await _threads(request).run(files.delete, record, actor=actor_of(request, caller))
    return {"id": record.id, "object": "file", "deleted": True}


class _ListQuery:
    """The parameters of a list. Raises PedroError for invalid ones."""

    def __init__(self, query: Iterable[tuple[str, str]]) -> None:
        given = known_parameters(query, ("after", "limit", "order", "purpose"))
        order = given.get("order", "desc")
        if order not in ("asc", "desc"):
            raise wrong_value("order", 'expected "asc" or "desc"', order)
        self.limit = page_limit(given.get("limit"), MAX_LISTED, MAX_LISTED)
        self.oldest_first = order == "asc"
        self.after = given.get("after")
        purpose = given.get("purpose")
        self.purpose = purpose if purpose is None or purpose in MADE else check_purpose(purpose)


def _files(request: Request, caller: Principal) -> Files:
    if caller.models is not None:
        raise ScopeError(
            "This API key is restricted to some adapters, but files belong to the whole tenant; use another key."
        )
    files: Files | None = request.app.state.files
    if files is None:
        raise UnavailableError("This server has no storage for files.", code="storage")
    return files


def _threads(request: Request) -> FileThreads:
    threads: FileThreads = request.app.state.file_threads
    return threads


def _file(record: FileRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.bytes,
        "created_at": int(record.created),
        "expires_at": None if record.expires is None else int(record.expires),
        "filename": record.filename,
        "purpose": record.purpose,
        "status": "processed",  # the job that uses it validates it
        "status_details": None,
    }


async def _blocks(threads: FileThreads, stream: BinaryIO) -> AsyncIterator[bytes]:
    with stream:
        while block := await threads.run(stream.read, BLOCK):
            yield block
