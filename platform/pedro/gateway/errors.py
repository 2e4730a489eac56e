"""Turns any error into OpenAI's error body.

Only the text of a `PedroError` reaches a client; everything else goes to the log with the request id.
Shape: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pedro.errors import AdapterUnusableError, PedroError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

CLIENTS_WAIT_S = 60  # OpenAI's clients ignore longer waits and retry at once
AWAY, AWAY_S = ("database", "adapter_unavailable"), 5.0
"""Codes of unavailable services, with a retry delay: without one OpenAI's clients give up within two seconds."""
log = logging.getLogger("pedro.gateway")


class PayloadTooLargeError(PedroError):
    """The request body is over the limit."""

    code = "request_too_large"
    status = 413


class HeadersTooLargeError(PedroError):
    """The request's headers are too many or too long."""

    code = "headers_too_large"
    status = 431


class RequestTimeoutError(PedroError):
    """The request body did not arrive in time."""

    type = "timeout_error"
    code = "request_timeout"
    status = 408


def error_response(error: PedroError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and error.code in AWAY:
        retry_after_s = AWAY_S
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    in_vain = error.status in (429, 504) and (retry_after_s is None or retry_after_s > CLIENTS_WAIT_S)
    if in_vain or isinstance(error, AdapterUnusableError):
        headers["x-should-retry"] = "false"  # OpenAI's clients would retry by themselves
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def internal_error_body(request_id: str) -> dict[str, Any]:
    """The same text for every internal error; details are in the log under the request id."""
    return {
        "error": {
            "message": f"The server had an error while processing your request (request id {request_id}).",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }


def stream_error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """The body of an error after the status was sent; logs what the client must not see."""
    if isinstance(error, PedroError):
        return error.body()
    log.error("request %s failed mid-stream", request_id, exc_info=error)
    return internal_error_body(request_id)


def install_error_handlers(app: FastAPI) -> None:
    """Does not handle unexpected exceptions: the edge does, so that they have the request id, too."""

    @app.exception_handler(PedroError)
    async def _pedro(_request: Request, error: PedroError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "unknown_url", 405: "method_not_allowed"}
        if error.status_code in codes:
            message = f"Invalid URL ({request.method} {request.url.path})."
        else:
            message = str(error.detail)
        body = {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": codes.get(error.status_code),
            }
        }
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return error_response(PedroError(f"{field}: {first['msg']}", param=field or None))
