"""Which adapter version a model name means, now. Knows nothing of HTTP, tensors or Ray.

Aliases are read from the registry every `interval_s`; a name is resolved to one immutable version when a request
is admitted, so a request never sees two versions. A name deleted and made again is another name.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time

from pedro.errors import AdapterError, NotFoundError, UnavailableError, model_not_found
from pedro.registry import CHAMPION, Entry, Registry, Version

EVERYONE = "*"
STALE_AFTER_S = 30.0
_NAME = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9_-]{0,62}\.[a-z0-9][a-z0-9_-]{0,62})(?:@(?P<alias>[A-Za-z0-9_-]+)|:(?P<version>[0-9]{1,9}))?"
)
log = logging.getLogger("pedro.serving")


class Catalog:
    """Resolves names for one serving process; `watch` runs for as long as the process serves."""

    def __init__(self, registry: Registry, backbone_id: str, backbone_digest: str, interval_s: float) -> None:
        self._registry = registry
        self._backbone_id = backbone_id
        self._backbone_digest = backbone_digest
        self._interval_s = interval_s
        self._entries: dict[str, Entry] = {}
        self._versions: dict[tuple[str, int, int], tuple[float, Version]] = {}
        self._read_at: float | None = None

    @property
    def fresh(self) -> bool:
        """Whether the registry was read lately."""
        return self._read_at is not None and time.monotonic() - self._read_at < STALE_AFTER_S

    async def watch(self) -> None:
        """Read the aliases for ever; a registry that does not answer leaves the last state in force."""
        while True:
            try:
                await self.refresh()
            except Exception:  # noqa: BLE001 - whatever the registry client raises, serving goes on
                log.warning("the registry does not answer; serving the aliases of the last reading", exc_info=True)
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Read the aliases once."""
        entries = await asyncio.to_thread(self._registry.catalog)
        live = {(name, entry.created) for name, entry in entries.items()}
        self._versions = {key: held for key, held in self._versions.items() if key[:2] in live}
        self._entries = entries
        self._read_at = time.monotonic()

    async def resolve(self, tenant: str, model: str) -> Version:
        """The version that `model` means to `tenant` now.

        Raises the uniform 404 for an unknown name and for a foreign one alike, UnavailableError while the registry
        was never read, AdapterError for an adapter of another backbone.
        """
        match = _NAME.fullmatch(model)
        if match is None or not _visible(match["name"], tenant):
            raise model_not_found(model)
        if self._read_at is None:
            raise UnavailableError("the model catalogue is not loaded yet; try again in a moment")
        entry = self._entries.get(match["name"])
        if entry is None:
            raise model_not_found(model)
        if match["version"]:
            version = await self._version(match["name"], entry, int(match["version"]), self._interval_s, model)
        else:
            number = entry.aliases.get(match["alias"] or CHAMPION)
            if number is None:
                raise model_not_found(model)
            version = await self._version(match["name"], entry, number, float("inf"), model)
        if version.backbone_digest != self._backbone_digest:
            raise AdapterError(
                f"model: '{model}' was trained on backbone {version.backbone_id} ({version.backbone_digest}), but this "
                f"server runs {self._backbone_id} ({self._backbone_digest}); train it again on this one",
                param="model",
            )
        return version

    async def champions(self, tenant: str) -> list[Version]:
        """The champions that `tenant` may call, by name, those of other backbones left out."""
        found = []
        for name, entry in sorted(self._entries.items()):
            if _visible(name, tenant) and CHAMPION in entry.aliases:
                version = await self._version(name, entry, entry.aliases[CHAMPION], float("inf"), name)
                if version.backbone_digest == self._backbone_digest:
                    found.append(version)
        return found

    async def _version(self, name: str, entry: Entry, number: int, max_age_s: float, model: str) -> Version:
        """A version's record; an explicit number is asked for again once `max_age_s` has passed: it may be deleted."""
        key = (name, entry.created, number)
        held = self._versions.get(key)
        if held is None or time.monotonic() - held[0] > max_age_s:
            try:
                version = await asyncio.to_thread(self._registry.get, name, number)
            except NotFoundError:
                self._versions.pop(key, None)
                raise model_not_found(model) from None
            held = self._versions[key] = (time.monotonic(), version)
        return held[1]


def _visible(name: str, tenant: str) -> bool:
    return tenant in (EVERYONE, name.partition(".")[0])
