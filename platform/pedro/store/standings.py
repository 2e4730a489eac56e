"""What each move does to the aliases of an adapter. Pure: from where they stand to where they stand then.

Three aliases are the platform's: `champion` (what the bare name means), `previous` (what rollback returns to) and
`candidate` (the newest version that its gate refused). A canary takes a share of what is asked of the champion; a
shadow is asked a share of it as well, for nobody to see.
"""

from __future__ import annotations

from dataclasses import replace

from pedro.errors import ConfigError, ConflictError
from pedro.refs import version_name
from pedro.store.records import CANDIDATE, CHAMPION, PREVIOUS, Canary, Shadow, Standing

WHATEVER = -1  # an expected champion that is not compared


def promoted(now: Standing, name: str, version: int, expected: int | None = WHATEVER) -> Standing:
    """`version` is champion, the champion until now `previous`; a canary and a shadow have ended.

    Raises ConflictError if `expected` is given and the champion is another one by now (None: there is one).
    """
    champion = now.aliases.get(CHAMPION)
    if expected not in (WHATEVER, champion):
        is_now, was = (f"version {number}" if number is not None else "none" for number in (champion, expected))
        raise ConflictError(
            f"the champion is {is_now} by now, not {was}; compare {version_name(name, version)} with it and promote it "
            "by hand"
        )
    aliases = {**now.aliases, CHAMPION: version}
    if champion is not None and champion != version:
        aliases[PREVIOUS] = champion
    if aliases.get(CANDIDATE) == version:
        del aliases[CANDIDATE]
    return Standing(aliases)


def rolled_back(now: Standing, name: str, expected: int | None = None) -> Standing:
    """Champion and previous are swapped, a canary and a shadow have ended.

    Raises ConflictError if there is no previous version, or another than `expected`.
    """
    champion, previous = now.aliases.get(CHAMPION), now.aliases.get(PREVIOUS)
    if champion is None or previous is None:
        raise ConflictError(f"{name}: no previous version to roll back to; `promote` one of its versions instead")
    if expected not in (None, previous):
        raise ConflictError(f"{name}: the previous version is {previous} by now; look, and roll back again")
    return Standing({**now.aliases, CHAMPION: previous, PREVIOUS: champion})


def aliased(now: Standing, alias: str, version: int) -> Standing:
    """`alias` names `version`."""
    return replace(now, aliases={**now.aliases, alias: version})


def split(now: Standing, name: str, version: int, weight: float) -> Standing:
    """`version` answers a share of what is asked of the champion; 0 ends it.

    Raises ConfigError for a weight that is no share, ConflictError if there is no champion, or it is the champion.
    """
    if not 0 <= weight < 1:
        raise ConfigError(f"weight: expected a share of at least 0 and below 1, got {weight:g}", param="weight")
    champion = now.aliases.get(CHAMPION)
    if champion is None:
        raise ConflictError(f"{name}: has no champion that a canary could stand beside; `promote` a version first")
    if weight == 0:
        return replace(now, canary=None)
    if champion == version:
        raise ConflictError(
            f"{version_name(name, version)} is the champion by now, so it cannot be the canary beside it"
        )
    return replace(now, canary=Canary(version, weight))


def shadowed(now: Standing, name: str, version: int, weight: float) -> Standing:
    """`version` is asked a share of what the champion answers; 0 ends it.

    Raises ConfigError for a weight that is no share, ConflictError if there is no champion, or it is the champion.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight: expected a share from 0 to 1, got {weight:g}", param="weight")
    if weight == 0:
        return replace(now, shadow=None)
    champion = now.aliases.get(CHAMPION)
    if champion is None:
        raise ConflictError(f"{name}: has no champion that a shadow could be compared with; `promote` a version first")
    if champion == version:
        raise ConflictError(f"{version_name(name, version)} is the champion by now, so it cannot be its shadow")
    return replace(now, shadow=Shadow(version, weight))


def without(now: Standing, name: str, version: int) -> Standing:
    """No alias names `version`, so that it can be deleted. Raises ConflictError if it is the champion."""
    if now.aliases.get(CHAMPION) == version:
        raise ConflictError(
            f"{version_name(name, version)} is the champion; promote another version first, or delete all of {name}"
        )
    aliases = {alias: number for alias, number in now.aliases.items() if number != version}
    canary = None if now.canary and now.canary.version == version else now.canary
    shadow = None if now.shadow and now.shadow.version == version else now.shadow
    return Standing(aliases, canary, shadow)
