"""The growing response of /v1/responses: its output items and typed events.

Text is one message; each tool call is a separate item, sent once it is complete.
Reference: https://platform.openai.com/docs/api-reference/responses/object and .../responses-streaming
"""

from __future__ import annotations

import secrets
from typing import Any

Event = tuple[str, dict[str, Any]]  # its type, and its fields besides type and sequence_number


class OutputItems:
    """The items of one answer. Each method returns its events; `items` are those begun so far."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._text: list[str] | None = None  # of the open message

    def add_text(self, text: str) -> list[Event]:
        """Add text to the open message or a new one."""
        if not text:
            return []
        events = [] if self._text is not None else self._open()
        self._add(text)
        return [*events, self._in_item("response.output_text.delta", delta=text, logprobs=[])]

    def call(self, call: dict[str, Any]) -> list[Event]:
        """Add a complete call, in the form of chats."""
        events = self._close("completed")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {
            "id": new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call["id"],
            "name": name,
            "arguments": "",
        }
        events.append(self._begin(item))
        item.update(arguments=arguments, status="completed")
        at = {"item_id": item["id"], "output_index": len(self.items) - 1}
        return [
            *events,
            ("response.function_call_arguments.delta", {**at, "delta": arguments}),
            ("response.function_call_arguments.done", {**at, "name": name, "arguments": arguments}),
            self._done(item),
        ]

    def end(self, status: str) -> list[Event]:
        """End the answer. Without any text it is an empty message."""
        return [*([] if self.items else self._open()), *self._close(status)]

    def _open(self) -> list[Event]:
        item = {"id": new_id("msg"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        begun = self._begin(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"] = [part]
        self._text = []
        return [begun, self._in_item("response.content_part.added", part=dict(part))]

    def _add(self, text: str) -> None:
        assert self._text is not None, "no message is open"
        self._text.append(text)

    def _close(self, status: str) -> list[Event]:
        if self._text is None:
            return []
        item, text = self.items[-1], "".join(self._text)
        self._text = None
        item["status"] = status
        item["content"][0]["text"] = text
        return [
            self._in_item("response.output_text.done", text=text, logprobs=[]),
            self._in_item("response.content_part.done", part=dict(item["content"][0])),
            self._done(item),
        ]

    def _begin(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        return "response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)}

    def _done(self, item: dict[str, Any]) -> Event:
        return "response.output_item.done", {"output_index": len(self.items) - 1, "item": item}

    def _in_item(self, kind: str, **more: Any) -> Event:
        at = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return kind, {**at, **more}


def new_id(kind: str) -> str:
    """An id in OpenAI's form."""
    return f"{kind}_{secrets.token_hex(16)}"


def response_usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """Tokens under the names of /v1/responses."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + completion_tokens,
    }
