"""Stock OpenAI clients that ask a server without end, and judge every answer. They know what a client knows.

What a client draws comes from its seed. Half of what is asked streams; of a few answers the client goes away in the
middle; some name an adapter that is broken. A stream that breaks once it had begun is asked again, as the documentation
of the API shows (`stream_text`): no client does that by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from jobs.benchmarks.chaos.world import BARE, LENGTHS, Adapter, World, users
from pedro.errors import PedroError
from pedro.refs import ModelRef

if TYPE_CHECKING:
    import openai

TIMEOUT_S = 180.0
MAX_RETRIES = 2  # what OpenAI's client does if it is told nothing
TRIES = 4  # of a stream that had begun
MOVE_EVERY_S, SEEN_WITHIN_S = 1.0, 10.0
USERS = 20  # of each canary
CALM = "calm"
WRONG_VERSION, WRONG_TENANT, WRONG_BARE, WRONG_OTHER = "version", "tenant", "bare model", "anything else"
BROKEN_CODES = ("adapter_unusable", "adapter_unavailable", "adapter_quarantined")


@dataclass
class Seen:
    """What came of the requests that were asked while one thing was going on."""

    case: str
    lenient: bool = False
    """A name may mean an earlier version, the last that could be loaded."""
    sent: int = 0
    answered: int = 0
    cancelled: int = 0
    retried: int = 0
    """Times that OpenAI's client itself asked again, of what was answered."""
    repeated: int = 0
    """Streams that broke after they had begun and were asked again."""
    broken: int = 0
    """Requests that named a broken adapter and were told so."""
    failures: list[str] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)
    first_wrong: str = ""
    longest_gap_s: float = 0.0
    last: float = field(default_factory=time.monotonic)

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return self.sent - self.answered - self.cancelled - self.broken - len(self.failures)

    def took(self) -> None:
        """An answer came."""
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self.last)
        self.last = now
        self.answered += 1


@dataclass(frozen=True)
class PlannedRequest:
    """One request, and the versions by number that may answer it, where these are known before."""

    adapter: Adapter | None
    model: str
    prompt: int
    length: int
    stream: bool
    user: str | None = None
    numbers: frozenset[int] = frozenset()


@dataclass
class _Answer:
    """What came so far."""

    text: str = ""
    fingerprint: str = ""
    reason: str | None = None


