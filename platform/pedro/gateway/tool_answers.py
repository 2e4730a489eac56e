"""Extracts tool calls from an answer's text, in any supported syntax, as OpenAI's `tool_calls`.

A call is emitted when it is complete. Text that only resembles a call, or is truncated, stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pedro.gateway.body_formats import ChatFormat, Choice, chat_chunk

if TYPE_CHECKING:
    from pedro.gateway.backend import Delta

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BARE = "[TOOL_CALLS]"  # precedes Mistral's list, if its tokenizer shows it
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
ID_LENGTH = 9  # as required by Mistral's templates


class CallReader:
    """Parses one growing answer. `names` are the tools; without `parallel` only the first call counts."""

    def __init__(self, names: Iterable[str], parallel: bool) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._held = ""
        self._is_text = False  # whether it began with anything but JSON
        self.made = 0

    def feed(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """Add text of the answer; returns what is certain so far: text outside calls, and calls."""
        self._held += text
        if not self._is_text:
            began = self._held.lstrip()
            if began[:1] in ("{", "[") or not began:
                if not last:
                    return "", []
                calls = self._calls(began.removeprefix(BARE))
                return ("" if calls else self._held), calls
            self._is_text = True
        return self._read(last)

    def _read(self, last: bool) -> tuple[str, list[dict[str, Any]]]:
        said, calls = "", []
        while self._parallel or not self.made:
            at = self._held.find(OPEN)
            end = self._held.find(CLOSE, at) if at >= 0 else -1
            if end < 0:
                keep = len(self._held) if last else at if at >= 0 else len(self._held) - _overlap(self._held)
                said, self._held = said + self._held[:keep], self._held[keep:]
                break
            found = self._calls(self._held[at + len(OPEN) : end])
            end += len(CLOSE)
            said, self._held = said + self._held[: at if found else end], self._held[end:]
            calls += found
        return ("" if self.made and not said.strip() else said), calls

    def _calls(self, text: str) -> list[dict[str, Any]]:
        """The calls in a JSON text; none if it is anything else."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return []
        given = given if isinstance(given, list) else [given]
        made = [self._call(call) for call in given]
        if None in made:
            return []
        calls = [call for call in made if call is not None]
        if not self._parallel:
            calls = calls[: max(0, 1 - self.made)]
        for call in calls:
            call["index"] = self.made
            self.made += 1
        return calls

    def _call(self, given: Any) -> dict[str, Any] | None:
        name = given.get("name") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        arguments = given.get("arguments", given.get("parameters"))
        if not isinstance(arguments, dict):
            return None
        try:
            text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair: keep the escape that the model wrote
            text = json.dumps(arguments)
        except (ValueError, RecursionError):  # NaN is not JSON
            return None
        call_id = "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))
        function = {"name": name, "arguments": text}
        return {"index": 0, "id": call_id, "type": "function", "function": function}


class ToolChatFormat(ChatFormat):
    """Chat answers that may call tools."""

    def __init__(self, request_id: str, model: str, names: Iterable[str], parallel: bool) -> None:
        super().__init__(request_id, model)
        self._names, self._parallel = frozenset(names), parallel
        self._readers: dict[int, CallReader] = {}

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        reader = self._readers.setdefault(choice.index, CallReader(self._names, self._parallel))
        text, calls = reader.feed(delta.text, delta.finish_reason is not None)
        reason = _reason(delta.finish_reason, reader)
        entries = super().chunks(choice, replace(delta, text=text, finish_reason=reason))
        if calls:
            entries = self.opening(choice) + entries
        at = len(entries) - (reason is not None)
        return [*entries[:at], *(chat_chunk(choice.index, {"tool_calls": [call]}) for call in calls), *entries[at:]]

    def choice(self, choice: Choice) -> dict[str, Any]:
        reader = CallReader(self._names, self._parallel)
        text, calls = reader.feed("".join(choice.text), True)
        made = super().choice(choice)
        made["message"]["content"] = None if calls and not text else text
        if calls:
            made["message"]["tool_calls"] = [{k: v for k, v in call.items() if k != "index"} for call in calls]
        return {**made, "finish_reason": _reason(choice.finish_reason, reader)}


def _reason(reason: str | None, reader: CallReader) -> str | None:
    return "tool_calls" if reason == "stop" and reader.made else reason


def _overlap(text: str) -> int:
    """The length of the suffix of `text` that may be the beginning of a call."""
    return next((size for size in range(min(len(text), len(OPEN) - 1), 0, -1) if text.endswith(OPEN[:size])), 0)
