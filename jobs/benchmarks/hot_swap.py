"""Moves an alias again and again while tenants stream, and checks every answer. Knows only what a client knows.

Each answer must be, to the letter, what one version says to that prompt; which one, its fingerprint tells.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import httpx

from pedro.errors import PedroError
from pedro.refs import ModelRef

SEEN_WITHIN_S = 2.0  # a moved alias is followed within this time
PARTS = ("promotion", "until_asked", "first_token")  # of the time until a version is first served
PATIENCE_S = 30.0  # for an answer after the last move
PROMPTS = tuple([3 + (29 * row + 7 * column) % 200 for column in range(16)] for row in range(4))  # of any vocabulary


@dataclass
class _Answer:
    """One stream: when it was asked and when its first event came (monotonic seconds), and what it said."""

    asked: float
    prompt: int
    first: float = 0.0
    versions: set[int] = field(default_factory=set)
    text: str = ""
    whole: bool = False


@dataclass
class _Phase:
    """What one rhythm of moves saw: (when asked for, version) of each, the answers, and who failed."""

    moves: list[tuple[float, int]]
    took: list[float]  # until the server said that the alias has moved
    answers: list[_Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def moved(self) -> list[float]:
        """When the server said of each move that it is made."""
        return [asked + took for (asked, _), took in zip(self.moves, self.took, strict=True)]


def swap(  # noqa: PLR0913
    url: str,
    key: str,
    admin_key: str,
    model: str,
    versions: Sequence[int],
    *,
    streams: int = 32,
    phases: Sequence[tuple[float, float]] = ((5.0, 60.0), (0.5, 20.0)),
    max_tokens: int = 48,
    prompts: Sequence[Any] = PROMPTS,
    within_s: float = SEEN_WITHIN_S,
) -> dict[str, Any]:
    """Move `model` over `versions` while `streams` run. A phase is (seconds between two moves, seconds in all).

    Gives, for each phase, how many answers failed, were mixed (not one version's own) or stale (of a version that was
    not the champion in the last `within_s`), the seconds from a move to the first event of its version, what the
    slowest of them was made of, and whether after the last move only its version answered. Raises PedroError where the
    server does not do as asked, or where all versions log the same, so that nothing could be seen.
    """
    if len(set(versions)) < 2:
        raise PedroError(f"versions: expected at least two to swap, got {list(versions)}", param="versions")
    load = _Load(url, key, admin_key, model, max_tokens, prompts, within_s)
    return asyncio.run(load.run(versions, streams, phases))


class _Load:
    """The streams and the one who moves the alias."""

    def __init__(
        self, url: str, key: str, admin_key: str, model: str, max_tokens: int, prompts: Sequence[Any], within_s: float
    ) -> None:
        self._url, self._key, self._admin_key = url, key, admin_key
        self._model, self._max_tokens, self._prompts, self._within_s = model, max_tokens, prompts, within_s
        self._said: dict[tuple[int, int], str] = {}  # by version and prompt, asked alone

    async def run(self, versions: Sequence[int], streams: int, phases: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """All phases, one after the other, the streams anew in each."""
        limits = httpx.Limits(max_connections=streams + 1, max_keepalive_connections=streams + 1)
        async with httpx.AsyncClient(base_url=self._url, limits=limits, timeout=60) as client:
            await self._ask_alone(client, versions)
            seen = [await self._phase(client, versions, streams, every, seconds) for every, seconds in phases]
        return {"model": self._model, "versions": list(versions), "streams": streams, "phases": seen}

    async def _ask_alone(self, client: httpx.AsyncClient, versions: Iterable[int]) -> None:
        """What each version says to each prompt."""
        for version in set(versions):
            for prompt in range(len(self._prompts)):
                answer = _Answer(time.monotonic(), prompt)
                await self._stream(client, str(replace(ModelRef.parse(self._model), version=version)), answer)
                self._said[version, prompt] = answer.text
        for prompt in range(len(self._prompts)):
            texts = {self._said[version, prompt] for version in set(versions)}
            if len(texts) < len(set(versions)):
                raise PedroError(f"{self._model}: versions {list(versions)} answer alike, so a swap could not be seen")

    async def _phase(
        self, client: httpx.AsyncClient, versions: Sequence[int], streams: int, every: float, seconds: float
    ) -> dict[str, Any]:
        began = time.monotonic()
        phase = _Phase([], [])
        await self._move(client, versions[0], phase)
        stop = asyncio.Event()
        running = [asyncio.create_task(self._keep_asking(client, number, phase, stop)) for number in range(streams)]
        try:
            await asyncio.sleep(SEEN_WITHIN_S)  # the first version is in force, and streams run, before it moves
            for number in range(1, max(2, round(seconds / every)) + 1):
                due = began + SEEN_WITHIN_S + (number - 1) * every
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                version = versions[number % len(versions)]
                await self._move(client, version, phase)
            settled = phase.moved()[-1] + SEEN_WITHIN_S
            while time.monotonic() < settled + PATIENCE_S and not any(a.asked > settled for a in phase.answers):
                await asyncio.sleep(0.1)
        finally:
            stop.set()
            await asyncio.gather(*running, return_exceptions=True)
        return {"every_s": every, "seconds": seconds, **_figures(phase, self._said, self._within_s)}

    async def _keep_asking(self, client: httpx.AsyncClient, number: int, phase: _Phase, stop: asyncio.Event) -> None:
        while not stop.is_set():
            answer = _Answer(time.monotonic(), number % len(self._prompts))
            try:
                await self._stream(client, self._model, answer)
                phase.answers.append(answer)
            except (PedroError, httpx.HTTPError, ValueError, KeyError) as error:
                phase.failures.append(f"{type(error).__name__}: {error}")
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.1)

    async def _move(self, client: httpx.AsyncClient, version: int, phase: _Phase) -> None:
        began = time.monotonic()
        phase.moves.append((began, version))
        reply = await client.post(
            f"/v1/adapters/{self._model}/promote",
            json={"version": version},
            headers={"Authorization": f"Bearer {self._admin_key}"},
        )
        if reply.status_code != 200:
            raise PedroError(f"{self._model}: promote answered {reply.status_code}: {reply.text[:300]}")
        phase.took.append(time.monotonic() - began)

    async def _stream(self, client: httpx.AsyncClient, model: str, answer: _Answer) -> None:
        """Fill `answer`; raises for one that is not whole."""
        body = {
            "model": model,
            "prompt": self._prompts[answer.prompt],
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self._key}"}
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            if reply.status_code != 200:
                raise PedroError(f"{model}: {reply.status_code}: {(await reply.aread())[:300]!r}")
            async for line in reply.aiter_lines():
                answer.first = answer.first or time.monotonic()
                if line == "data: [DONE]":
                    answer.whole = answer.whole and bool(answer.versions)
                elif line.startswith("data: "):
                    _take(json.loads(line.removeprefix("data: ")), answer)
        if not answer.whole:
            raise PedroError(f"{model}: the stream ended early")


def _take(event: dict[str, Any], answer: _Answer) -> None:
    if "error" in event:
        raise PedroError(str(event["error"]))
    for choice in event["choices"]:
        answer.text += choice["text"]
        answer.whole = choice["finish_reason"] == "length"
        answer.versions.add(ModelRef.parse(event["system_fingerprint"]).number)


def _figures(phase: _Phase, said: dict[tuple[int, int], str], within_s: float) -> dict[str, Any]:
    """The phase in numbers, with the first failure and the first mixed answer in words."""
    mixed = [a for a in phase.answers if len(a.versions) != 1 or a.text != said[min(a.versions), a.prompt]]
    last_moved, last = phase.moved()[-1], phase.moves[-1][1]
    late = [answer for answer in phase.answers if answer.asked > last_moved + SEEN_WITHIN_S]
    served = list(_first_served(phase))
    firsts = [first for first, *_ in served]
    return {
        "moves": len(phase.moves) - 1,
        "answers": len(phase.answers),
        "failed": len(phase.failures),
        "mixed": len(mixed),
        "stale": sum(not answer.versions <= _in_force(phase, answer, within_s) for answer in phase.answers),
        "first_served_s": {
            "median": round(median(firsts), 3) if firsts else None,
            "max": round(max(firsts), 3) if firsts else None,
        },
        "slowest_s": None if not served else dict(zip(PARTS, (round(s, 3) for s in max(served)[1:]), strict=True)),
        "last_version_wins": bool(late) and all(answer.versions == {last} for answer in late),
        "first_failure": phase.failures[0] if phase.failures else None,
        "first_mixed": None if not mixed else f"versions {sorted(mixed[0].versions)}: {mixed[0].text!r}",
    }


def _first_served(phase: _Phase) -> Iterable[tuple[float, float, float, float]]:
    """Seconds from each move to the first event of an answer that was asked after it and is of its version; then until
    the server had moved it, until that answer was asked for, and from there to its first event.

    Moves that were overtaken by the next before anybody could see them are left out.
    """
    for number, (moved, version) in enumerate(phase.moves[1:], start=1):
        following = phase.moves[number + 1][0] if number + 1 < len(phase.moves) else float("inf")
        seen = [a for a in phase.answers if moved <= a.asked < following and a.versions == {version}]
        if seen:
            first = min(seen, key=lambda answer: answer.first)
            yield first.first - moved, phase.took[number], first.asked - moved, first.first - first.asked
        elif following > moved + SEEN_WITHIN_S:
            yield float("inf"), phase.took[number], float("inf"), float("inf")


def _in_force(phase: _Phase, answer: _Answer, within_s: float) -> set[int]:
    """The versions that were champion at some time from `within_s` before the answer was asked until its first event.

    One is champion from when it is asked to be until the server says that the next one is.
    """
    ends = [*phase.moved()[1:], float("inf")]
    return {
        version
        for (asked, version), end in zip(phase.moves, ends, strict=True)
        if asked <= answer.first and end >= answer.asked - within_s
    }
