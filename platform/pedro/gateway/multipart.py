"""Streams a form with files (multipart/form-data, RFC 7578); no part is ever whole in memory.

Parses the format only; the meaning of fields is up to the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from pedro.errors import PedroError

if TYPE_CHECKING:
    from fastapi import Request
    from python_multipart.multipart import MultipartCallbacks

MAX_PARTS = 16
MAIL_ENCODINGS = (b"base64", b"quoted-printable")  # of mail; no client of HTTP sends them


@dataclass(frozen=True)
class FormPart:
    """The head of a part; its bytes follow. `filename` is None for a plain field."""

    name: str
    filename: str | None


async def read_form(request: Request) -> AsyncIterator[FormPart | bytes]:
    """Each part and then its bytes, as they arrive. Raises PedroError if it is not a form, or incomplete."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _malformed("expected multipart/form-data with a boundary, as sent by `curl -F` and OpenAI's clients")
    form = _Form()
    try:
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
            for event in form.take():
                yield event
    except FormParserError as error:
        raise _malformed(f"it is damaged ({error})") from None
    if not form.ended:
        raise _malformed("it ends before its last boundary")


class _Form:
    """Collects the parser's events."""

    def __init__(self) -> None:
        self.ended = False
        self._events: list[FormPart | bytes] = []
        self._parts = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}

    def take(self) -> list[FormPart | bytes]:
        events, self._events = self._events, []
        return events

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start,
            "on_part_data": lambda data, start, end: self._events.append(data[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _malformed(f"it has more than {MAX_PARTS} parts")
        self._headers = {}

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _start(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _malformed("a part has no Content-Disposition with a name")
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() in MAIL_ENCODINGS:
            raise _malformed("a part uses a mail encoding; send its raw bytes")
        filename = options.get(b"filename")
        self._events.append(FormPart(_text(options[b"name"]), None if filename is None else _text(filename)))

    def _end(self) -> None:
        self.ended = True


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise _malformed("a name in it is not UTF-8") from None


def _malformed(reason: str) -> PedroError:
    return PedroError(f"The request body is not a valid form: {reason}.", code="invalid_form")
