"""Answers a request of /v1/responses from a chat's answer: the response object, or the stream of typed events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.gateway.answer import BLOCK, StreamedAnswer, sent_event
from pedro.gateway.body_formats import usage
from pedro.gateway.errors import stream_error_body
from pedro.gateway.response_objects import Event, OutputItems, new_id, response_usage
from pedro.gateway.tool_answers import CallReader

if TYPE_CHECKING:
    from starlette.types import Send

    from pedro.gateway.backend import Backend, Delta, GenerateCall
    from pedro.gateway.quotas import Ticket
    from pedro.gateway.response_fields import ResponsesRequest
    from pedro.gateway.response_input import Translation
    from pedro.gateway.usage import UsageEntry

STATUS = {"length": "incomplete"}  # by finish reason; else completed


class ResponseAnswer(StreamedAnswer):
    """The answer to one call. `translation` rewrites errors in terms of the request."""

    def __init__(
        self,
        backend: Backend,
        call: GenerateCall,
        request: ResponsesRequest,
        translation: Translation,
        ticket: Ticket,
        entry: UsageEntry,
    ) -> None:
        super().__init__(backend, [call], ticket, entry, bool(request.stream))
        self._request, self._translation = request, translation
        self._id, self._created = new_id("resp"), int(time.time())
        self._obfuscated = request.stream_options is not None and bool(request.stream_options.include_obfuscation)
        self._items = OutputItems()
        self._sent = 0  # events
        tools = call.tools
        self._reader = None
        if tools is not None and tools.may_call:
            self._reader = CallReader((tool["function"]["name"] for tool in tools.tools), tools.parallel)

    async def _collect(self) -> dict[str, Any]:
        try:
            return await super()._collect()
        except PedroError as error:
            raise self._translation.named(error) from error

    async def _send_events(self, send: Send, request_id: str) -> None:
        try:
            await super()._send_events(send, request_id)
        except PedroError as error:
            raise self._translation.named(error) from error

    def _body(self) -> dict[str, Any]:
        [[choice]] = self._choices
        self._take("".join(choice.text), last=True)
        return self._ended()

    def _first_events(self) -> bytes:
        begun = self._response("in_progress")
        return self._write([(f"response.{name}", {"response": begun}) for name in ("created", "in_progress")])

    def _events(self, number: int, delta: Delta) -> bytes:
        self._accept(number, delta, keep=False)
        return self._write(self._take(delta.text, delta.finish_reason is not None))

    def _last_events(self) -> bytes:
        [[choice]] = self._choices
        status = STATUS.get(choice.finish_reason or "", "completed")
        closing = self._write(self._items.end(status))
        return closing + self._write([(f"response.{status}", {"response": self._ended()})])

    def _error_events(self, error: Exception, request_id: str) -> bytes:
        if isinstance(error, PedroError):
            error = self._translation.named(error)
        told = stream_error_body(error, request_id)["error"]
        closing = self._write(self._items.end("incomplete")) if self._items.items else b""
        code = told["code"] or "server_error"
        failed = {**self._response("failed"), "error": {"code": code, "message": told["message"]}}
        return closing + self._write([("response.failed", {"response": failed})])

    def _take(self, text: str, last: bool) -> list[Event]:
        """More of the answer's text."""
        if self._reader is None:
            return self._items.add_text(text)
        said, calls = self._reader.feed(text, last)
        return [*self._items.add_text(said), *(event for call in calls for event in self._items.call(call))]

    def _ended(self) -> dict[str, Any]:
        [[choice]] = self._choices
        status = STATUS.get(choice.finish_reason or "", "completed")
        self._items.end(status)
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {**self._response(status), "incomplete_details": details, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        self._count()
        counted = usage(self._choices)
        cached_tokens = counted["prompt_tokens_details"]["cached_tokens"]
        return response_usage(counted["prompt_tokens"], cached_tokens, counted["completion_tokens"])

    def _response(self, status: str) -> dict[str, Any]:
        """The response object in its current state."""
        asked = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "model": asked.model,
            "output": list(self._items.items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "system_fingerprint": self._fingerprint,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _format_shown(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [{"parameters": None, "strict": None, **tool} for tool in asked.tools or ()],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
            "metadata": asked.metadata or {},
        }

    def _write(self, events: Sequence[Event]) -> bytes:
        return b"".join(self._event(kind, body) for kind, body in events)

    def _event(self, kind: str, body: dict[str, Any]) -> bytes:
        made = {"type": kind, "sequence_number": self._sent, **body}
        self._sent += 1
        if self._obfuscated and kind.endswith(".delta"):  # so that sizes do not reveal the text
            made["obfuscation"] = secrets.token_hex(BLOCK // 2)[: BLOCK - len(sent_event(made, kind)) % BLOCK]
        return sent_event(made, kind)


def _format_shown(request: ResponsesRequest) -> dict[str, Any]:
    form = None if request.text is None else request.text.format
    if form is None:
        return {"type": "text"}
    given = {"type": form.type, "name": form.name, "description": form.description, "strict": form.strict}
    return {name: value for name, value in {**given, "schema": form.schema_}.items() if value is not None}
