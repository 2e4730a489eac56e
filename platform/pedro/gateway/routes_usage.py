"""/v1/usage: usage by day, tenant, model and key; also in the form of OpenAI's completions usage.

A tenant's key sees its own tenant; an admin key all, or the one that it names. Keys that are restricted to some
adapters see none. Reference: https://platform.openai.com/docs/api-reference/usage/completions
"""

from __future__ import annotations

import asyncio
import calendar
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from pedro.csv_cells import csv_table
from pedro.errors import PedroError, ScopeError
from pedro.gateway.auth import Principal, counted
from pedro.store import INFER, READ, TRAIN, USAGE_GROUPS, Store, Usage, check_period, check_usage_groups, usage_row

FORMATS = ("json", "csv")
ROWS, MAX_ROWS, MAX_CSV_ROWS = 100, 1000, 100_000
BUCKETS, MAX_BUCKETS = 7, 31
OPENAI_GROUPS = {"project_id": "tenant", "api_key_id": "key_id", "model": "model"}
OPENAI_FILTERS = {"project_ids": "tenant", "api_key_ids": "key_id", "models": "model"}
LATEST = 4_102_444_800  # the year 2100, Unix seconds
router = APIRouter()
Caller = Annotated[Principal, Depends(counted(INFER, TRAIN, READ))]


@router.get("/v1/usage")
async def usage(request: Request, caller: Caller) -> Response:
    """A page of sums by the fields in `group_by`, and the overall total."""
    given = _query(request, ("tenant", "group_by", "start_date", "end_date", "limit", "page", "format"))
    by = given.get("group_by") or list(USAGE_GROUPS)
    check_usage_groups("group_by", by)
    since, until = check_period(_one(given, "start_date"), _one(given, "end_date"), ("start_date", "end_date"))
    tenant, as_csv = _tenant(caller, _one(given, "tenant")), _wants_csv(request, _one(given, "format"))
    most = MAX_CSV_ROWS if as_csv else MAX_ROWS
    limit = _number(given, "limit", most if as_csv else ROWS, 1, most)
    offset = _number(given, "page", 0, 0, 10**9)
    store: Store = request.app.state.store
    period: dict[str, Any] = {"since": since, "until": until}
    found = await asyncio.to_thread(store.usage, tenant, **period, by=by, limit=limit + 1, offset=offset)
    rows = [usage_row(used, by) for used in found[:limit]]
    next_page = str(offset + limit) if len(found) > limit else None
    if as_csv:
        headers = {"x-next-page": next_page} if next_page else {}
        return Response(csv_table(usage_row(Usage(), by), rows), media_type="text/csv", headers=headers)
    total = await asyncio.to_thread(store.usage, tenant, **period, by=())
    return JSONResponse(
        {
            "object": "page",
            "data": [{"object": "usage", **row} for row in rows],
            "total": usage_row(total[0] if total else Usage(), ()),
            "has_more": next_page is not None,
            "next_page": next_page,
        }
    )


@router.get("/v1/organization/usage/completions")
async def openai_usage(request: Request, caller: Caller) -> dict[str, Any]:
    """Daily buckets (UTC); a project is a tenant."""
    fields = ("start_time", "end_time", "bucket_width", "group_by", "limit", "page", *OPENAI_FILTERS)
    given = _query(request, fields)
    if _one(given, "bucket_width") not in (None, "1d"):
        raise _wrong("bucket_width", "1d: usage is stored by day", _one(given, "bucket_width"))
    if "start_time" not in given:
        raise PedroError("start_time: is required", param="start_time", code="missing_required_parameter")
    groups = given.get("group_by", [])
    if unknown := next((name for name in groups if name not in OPENAI_GROUPS), None):
        raise _wrong("group_by", f"some of {', '.join(OPENAI_GROUPS)}", unknown)
    first = _day_of(_number(given, "start_time", 0, 0, LATEST))
    end = _number(given, "end_time", int(time.time()) + 1, 1, LATEST)  # excluded
    last, limit = _day_of(end - 1), _number(given, "limit", BUCKETS, 1, MAX_BUCKETS)
    if "page" in given:
        first = max(first, _page_day(_one(given, "page")))
    days = [first + timedelta(days=i) for i in range(limit) if first + timedelta(days=i) <= last]
    wanted = {OPENAI_FILTERS[name]: set(given[name]) for name in OPENAI_FILTERS if name in given}
    store: Store = request.app.state.store
    tenant = _tenant(caller, None)

    def read() -> list[dict[str, Any]]:
        found = store.usage(tenant, since=days[0].isoformat(), until=days[-1].isoformat())
        kept = [u for u in found if u.requests and all(getattr(u, at) in some for at, some in wanted.items())]
        return [_bucket(day, [u for u in kept if u.day == day.isoformat()], groups) for day in days]

    after = first + timedelta(days=limit)
    return {
        "object": "page",
        "data": await asyncio.to_thread(read) if days else [],
        "has_more": after <= last,
        "next_page": after.isoformat() if after <= last else None,
    }


