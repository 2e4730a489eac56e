"""The gateway's OpenAPI document: what FastAPI knows of each route, and what `openapi_routes.py` tells beside it.

Handlers read bodies and queries by hand, so that what is wrong with them is told in OpenAI's form; here is the same in
JSON Schema. Reference: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

import pedro
from pedro.gateway.openapi_routes import AFTER, EVENTS, IDS, ROUTES, RouteDoc

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pedro.gateway.schemas import Body

JSON = "application/json"
REF = "#/components/schemas/{model}"
TEXT_OR_NULL = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "description": "https://platform.openai.com/docs/guides/error-codes",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": TEXT_OR_NULL,
                "code": TEXT_OR_NULL,
            },
        }
    },
}
EVENT = {
    "type": "object",
    "description": "Each event of the stream; `data` is JSON, or [DONE].",
    "required": ["data"],
    "additionalProperties": False,
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
ANY = (431, 500)  # whatever is asked for
OF_KEYS = (401, 403, 429, 503)
OF_BODIES = (400, 408, 413)
OF_PATHS = (400, 404, 405)  # a slash in an id leads to another route
MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or one that is not known (any more).",
    403: "The key lacks the scope, or is held to other adapters.",
    404: "Unknown, or of another tenant.",
    405: "The route has other methods.",
    408: "The body did not arrive in time.",
    409: "The state of the thing does not allow this now.",
    413: "The body is too large.",
    429: "Over a quota, or over the tenant's share; `Retry-After` tells when to try again.",
    431: "Too many headers, or too long ones.",
    500: "A fault of the server's own.",
    503: "Something that this needs does not answer, or is not set up.",
    504: "It took longer than it may.",
}


def document(app: FastAPI) -> dict[str, Any]:
    """Every route with its parameters, its body and all that it may answer."""
    found = get_openapi(
        title="pedro",
        version=pedro.__version__,
        description="OpenAI's API, and what operators need.",
        routes=app.routes,
    )
    kinds: list[type[Body]] = sorted({t.body for t in ROUTES.values() if t.body is not None}, key=lambda k: k.__name__)
    _, shared = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REF)
    schemas: dict[str, Any] = shared["$defs"]
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _complete(operation, ROUTES[f"{method.upper()} {path}"])
    operations = {f"{method.upper()} {path}": o for path, of in found["paths"].items() for method, o in of.items()}
    for source, places in IDS.items():
        links = {o["operationId"]: _link(route, o, places) for route, o in operations.items() if route != source}
        operations[source]["responses"]["200"]["links"] = {name: link for name, link in links.items() if link}
    found["components"] = {
        "schemas": {**schemas, "Error": ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer sk-…"}},
    }
    return found


def _complete(operation: dict[str, Any], told: RouteDoc) -> None:
    paths = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "path"]
    operation["parameters"] = [*paths, *told.parameters]
    operation["security"] = [] if told.public else [{"key": []}]
    if told.body is not None:
        content = {JSON: {"schema": {"$ref": REF.format(model=told.body.__name__)}}}
        operation["requestBody"] = {"required": told.body_needed, "content": content}
    elif told.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": told.form}}}
    statuses = {*ANY, *told.also}
    statuses |= set() if told.public else set(OF_KEYS)
    statuses |= set(OF_BODIES) if told.body is not None or told.form is not None else set()
    statuses |= {400} if told.parameters else set()
    statuses |= {404} if AFTER in told.parameters else set()
    statuses |= set(OF_PATHS) if paths else set()
    wrong = {JSON: {"schema": {"$ref": REF.format(model="Error")}}}
    operation["responses"] = {
        "200": {"description": "As asked.", "content": {kind: _answer(told, kind) for kind in told.media}},
        **{str(status): {"description": MEANINGS[status], "content": wrong} for status in sorted(statuses)},
        **{
            str(status): {"description": MEANINGS[status], "content": {JSON: {"schema": _object(names)}}}
            for status, names in told.instead.items()
        },
    }


def _link(route: str, operation: dict[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """How to ask `route` for what an answer with values at these places told; empty if it takes none of them."""
    of_path, body = re.findall(r"{(\w+)}", route), ROUTES[route].body
    of_body = [] if body is None or of_path else [name for name in places if name in body.model_fields]
    taken = of_path or of_body
    if not taken or not places.keys() >= set(taken):
        return {}
    where = "parameters" if of_path else "requestBody"
    return {"operationId": operation["operationId"], where: {name: f"$response.body#{places[name]}" for name in taken}}


def _answer(told: RouteDoc, media: str) -> dict[str, Any]:
    if media == EVENTS:
        return {"schema": EVENT}
    return {"schema": _object(told.answer) if media == JSON else {"type": "string"}}


def _object(names: tuple[str, ...]) -> dict[str, Any]:
    """An object that has at least these fields."""
    return {"type": "object", "required": list(names), "properties": {name: {} for name in names}}
