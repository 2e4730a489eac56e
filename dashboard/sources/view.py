"""Whose data a page shows: every tenant's, or one's alone. Pages take their settings from here, by `connection`.

A view is settings that also say who looks, so that what was cached for one reader is never found for another. Where
the platform keeps files is its operators' to know: a tenant is shown their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from pedro.config import Settings
from pedro.refs import tenant_of

Kept = TypeVar("Kept")
PLACE = r"(?!https?:|pedro:|/v1/)(?:[a-z][a-z0-9+.-]*:/|~)?/+"  # what a path or a storage's URL begins with
NAME = r"[^\s/'\"`<>|,;()]+"
BEFORE = r"(?<![\w./-])(?<!https:)(?<!http:)(?<!pedro:)"
PLACES = re.compile(
    rf"(?<=(['\"`])){PLACE}(?:[^'\"`\n]*/)?(?P<quoted>[^'\"`\n/]+)/?(?=\1)|{BEFORE}{PLACE}(?:{NAME}/)*(?P<plain>{NAME})/?"
)


@dataclass(frozen=True)
class View(Settings):
    """The platform's environment as a tenant sees it."""

    tenant: str = ""
    trains: bool = False
    """Whether its reader may start and end jobs, and move aliases."""

    @classmethod
    def of(cls, settings: Settings, tenant: str, trains: bool) -> View:
        return cls(**_values(settings), tenant=tenant, trains=trains)

    @property
    def whole(self) -> Settings:
        """Without its reader: what connections are made by."""
        return Settings(**_values(self))


def whole(settings: Settings) -> Settings:
    """The settings without who looks."""
    return settings.whole if isinstance(settings, View) else settings


def tenant_seen(settings: Settings) -> str | None:
    """The one tenant that is shown; None: all."""
    return settings.tenant if isinstance(settings, View) else None


def may_act(settings: Settings) -> bool:
    """Whether its reader may end jobs and move aliases."""
    return settings.trains if isinstance(settings, View) else True


def sees(settings: Settings, name: str) -> bool:
    """Whether an adapter `tenant.adapter`, or what has its name, is shown."""
    tenant = tenant_seen(settings)
    return tenant is None or tenant_of(name) == tenant


def seen(settings: Settings, by_name: Mapping[str, Kept]) -> dict[str, Kept]:
    """Those of a mapping whose names are shown."""
    return {name: kept for name, kept in by_name.items() if sees(settings, name)}


def names_seen(settings: Settings, names: Iterable[str]) -> list[str]:
    """Those names that are shown."""
    return [name for name in names if sees(settings, name)]


def without_places(settings: Settings, told: Any) -> Any:
    """What a tenant is shown: in a message, and in what a specification holds, the last name of each path alone."""
    if tenant_seen(settings) is None:
        return told
    return PLACES.sub(lambda at: at["quoted"] or at["plain"], told) if isinstance(told, str) else _named(told)


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_named, value))
    if isinstance(value, str) and re.match(PLACE, value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _values(settings: Settings) -> dict[str, Any]:
    return {each.name: getattr(settings, each.name) for each in fields(Settings)}