def _bucket(day: date, found: Sequence[Usage], groups: Sequence[str]) -> dict[str, Any]:
    results: dict[tuple[str, ...], dict[str, Any]] = {}
    for used in found:
        key = tuple(getattr(used, OPENAI_GROUPS[name]) for name in groups)
        result = results.setdefault(
            key,
            {
                "object": "organization.usage.completions.result",
                **dict.fromkeys(("input_tokens", "output_tokens", "input_cached_tokens", "num_model_requests"), 0),
                **dict.fromkeys(("project_id", "user_id", "api_key_id", "model", "batch")),
                **dict(zip(groups, key, strict=True)),
            },
        )
        result["input_tokens"] += used.prompt_tokens
        result["output_tokens"] += used.completion_tokens
        result["input_cached_tokens"] += used.cached_tokens
        result["num_model_requests"] += used.requests
    begins = calendar.timegm(day.timetuple())
    return {"object": "bucket", "start_time": begins, "end_time": begins + 86_400, "results": list(results.values())}


def _query(request: Request, known: Sequence[str]) -> dict[str, list[str]]:
    """The query's fields, each a list: repeated, as `name[]`, or comma-separated. Raises PedroError."""
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        field = name.removesuffix("[]")
        if field not in known:
            message = f"{name[:40]}: unknown; known are {', '.join(known)}"
            raise PedroError(message, param=name[:40], code="unknown_parameter")
        if not value.isprintable():
            raise _wrong(field, "plain text", value)
        given.setdefault(field, []).extend(part for part in value.split(",") if part)
    return given


def _one(given: dict[str, list[str]], name: str) -> str | None:
    values = given.get(name)
    if values is not None and len(values) != 1:
        raise _wrong(name, "one value", ",".join(values))
    return None if values is None else values[0]


def _number(given: dict[str, list[str]], name: str, default: int, least: int, most: int) -> int:
    text = _one(given, name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 12 or not least <= int(text) <= most:
        raise _wrong(name, f"a whole number, {least} to {most}", text)
    return int(text)


def _tenant(caller: Principal, named: str | None) -> str | None:
    """The tenant whose usage the caller sees; None: all."""
    if caller.is_admin:
        return named
    if caller.models is not None:
        raise ScopeError(
            "This API key is restricted to some adapters, but usage covers the whole tenant; use another key."
        )
    if named not in (None, caller.tenant):
        raise ScopeError(f"tenant: this API key only sees the usage of {caller.tenant}; leave it out", param="tenant")
    return caller.tenant


def _wants_csv(request: Request, named: str | None) -> bool:
    if named not in (None, *FORMATS):
        raise _wrong("format", " or ".join(FORMATS), named)
    return named == "csv" or (named is None and "text/csv" in request.headers.get("accept", ""))


def _day_of(unix_s: int) -> date:
    return datetime.fromtimestamp(unix_s, UTC).date()


def _page_day(text: str | None) -> date:
    try:
        day = date.fromisoformat(text or "")
    except ValueError:
        day = date.max
    if day > _day_of(LATEST):  # the next day must be valid, too
        raise _wrong("page", "next_page of the page before", text)
    return day


def _wrong(field: str, expected: str, got: str | None) -> PedroError:
    return PedroError(f"{field}: expected {expected}, got {(got or '')[:40]!r}", param=field, code="invalid_value")
