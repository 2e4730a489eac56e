"""Fields of webhook endpoints, as given by tenants and operators, and request bodies with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pedro.errors import PedroError
from pedro.gateway.schemas import Body
from pedro.store import EVENT_TYPES, PING

MAX_NAME = 200


def check_event_types(given: Sequence[str]) -> tuple[str, ...]:
    """The event types without duplicates. Raises PedroError for an unknown one."""
    if unknown := next((kind for kind in given if kind not in EVENT_TYPES), None):
        message = f"event_types: unknown events {unknown[:60]!r}; known: {', '.join(EVENT_TYPES)}"
        raise PedroError(message, param="event_types", code="invalid_value")
    return tuple(dict.fromkeys(given))


def check_webhook_name(given: str) -> str:
    """A printable name. Raises PedroError otherwise."""
    if not 1 <= len(given) <= MAX_NAME or not given.isprintable():
        message = f"name: expected 1 to {MAX_NAME} printable characters, got {given[:60]!r}"
        raise PedroError(message, param="name", code="invalid_value")
    return given


def _kinds(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(kind, str) for kind in value):
        raise ValueError("expected a list of event types")
    return tuple(value)


def _kind(value: Any) -> Any:
    if value not in (*EVENT_TYPES, PING):
        raise ValueError(f"expected one of {', '.join((*EVENT_TYPES, PING))}")
    return value


EventType = Annotated[str, Field(json_schema_extra={"enum": list(EVENT_TYPES)})]
TestedType = Annotated[str, Field(json_schema_extra={"enum": [*EVENT_TYPES, PING]})]
Kinds = Annotated[tuple[str, ...], BeforeValidator(_kinds, Annotated[list[EventType], Field(min_length=1)])]


class WebhookRequest(Body):
    url: str  # https://…, on the public network; neither user, password nor fragment
    name: str  # for people
    event_types: Kinds  # which events it receives


class WebhookUpdate(Body):
    """Fields that are not given are unchanged."""

    url: str | None = None  # pending events go to it, too
    name: str | None = None  # for people
    event_types: Kinds | None = None  # which events it receives from now on


class RotateRequest(Body):
    keep_old_secret_active_for_24_hours: bool | None = None  # sign with both for a day; else only with the new


class WebhookTest(Body):
    event_type: Annotated[str, BeforeValidator(_kind, TestedType)] = PING  # of the sample, whose data are made up