class Clients:
    """`count` clients of a server, each of one tenant after the other; whoever they ask is drawn from the world."""

    def __init__(
        self, world: World, url: str, keys: Mapping[str, str], admin: str, *, seed: int, count: int, think_s: float
    ) -> None:
        """`think_s`: what passes in the mean between an answer and the same client's next request."""
        self._world, self._url, self._keys, self._admin = world, url, keys, admin
        self._seed, self._count, self._think_s = seed, count, think_s
        self._stop = False
        self.seen: list[Seen] = [Seen(CALM)]
        self.moves: dict[str, list[tuple[float, float, int]]] = {a.name: [(0.0, 0.0, 1)] for a in world.moving}
        self.moves_failed = 0
        self.by_client: Counter[int] = Counter()
        self._users = users(seed, USERS)
        self._met: dict[tuple[str, str], int] = {}  # by canary and user, the version that answered
        self._open: dict[int, openai.AsyncOpenAI] = {}

    @property
    def now(self) -> Seen:
        return self.seen[-1]

    def begin(self, case: str, lenient: bool = False) -> Seen:
        """From now on requests are counted apart."""
        self.seen.append(Seen(case, lenient))
        return self.now

    def stop(self) -> None:
        self._stop = True

    async def run(self) -> None:
        """Ask until `stop`, and to the ends of what was asked by then."""
        clients = [asyncio.create_task(self._keep_asking(number)) for number in range(self._count)]
        mover = asyncio.create_task(self._keep_moving())
        try:
            await asyncio.gather(*clients)
            await mover
        finally:
            for task in (*clients, mover):
                task.cancel()
            await asyncio.gather(*clients, mover, return_exceptions=True)
            await asyncio.gather(*(client.close() for client in self._open.values()))

    def _client(self, number: int, tenant: str) -> openai.AsyncOpenAI:
        """A client's connections, with a tenant's key."""
        import openai

        if number not in self._open:
            options: dict[str, Any] = {"timeout": TIMEOUT_S, "max_retries": MAX_RETRIES}
            self._open[number] = openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", **options)
        return self._open[number].with_options(api_key=self._keys[tenant])

    async def _keep_asking(self, number: int) -> None:
        import openai

        rng = random.Random(f"{self._seed} {number}")  # noqa: S311
        while not self._stop:
            await asyncio.sleep(rng.expovariate(1 / self._think_s))
            seen, asked = self.now, self._draw(rng)
            tenant = asked.adapter.tenant if asked.adapter else rng.choice(self._world.tenants)
            leaves = rng.random() < 0.08
            seen.sent += 1
            began = time.monotonic()
            try:
                if leaves:
                    await self._leave(self._client(number, tenant), asked, rng, seen)
                    continue
                answer = await self._ask(self._client(number, tenant), asked, seen)
            except openai.APIStatusError as error:
                if asked.adapter is not None and asked.adapter.damage and _told(error, asked.adapter):
                    seen.broken += 1
                else:
                    seen.failures.append(f"{asked.model}: {error.status_code}: {error.message[:300]}")
            except (openai.OpenAIError, httpx.HTTPError, PedroError) as error:
                seen.failures.append(f"{asked.model}: {type(error).__name__}: {error!s:.300}")
            else:
                seen.took()
                self.by_client[number] += 1
                self._judge(asked, answer, began, seen)

    def _draw(self, rng: random.Random) -> PlannedRequest:
        """What is asked next: mostly any adapter, often one whose alias moves or that has a canary."""
        world, kind = self._world, rng.random()
        fields: dict[str, Any] = {
            "length": rng.choice(LENGTHS),
            "stream": rng.random() < 0.5,
        }
        if kind < 0.12:
            return PlannedRequest(None, world.bare, prompt=rng.randrange(len(world.prompts)), **fields)
        group = world.moving if kind < 0.35 else world.canaries if kind < 0.45 else world.steady
        adapter = rng.choice(world.broken if kind > 0.97 else group)
        fields["prompt"] = rng.choice(adapter.prompts)
        if adapter.damage:
            return PlannedRequest(adapter, adapter.name, **fields)
        if group is world.moving:
            if rng.random() < 0.3:
                version = rng.randrange(1, len(adapter.directories) + 1)
                return PlannedRequest(adapter, adapter.ref(version), numbers=frozenset([version]), **fields)
            return PlannedRequest(adapter, rng.choice((adapter.name, f"{adapter.name}@champion")), **fields)
        if group is world.canaries:
            return PlannedRequest(
                adapter, adapter.name, user=rng.choice(self._users), numbers=frozenset([1, 2]), **fields
            )
        name = rng.choice((adapter.name, f"{adapter.name}@champion", adapter.ref(1)))
        return PlannedRequest(adapter, name, numbers=frozenset([1]), **fields)

    async def _ask(self, client: openai.AsyncOpenAI, asked: PlannedRequest, seen: Seen) -> _Answer:
        """A whole answer; a stream that broke is asked again, of the version that had begun to answer."""
        import openai

        if not asked.stream:
            raw: Any = await client.completions.with_raw_response.create(**self._fields(asked, asked.model))
            seen.retried += raw.retries_taken
            whole = raw.parse()
            choice = whole.choices[0]
            return _Answer(choice.text, whole.system_fingerprint or "", choice.finish_reason)
        model = asked.model
        for left in reversed(range(TRIES)):
            answer = _Answer()
            try:
                async for _ in self._pieces(client, asked, model, answer, seen):
                    pass
                if answer.reason is None:
                    raise PedroError("a stream that was cut short looks whole")
                return answer
            except (openai.APIConnectionError, httpx.HTTPError):
                if not left or not answer.text:
                    raise
                seen.repeated += 1
                model = _pinned(answer, model)
        raise AssertionError("not reached")

    async def _pieces(
        self, client: openai.AsyncOpenAI, asked: PlannedRequest, model: str, answer: _Answer, seen: Seen
    ) -> AsyncGenerator[None, None]:
        """Fill `answer` piece by piece."""
        raw: Any = await client.completions.with_raw_response.create(**self._fields(asked, model), stream=True)
        seen.retried += raw.retries_taken
        async with raw.parse() as stream:
            async for chunk in stream:
                answer.text += chunk.choices[0].text
                answer.reason = chunk.choices[0].finish_reason or answer.reason
                if answer.fingerprint and chunk.system_fingerprint != answer.fingerprint:
                    raise PedroError(f"{answer.fingerprint} and {chunk.system_fingerprint} in one answer")
                answer.fingerprint = chunk.system_fingerprint
                yield

    async def _leave(self, client: openai.AsyncOpenAI, asked: PlannedRequest, rng: random.Random, seen: Seen) -> None:
        """Go away in the middle of an answer, or before it has begun."""
        answer, began = _Answer(), time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.01, 0.5)):
                if asked.stream:
                    wanted = rng.randrange(1, 6)
                    async with aclosing(self._pieces(client, asked, asked.model, answer, seen)) as pieces:
                        async for _ in pieces:
                            wanted -= 1
                            if not wanted:
                                break
                else:
                    answer = await self._ask(client, asked, seen)
        seen.cancelled += 1
        if answer.text:
            self._judge(asked, answer, began, seen, whole=False)

    def _fields(self, asked: PlannedRequest, model: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": model, "prompt": self._world.prompts[asked.prompt], "temperature": 0}
        fields |= {"max_tokens": asked.length, "extra_body": {"ignore_eos": True}}
        return fields | ({"user": asked.user} if asked.user else {})

    def _judge(self, asked: PlannedRequest, answer: _Answer, began: float, seen: Seen, whole: bool = True) -> None:
        """Whether the words are those of a version that may have answered."""
        words = answer.text.split()
        if asked.adapter is None:
            wanted = {BARE}
        else:
            every = range(1, len(asked.adapter.directories) + 1) if seen.lenient else ()
            numbers = asked.numbers or {*self._in_force(asked.adapter, began, time.monotonic()), *every}
            wanted = {asked.adapter.ref(number) for number in numbers}
        said = {ref: self._world.words[ref, asked.prompt][: asked.length] for ref in wanted}
        good = [ref for ref, text in said.items() if words == (text if whole else text[: len(words)])]
        named = BARE if asked.adapter is None else answer.fingerprint.partition("#")[0]
        if named in good:
            if whole and asked.user and asked.adapter is not None:
                self._stay(asked, named, seen)
            return
        self._wrong(asked, answer, words, seen)

    def _stay(self, asked: PlannedRequest, ref: str, seen: Seen) -> None:
        """A canary meets the same users each time."""
        assert asked.adapter is not None, "it is a canary"
        assert asked.user is not None, "whose requests name a user"
        number = ModelRef.parse(ref).number
        if self._met.setdefault((asked.adapter.name, asked.user), number) != number:
            seen.wrong[WRONG_VERSION] += 1
            seen.first_wrong = seen.first_wrong or f"{asked.user} of {asked.adapter.name} met another version, {ref}"

    def _wrong(self, asked: PlannedRequest, answer: _Answer, words: list[str], seen: Seen) -> None:
        whose = self._world.whose(asked.prompt, words)
        tenant = asked.adapter.tenant if asked.adapter else ""
        if answer.fingerprint.partition("#")[0] in whose and len(words) < asked.length:
            kind = WRONG_OTHER  # of the right one, but not all of it
        elif asked.adapter is not None and any(ref.startswith(f"{asked.adapter.name}:") for ref in whose):
            kind = WRONG_VERSION
        elif BARE in whose:
            kind = WRONG_BARE
        elif any(ref.partition(".")[0] != tenant for ref in whose):
            kind = WRONG_TENANT
        else:
            kind = WRONG_OTHER
        seen.wrong[kind] += 1
        by = f"{answer.fingerprint}, {len(words)} words as of {', '.join(ref or 'the bare model' for ref in whose[:3])}"
        seen.first_wrong = seen.first_wrong or f"{asked.model}, prompt {asked.prompt}: by {by or 'nobody'}"

    # aliases

    async def _keep_moving(self) -> None:
        """Each alias in turn to its next version, one every second. One that cannot be moved now is moved later."""
        numbers = {adapter.name: itertools.cycle((*range(2, len(adapter.directories) + 1), 1))
                   for adapter in self._world.moving}  # fmt: skip
        headers = {"authorization": f"Bearer {self._admin}"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=TIMEOUT_S) as client:
            for adapter in itertools.cycle(self._world.moving):
                if self._stop:
                    return
                version, asked = next(numbers[adapter.name]), time.monotonic()
                moves = self.moves[adapter.name]
                moves.append((asked, float("inf"), version))  # it may hold from now on
                with suppress(httpx.HTTPError):
                    reply = await client.post(f"/v1/adapters/{adapter.name}/promote", json={"version": version})
                    if reply.status_code == 200:
                        moves[-1] = (asked, time.monotonic(), version)
                self.moves_failed += moves[-1][1] == float("inf")
                await asyncio.sleep(max(0.0, MOVE_EVERY_S - (time.monotonic() - asked)))

    def _in_force(self, adapter: Adapter, asked: float, answered: float) -> set[int]:
        """The versions that were champion at some time from shortly before a request until its answer."""
        return in_force(self.moves[adapter.name], asked - SEEN_WITHIN_S, answered)


def in_force(moves: list[tuple[float, float, int]], since: float, until: float) -> set[int]:
    """The versions that may have been champion in that time. A move is (asked for, made, version); one that was never
    told to be made (inf) may be made or not, so it ends no other."""
    versions, end = set(), float("inf")
    for asked, made, version in reversed(moves):
        if asked <= until and end >= since:
            versions.add(version)
        if made != float("inf"):
            end = made
    return versions


def _pinned(answer: _Answer, model: str) -> str:
    """The version that had begun to answer, to be asked by its number."""
    ref = answer.fingerprint.partition("#")[0]
    return ref if ":" in ref else model


def _told(error: openai.APIStatusError, adapter: Adapter) -> bool:
    """Whether an error says that this adapter cannot be served."""
    return error.code in BROKEN_CODES and adapter.name in error.message
