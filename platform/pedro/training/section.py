"""A section of a spec that has grown: what came later is written only where it says something."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from pedro.config import Frozen


class Section(Frozen):
    """Digests of earlier specs are made of what is written, so keys of a later release are left out at their defaults,
    which `since` holds."""

    since: ClassVar[dict[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name not in self.since or value != self.since[name]}
