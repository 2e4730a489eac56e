"""Parameters and responses of every route of the gateway, for its OpenAPI document. A test checks completeness.

`answer`: the fields that a JSON response always has. `also`: statuses beyond those common to all such routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pedro.files.names import MAX_EXPIRY_S, MIN_EXPIRY_S, PURPOSES
from pedro.gateway.embeddings import EmbeddingsRequest
from pedro.gateway.fine_tuning import JobRequest
from pedro.gateway.pages import MAX_LIMIT
from pedro.gateway.response_fields import ResponsesRequest
from pedro.gateway.routes_audit import LISTS, MOMENTS
from pedro.gateway.routes_batches import BatchRequest
from pedro.gateway.routes_files import MAX_LISTED
from pedro.gateway.routes_usage import FORMATS, MAX_BUCKETS, MAX_CSV_ROWS, OPENAI_FILTERS, OPENAI_GROUPS
from pedro.gateway.schemas import (
    Body,
    CanaryRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    FeedbackRequest,
    PromoteRequest,
    ShadowRequest,
    TokenizeRequest,
)
from pedro.gateway.webhook_fields import RotateRequest, WebhookRequest, WebhookTest, WebhookUpdate
from pedro.store import USAGE_GROUPS
from pedro.traffic.history import LONGEST_S

JSON, EVENTS = "application/json", "text/event-stream"
Schema = dict[str, Any]


@dataclass(frozen=True)
class RouteDoc:
    """One route."""

    answer: tuple[str, ...] = ()
    body: type[Body] | None = None
    body_needed: bool = True
    form: Schema | None = None
    parameters: tuple[Schema, ...] = ()  # FastAPI adds those of the path
    also: tuple[int, ...] = ()
    instead: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # other successes: fields by status
    media: tuple[str, ...] = (JSON,)
    public: bool = False  # needs no key


def _query(name: str, schema: Schema, meaning: str = "", **more: Any) -> Schema:
    return {"name": name, "in": "query", "schema": schema, "description": meaning, **more}


def _header(name: str, schema: Schema, meaning: str) -> Schema:
    return {"name": name, "in": "header", "schema": schema, "description": meaning}


def _whole(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _several(name: str, schema: Schema, meaning: str = "") -> Schema:
    return _query(name, {"type": "array", "items": schema, "minItems": 1}, meaning)


TEXT: Schema = {"type": "string"}
DAY: Schema = {"type": "string", "format": "date"}
UNIX_S: Schema = _whole(0, 4_102_444_800)
AFTER = _query("after", TEXT, "The last id of the previous page.")
PAGE = (AFTER, _query("limit", _whole(1, MAX_LIMIT), "Rows per page."))
TIMEOUT = _header("x-request-timeout", {"type": "number", "exclusiveMinimum": 0}, "Time limit of the answer in s.")
KEY = {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[ -~]+$"}
ONCE = _header("Idempotency-Key", KEY, "Repeated requests with the same key create one job.")
DRY_RUN = _query("dry_run", {"type": "string", "enum": ["true", "false"]}, "Only estimate the job.")
LABELS = {"type": "object", "additionalProperties": TEXT, "maxProperties": 16}
METADATA = _query("metadata", LABELS, "Only jobs with these labels.", style="deepObject", explode=True)
EFFECTIVE = {"type": "object", "additionalProperties": False, "properties": {m: _whole(0, 2**53 - 1) for m in MOMENTS}}
EFFECTIVE_AT = _query("effective_at", EFFECTIVE, "Unix seconds.", style="deepObject", explode=True)
UPLOAD: Schema = {
    "type": "object",
    "required": ["purpose", "file"],
    "additionalProperties": False,
    "properties": {
        "purpose": {"type": "string", "enum": list(PURPOSES)},
        "file": {"type": "string", "format": "binary"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": _whole(MIN_EXPIRY_S, MAX_EXPIRY_S),
    },
}

LIST = ("object", "data")
PAGED = ("object", "data", "has_more", "first_id", "last_id")
CHOICES = ("id", "object", "created", "model", "choices", "usage")
ADAPTER = ("object", "name", "aliases", "versions")
RESIDENCE = ("object", "model", "residence")
FILE = ("id", "object", "bytes", "created_at", "filename", "purpose", "status")
JOB = ("object", "id", "model", "created_at", "status", "training_file", "hyperparameters", "error")
BATCH = ("id", "object", "endpoint", "input_file_id", "status", "created_at", "request_counts")
WEBHOOK = ("id", "object", "name", "url", "event_types", "created_at")
DELETED = ("id", "object", "deleted")
LATE = 504


def _generates(body: type[Body], answer: tuple[str, ...], media: tuple[str, ...] = (JSON, EVENTS)) -> RouteDoc:
    return RouteDoc(answer, body, parameters=(TIMEOUT,), also=(404, LATE), media=media)


ROUTES: dict[str, RouteDoc] = {
    "GET /openapi.json": RouteDoc(("openapi", "paths")),
    "GET /health": RouteDoc(("status",), public=True),
    "GET /ready": RouteDoc(("status",), public=True, instead={503: ("status",)}),
    "GET /metrics": RouteDoc(media=("text/plain",)),
    "GET /metrics/history": RouteDoc(
        parameters=(
            _query("seconds", {"type": "number", "minimum": 1, "maximum": LONGEST_S}, "The last ones."),
            _query("after", {"type": "number", "minimum": 0, "maximum": 4_102_444_800}, "Unix seconds."),
        ),
    ),
    "POST /v1/completions": _generates(CompletionRequest, CHOICES),
    "POST /v1/chat/completions": _generates(ChatRequest, CHOICES),
    "POST /v1/responses": _generates(ResponsesRequest, ("id", "object", "status", "model", "output", "usage")),
    "POST /v1/embeddings": _generates(EmbeddingsRequest, ("object", "data", "model", "usage"), (JSON,)),
    "POST /tokenize": RouteDoc(("count", "max_model_len", "tokens", "token_strs"), TokenizeRequest, also=(404, LATE)),
    "POST /detokenize": RouteDoc(("prompt",), DetokenizeRequest, also=(404, LATE)),
    "GET /tokenizer_info": RouteDoc(("tokenizer_class",)),
    "GET /v1/models": RouteDoc(LIST),
    "GET /v1/models/{name}": RouteDoc(("id", "object", "created", "owned_by")),
    "DELETE /v1/models/{name}": RouteDoc(DELETED, also=(409,)),
    "GET /v1/adapters": RouteDoc(LIST),
    "GET /v1/adapters/{name}": RouteDoc(ADAPTER),
    "POST /v1/adapters/{name}/promote": RouteDoc(ADAPTER, PromoteRequest, also=(409,)),
    "POST /v1/adapters/{name}/rollback": RouteDoc(ADAPTER, also=(409,)),
    "POST /v1/adapters/{name}/canary": RouteDoc(ADAPTER, CanaryRequest, also=(409,)),
    "POST /v1/adapters/{name}/shadow": RouteDoc(ADAPTER, ShadowRequest, also=(409,)),
    "POST /v1/adapters/{name}/feedback": RouteDoc(("object", "model", "score", "counted"), FeedbackRequest),
    "DELETE /v1/adapters/{name}/versions/{version}": RouteDoc(DELETED, also=(409,)),
    **{
        f"POST /v1/adapters/{{ref}}/{what}": RouteDoc(RESIDENCE, also=(409, LATE))
        for what in ("load", "pin", "unpin", "unload")
    },
    "POST /v1/files": RouteDoc(FILE, form=UPLOAD),
    "GET /v1/files": RouteDoc(
        PAGED,
        parameters=(
            AFTER,
            _query("limit", _whole(1, MAX_LISTED), "Rows per page."),
            _query("order", {"type": "string", "enum": ["asc", "desc"]}, "By creation time."),
            _query("purpose", {"type": "string", "enum": list(PURPOSES)}),
        ),
    ),
    "GET /v1/files/{file_id}": RouteDoc(FILE),
    "GET /v1/files/{file_id}/content": RouteDoc(media=("application/octet-stream",)),
    "DELETE /v1/files/{file_id}": RouteDoc(DELETED, also=(409,)),
    "POST /v1/fine_tuning/jobs": RouteDoc(("object",), JobRequest, parameters=(DRY_RUN, ONCE), also=(409, LATE)),
    "GET /v1/fine_tuning/jobs": RouteDoc(PAGED, parameters=(*PAGE, METADATA)),
    "GET /v1/fine_tuning/jobs/{job_id}": RouteDoc(JOB),
    **{
        f"POST /v1/fine_tuning/jobs/{{job_id}}/{what}": RouteDoc(JOB, also=(409,))
        for what in ("cancel", "pause", "resume")
    },
    **{
        f"GET /v1/fine_tuning/jobs/{{job_id}}/{what}": RouteDoc(PAGED, parameters=PAGE)
        for what in ("events", "checkpoints")
    },
    "POST /v1/batches": RouteDoc(BATCH, BatchRequest),
    "GET /v1/batches": RouteDoc(PAGED, parameters=PAGE),
    "GET /v1/batches/{batch_id}": RouteDoc(BATCH),
    "POST /v1/batches/{batch_id}/cancel": RouteDoc(BATCH, also=(409,)),
    "GET /v1/webhook_event_types": RouteDoc(LIST),
    "POST /v1/webhook_endpoints": RouteDoc((*WEBHOOK, "signing_secret"), WebhookRequest),
    "GET /v1/webhook_endpoints": RouteDoc(PAGED, parameters=PAGE),
    "GET /v1/webhook_endpoints/{endpoint_id}": RouteDoc(WEBHOOK),
    "POST /v1/webhook_endpoints/{endpoint_id}": RouteDoc(WEBHOOK, WebhookUpdate),
    "DELETE /v1/webhook_endpoints/{endpoint_id}": RouteDoc(DELETED),
    "POST /v1/webhook_endpoints/{endpoint_id}/rotate_secret": RouteDoc(
        (*WEBHOOK, "signing_secret"), RotateRequest, body_needed=False
    ),
    "POST /v1/webhook_endpoints/{endpoint_id}/test": RouteDoc(
        ("object", "status_code"), WebhookTest, body_needed=False
    ),
    "GET /v1/usage": RouteDoc(
        ("object", "data", "total", "has_more", "next_page"),
        parameters=(
            _query("tenant", TEXT),
            _several("group_by", {"type": "string", "enum": list(USAGE_GROUPS)}),
            _query("start_date", DAY, "The first day (UTC)."),
            _query("end_date", DAY, "The last day (UTC)."),
            _query("limit", _whole(1, MAX_CSV_ROWS), "Rows per page; at most 1000 in JSON."),
            _query("page", _whole(0, 10**9), "`next_page` of the previous page."),
            _query("format", {"type": "string", "enum": list(FORMATS)}),
        ),
        media=(JSON, "text/csv"),
    ),
    "GET /v1/organization/usage/completions": RouteDoc(
        ("object", "data", "has_more", "next_page"),
        parameters=(
            _query("start_time", UNIX_S, "Unix seconds.", required=True),
            _query("end_time", UNIX_S, "Unix seconds, excluded."),
            _query("bucket_width", {"type": "string", "enum": ["1d"]}),
            _several("group_by", {"type": "string", "enum": list(OPENAI_GROUPS)}),
            _query("limit", _whole(1, MAX_BUCKETS), "Days."),
            _query("page", DAY, "`next_page` of the previous page."),
            *(_several(name, TEXT) for name in OPENAI_FILTERS),
        ),
    ),
    "GET /v1/organization/audit_logs": RouteDoc(
        PAGED,
        parameters=(*PAGE, EFFECTIVE_AT, *(_several(name, TEXT) for name in LISTS)),
    ),
}

# Links: values in a route's response that are parameters or fields of other routes, and their place in the response.
IDS: dict[str, dict[str, str]] = {
    "POST /v1/files": {"file_id": "/id", "training_file": "/id", "input_file_id": "/id"},
    "GET /v1/files": {"file_id": "/data/0/id"},
    "POST /v1/fine_tuning/jobs": {"job_id": "/id"},
    "GET /v1/fine_tuning/jobs": {"job_id": "/data/0/id"},
    "POST /v1/batches": {"batch_id": "/id"},
    "GET /v1/batches": {"batch_id": "/data/0/id"},
    "POST /v1/webhook_endpoints": {"endpoint_id": "/id"},
    "GET /v1/webhook_endpoints": {"endpoint_id": "/data/0/id"},
    "GET /v1/adapters": {"name": "/data/0/name", "ref": "/data/0/name", "model": "/data/0/name"},
    "GET /v1/adapters/{name}": {"name": "/name", "version": "/versions/0/version"},
}
