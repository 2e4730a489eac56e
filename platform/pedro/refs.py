"""A model's name: `tenant.adapter`, also with `@alias` or `:version`, and `#digest` for exact weights.

Names of the bare backbone are not of this form. Standard library only, so that every room may use it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pedro.errors import NotFoundError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # of a tenant or an adapter
FILE_ID = re.compile(r"file-[0-9a-f]{24}")  # of an uploaded file
_MODEL = re.compile(
    rf"(?P<tenant>{NAME.pattern})\.(?P<adapter>{NAME.pattern})"
    r"(?:@(?P<alias>[A-Za-z0-9_-]+)|:(?P<version>[0-9]{1,9}))?(?:#(?P<digest>.+))?"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """An adapter, or with `alias` or `version` (at most one of them) one version of it; `digest` fixes its weights."""

    tenant: str
    adapter: str
    alias: str | None = None
    version: int | None = None
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """What `text` names. Raises NotFoundError where it names no model."""
        match = _MODEL.fullmatch(text)
        if match is None:
            raise NotFoundError(f"{text!r} is not an adapter name; expected tenant.adapter", param="model")
        version = match["version"]
        return cls(
            match["tenant"],
            match["adapter"],
            match["alias"],
            None if version is None else int(version),
            match["digest"] or "",
        )

    @property
    def name(self) -> str:
        """`tenant.adapter`."""
        return f"{self.tenant}.{self.adapter}"

    @property
    def which(self) -> int | str | None:
        """The version or the alias; None for a bare name."""
        return self.alias if self.version is None else self.version

    @property
    def number(self) -> int:
        """The version, of a name that says it."""
        assert self.version is not None, f"{self} names no version by its number"
        return self.version

    @property
    def without_digest(self) -> ModelRef:
        """As people write it."""
        return replace(self, digest="")

    def at(self, version: int) -> ModelRef:
        """A version of the same adapter, by its number."""
        return ModelRef(self.tenant, self.adapter, version=version)

    def __str__(self) -> str:
        text = self.name
        if self.version is not None:
            text += f":{self.version}"
        elif self.alias is not None:
            text += f"@{self.alias}"
        return f"{text}#{self.digest}" if self.digest else text


def without_digest(name: str) -> str:
    """A model's name as people write it, whatever kind of model it is."""
    return name.partition("#")[0]


def version_name(name: str, version: int) -> str:
    """`tenant.adapter:7`. Raises NotFoundError where `name` names no model."""
    return str(ModelRef.parse(name).at(version))


def tenant_of(name: str) -> str:
    """The tenant that a model's name begins with, whatever follows; of no well-formed name, no tenant's name."""
    tenant, dot, _ = name.partition(".")
    return tenant if dot else ""
