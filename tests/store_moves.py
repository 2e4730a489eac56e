"""Moves of aliases that race, and what they must equal: one serial order, played again by a reference that is slow.

`python store_moves.py URL SEED COUNT THREADS` makes moves and prints a JSON line for each. The reference knows what
each move is documented to do, and nothing of how the store does it.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from pedro.errors import ConflictError, NotFoundError, PedroError
from pedro.store import Store, Version, database, utc

NAME = "acme.raced"
Aliases = dict[str, int]


@dataclass(frozen=True)
class State:
    """What can be seen of the adapter at one moment; `versions` is None where there is no adapter."""

    versions: frozenset[int] | None
    aliases: Aliases
    canary: tuple[int, float] | None = None


@dataclass(frozen=True)
class Attempt:
    """One move as its caller saw it: `seen` and `seen_after` are the feed's numbers just before and just after."""

    actor: str
    move: str
    arguments: dict[str, Any]
    error: str
    seen: int
    seen_after: int


def stub_version(number: int, name: str = NAME) -> Version:
    """A version of which only the number matters."""
    tenant, _, adapter = name.partition(".")
    digest = f"sha256:{number}"
    return Version(tenant, adapter, number, digest, "b", "sha256:b", "pedro", 1, {}, {}, "", "run", utc(time.time()))


def fill(store: Store, versions: int, name: str = NAME) -> None:
    """Enter an adapter with so many versions."""
    for number in range(1, versions + 1):
        store.add_version(stub_version(number, name), store.made_of(name))


def attempt(store: Store, actor: str, move: str, arguments: dict[str, Any]) -> Attempt:
    """Make one move."""
    before, error = store.position().generation, ""
    try:
        if move == "gate":
            given = {key: value for key, value in arguments.items() if key != "version"}
            store.judge(stub_version(arguments["version"]), reason="", actor=actor, **given)
        else:
            getattr(store, move)(NAME, actor=actor, **arguments)
    except PedroError as refused:
        error = type(refused).__name__
    return Attempt(actor, move, arguments, error, before, store.position().generation)


def random_moves(rng: random.Random, count: int, versions: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Moves of every kind, many of them with an expectation that may have become wrong."""

    def number() -> int:
        return rng.randint(1, versions)

    for _ in range(count):
        which = rng.random()
        if which < 0.35:
            yield "promote", {"version": number(), **({"expected": number()} if rng.random() < 0.2 else {})}
        elif which < 0.6:
            yield "rollback", ({"expected": number()} if rng.random() < 0.2 else {})
        elif which < 0.75:
            yield "set_canary", {"version": number(), "weight": rng.choice((0.0, 0.1, 0.5))}
        elif which < 0.87:
            yield "gate", {"version": number(), "passed": rng.random() < 0.8, "judged_against": number()}
        elif which < 0.95:
            yield "set_alias", {"alias": "candidate", "version": number()}
        else:
            yield "delete_version", {"version": number()}


def play(state: State, move: str, given: dict[str, Any]) -> State | type[PedroError]:
    """The reference: what a move makes of a state, or the error that it ends with."""
    if state.versions is None:
        return NotFoundError
    version = given.get("version")
    if version is not None and version not in state.versions:
        return NotFoundError
    aliases, canary, versions = dict(state.aliases), state.canary, state.versions
    champion = aliases.get("champion")
    if move == "gate":
        passes = given["passed"] and champion == given["judged_against"]
        move, given = ("promote", {}) if passes else ("set_alias", {"alias": "candidate"})
    if move == "promote":
        if "expected" in given and given["expected"] != champion:
            return ConflictError
        if champion is not None and champion != version:
            aliases["previous"] = champion
        aliases["champion"] = int(version or 0)
        if aliases.get("candidate") == version:
            aliases.pop("candidate")
        canary = None
    elif move == "rollback":
        previous = aliases.get("previous")
        if champion is None or previous is None or given.get("expected") not in (None, previous):
            return ConflictError
        aliases["champion"], aliases["previous"], canary = previous, champion, None
    elif move == "set_alias":
        aliases[given["alias"]] = int(version or 0)
    elif move == "set_canary":
        if champion is None or (given["weight"] and champion == version):
            return ConflictError
        canary = (int(version or 0), given["weight"]) if given["weight"] else None
    elif move == "delete_version":
        if champion == version:
            return ConflictError
        versions = versions - {version or 0}
        aliases = {alias: held for alias, held in aliases.items() if held != version}
        canary = None if canary and canary[0] == version else canary
    return State(versions, aliases, canary)


def main() -> None:
    """Make COUNT random moves from THREADS threads of this process."""
    url, seed, count, threads, versions = sys.argv[1], *map(int, sys.argv[2:6])
    database.BUSY_TIMEOUT_S = 300  # whose turn is next is not for sqlite to say: on a busy machine one may wait long
    store = Store(url)
    moves = list(enumerate(random_moves(random.Random(seed), count, versions)))
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(lambda one: attempt(store, f"{seed}.{one[0]}", *one[1]), moves)
        for one in done:
            print(json.dumps(asdict(one)))
    store.close()


if __name__ == "__main__":
    main()
