"""Which names, purposes, times and contents an uploaded file may have. Opens nothing.

Whether a file can be trained on is said where a job uses it; here only what cannot be data at all is refused.
Reference: https://platform.openai.com/docs/api-reference/files/create
"""

from __future__ import annotations

import codecs
import unicodedata

from pedro.data.files import BOM, GZIP, HEAD_BYTES, REFUSED, ZSTD
from pedro.errors import PedroError

FINE_TUNE, BATCH = "fine-tune", "batch"
MADE = RESULTS, BATCH_OUTPUT = "fine-tune-results", "batch_output"  # by jobs and batches: nobody uploads one
PURPOSES = (FINE_TUNE, BATCH)
OTHER_PURPOSES = (
    "assistants",
    "assistants_output",
    BATCH_OUTPUT,
    "evals",
    RESULTS,
    "user_data",
    "vision",
)
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 24 * 3600
MAX_NAME = 255  # characters
PARQUET = b"PAR1"
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control and steering characters


def check_filename(name: str) -> str:
    """`name` if it is a plain one. Raises PedroError."""
    if not name or name in (".", "..") or len(name) > MAX_NAME:
        raise _wrong("file", f"its name must have 1 to {MAX_NAME} characters, got {len(name)}")
    if "/" in name or "\\" in name:
        raise _wrong("file", f"its name is a path, {name!r}; send the name alone")
    if any(unicodedata.category(char) in UNSAFE for char in name):
        raise _wrong("file", f"its name holds control characters, {name!a}; send a plain name")
    return name


def check_purpose(purpose: str) -> str:
    """`purpose` if files of it are taken. Raises PedroError."""
    known = " or ".join(f'"{name}"' for name in PURPOSES)
    if purpose in OTHER_PURPOSES:
        raise PedroError(
            f'purpose: "{purpose}" is not supported here; expected {known}',
            param="purpose",
            code="unsupported_parameter",
        )
    if purpose not in PURPOSES:
        raise _wrong("purpose", f"expected {known}, got {purpose[:80]!r}")
    return purpose


def check_expiry(anchor: str | None, seconds: str | None) -> int | None:
    """Seconds from a file's making to its end, of the fields of `expires_after`. Raises PedroError."""
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise _wrong("expires_after[anchor]", f'expected "created_at", got {(anchor or "")[:80]!r}')
    given = seconds or ""
    if not given.isascii() or not given.isdigit() or len(given) > 9 or not MIN_EXPIRY_S <= int(given) <= MAX_EXPIRY_S:
        expected = f"expected {MIN_EXPIRY_S} (an hour) to {MAX_EXPIRY_S} (30 days)"
        raise _wrong("expires_after[seconds]", f"{expected}, got {given[:80]!r}")
    return int(given)


def default_expiry(purpose: str) -> int | None:
    """As at OpenAI: what is of use for a batch alone ends after 30 days, anything else is kept."""
    return MAX_EXPIRY_S if purpose in (BATCH, BATCH_OUTPUT) else None


def check_content(head: bytes, purpose: str) -> None:
    """Raise PedroError for a file whose first `HEAD_BYTES` cannot begin data: text in UTF-8, or for training also
    gzip, zstd or parquet."""
    if not head:
        raise _unreadable("it is empty; send a file with at least one line")
    for magic, what in REFUSED.items():
        if head.startswith(magic):
            raise _unreadable(f"it is {what}")
    if head.startswith((GZIP, ZSTD, PARQUET)):
        if purpose == BATCH:
            raise _unreadable("it is packed or parquet; a batch is plain JSON lines")
        return
    if head.startswith(UTF16):
        raise _unreadable("it is UTF-16; save it as UTF-8")
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head.removeprefix(BOM), final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError as error:
        raise _unreadable(f"its byte {error.start} is no UTF-8, and it is no gzip, zstd or parquet file") from None
    if "\0" in text:
        raise _unreadable("it holds zero bytes, so it is no text, and it is no gzip, zstd or parquet file")


def _wrong(field: str, reason: str) -> PedroError:
    return PedroError(f"{field}: {reason}", param=field, code="invalid_value")


def _unreadable(reason: str) -> PedroError:
    return PedroError(f"file: {reason}", param="file", code="invalid_file")
