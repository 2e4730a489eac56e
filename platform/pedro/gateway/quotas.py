"""Admits requests: enforces limits per tenant and key, and each tenant's share of open requests.

A limit per minute is a bucket with a minute's worth that refills evenly; a budget per day or month is renewed when the
next one begins, in UTC. Tokens are reserved in advance and settled with what was used; this may overdraw a limit, which
then refills first. A single gateway keeps buckets per minute in memory. Several gateways share them by leases
(`leases.py`), as they do budgets, which also outlive the process.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.errors import BudgetError, RateLimitError
from pedro.gateway.buckets import Allowance, Clock, LocalBuckets
from pedro.gateway.edge import at_end, response_headers
from pedro.gateway.lease import Lease
from pedro.gateway.leases import Leases
from pedro.store import kind_of, period_of, utc, window_end

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Scope

    from pedro.gateway.auth import Principal
    from pedro.gateway.backend import GenerateCall
    from pedro.store import Store

MAX_BUCKETS = 10_000
CHARACTERS_A_TOKEN = 4  # estimate for untokenised text; settled with the actual count
ANSWER_ESTIMATE = 256  # tokens of an answer without max_tokens
REQUESTS, TOKENS = "requests", "tokens"


class Ticket:
    """An admitted request's reservation, until it is settled."""

    def __init__(self, buckets: Sequence[Allowance], reserved: int) -> None:
        self._buckets = [(bucket, bucket.window) for bucket in buckets]
        self._reserved = reserved

    def settle(self, used: int) -> None:
        """Replaces the reservation by the actual usage; only the first call counts."""
        for bucket, window in self._buckets:
            bucket.give(self._reserved - used, window)
        self._buckets = []


@dataclass(frozen=True)
class _Limit:
    """One of the buckets that apply to a request."""

    whose: str
    bucket: Allowance
    amount: int

    @property
    def kind(self) -> str:
        return kind_of(self.bucket.what)

    @property
    def period(self) -> str:
        return period_of(self.bucket.what)


class Quotas:
    """The limits of all tenants and keys with quotas. For one event loop: not thread-safe.

    `gateways` share them through `store`; `clock` gives Unix seconds.
    """

    def __init__(self, store: Store, gateways: int = 1, clock: Clock = time.time) -> None:
        self._clock = clock
        self._local = LocalBuckets(MAX_BUCKETS)
        self._leases = Leases(store, gateways, clock)
        self._shared_minutes = gateways > 1

    @property
    def degraded(self) -> bool:
        """Whether the store is away and this gateway applies its share of each limit."""
        return self._leases.away

    async def admit(self, caller: Principal, tokens: int = 0) -> Ticket:
        """Takes one request and `tokens` from the caller's limits, all or nothing.

        Raises RateLimitError, and UnavailableError if the store has been away for too long. `retry_after_s` is None if
        waiting does not help, because the limit is smaller than that many tokens.
        """
        now = self._clock()
        limits = [limit for limit in self._limits(caller, tokens, now) if limit.amount]
        for limit in limits:
            if limit.amount > limit.bucket.limit:
                raise _too_large(limit)
        short = await self._take(limits, now)
        if short:
            raise _refusal(max(short, key=lambda limit: limit.bucket.wait_s(limit.amount, now)), now)
        return Ticket([limit.bucket for limit in limits if limit.kind == TOKENS], tokens)

    async def close(self) -> None:
        """Return what other gateways can use."""
        await self._leases.close()

    async def _take(self, limits: list[_Limit], now: float) -> list[_Limit]:
        """Take from all limits. Returns those that are short; then nothing was taken."""
        taken = [limit for limit in limits if limit.bucket.take(limit.amount, now)]
        short = [limit for limit in limits if limit not in taken]
        try:
            leases = [(limit.bucket, limit.amount) for limit in short if isinstance(limit.bucket, Lease)]
            if short and len(leases) == len(short):
                granted = await self._leases.take(leases)
                taken += [limit for limit, well in zip(short, granted, strict=True) if well]
                short = [limit for limit, well in zip(short, granted, strict=True) if not well]
        except BaseException:
            _give_back(taken)
            raise
        if short:
            _give_back(taken)
        return short

    def headers(self, caller: Principal) -> dict[str, str]:
        """OpenAI's x-ratelimit-* headers of the limit with the least left; none without a quota, or before the store
        was queried."""
        now = self._clock()
        headers: dict[str, str] = {}
        limits = [limit for limit in self._limits(caller, 0, now) if _known(limit.bucket)]
        for kind in (REQUESTS, TOKENS):
            buckets = [limit.bucket for limit in limits if limit.kind == kind]
            if buckets:
                tightest = min(buckets, key=lambda bucket: bucket.left(now))
                headers[f"x-ratelimit-limit-{kind}"] = str(tightest.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(tightest.left(now))))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(tightest.wait_s(tightest.limit, now))
        return headers

    def _limits(self, caller: Principal, tokens: int, now: float) -> list[_Limit]:
        limits = []
        for whose, subject, quota in (
            (f"tenant {caller.tenant}", f"tenant:{caller.tenant}", caller.tenant_quota),
            ("this API key", f"key:{caller.key_id}", caller.key_quota),
        ):
            for what, limit in quota.__dict__.items():
                if limit is not None and kind_of(what) in (REQUESTS, TOKENS):  # requests use no training hours
                    shared = self._shared_minutes or period_of(what) != "minute"
                    bucket = (self._leases if shared else self._local).find(subject, what, limit, now)
                    limits.append(_Limit(whose, bucket, 1 if kind_of(what) == REQUESTS else tokens))
        return limits


class OpenRequests:
    """Limits open requests. A tenant may have as many as are free, so some are always free.

    One busy tenant gets half of all, two a third each: a newcomer always finds room.
    For one event loop: not thread-safe.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Open requests of all tenants."""
        return self._held.total()

    def enter(self, tenant: str, scope: Scope) -> None:
        """Count the request of `scope` until it ends. Raises RateLimitError."""
        held = self._held[tenant]
        if held and held >= self._total - self._held.total():
            raise RateLimitError(
                f"{held} of your requests are open, which is your share of what this server keeps open; "
                "wait for some to end."
            )
        self._held[tenant] += 1
        at_end(scope, lambda: self._leave(tenant))

    def _leave(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]


async def admit(request: Request, caller: Principal, tokens: int = 0) -> Ticket:
    """Takes one request and `tokens` from the quotas; the response always gets the x-ratelimit-* headers.

    Raises RateLimitError. The ticket must be settled once the tokens used are known.
    """
    quotas: Quotas = request.app.state.quotas
    try:
        return await quotas.admit(caller, tokens)
    except RateLimitError:
        request.state.over_quota = True  # for the metrics
        raise
    finally:
        response_headers(request.scope).update(quotas.headers(caller))


def reservation(calls: Sequence[GenerateCall]) -> int:
    """Tokens to reserve for `calls`: their prompts, and the most tokens of each answer."""
    answers: int = sum(call.n * call.params.get("max_tokens", ANSWER_ESTIMATE) for call in calls)
    return sum(prompt_estimate(call) for call in calls) + answers


def prompt_estimate(call: GenerateCall) -> int:
    """Tokens of the prompt: counted if given as ids, else estimated from its length."""
    if call.messages is not None:
        told = [json.dumps(message["tool_calls"]) for message in call.messages if "tool_calls" in message]
        if call.tools is not None:
            told.append(json.dumps(call.tools.tools))
        return sum(map(_guess, (*(message["content"] for message in call.messages), *told)))
    return _guess(call.prompt) if isinstance(call.prompt, str) else len(call.prompt or ())


def _guess(text: str) -> int:
    return -(-len(text.encode()) // CHARACTERS_A_TOKEN)


def _known(bucket: Allowance) -> bool:
    return not isinstance(bucket, Lease) or bucket.known


def _give_back(limits: Sequence[_Limit]) -> None:
    for limit in limits:
        limit.bucket.give(limit.amount, limit.bucket.window)


def _refusal(limit: _Limit, now: float) -> RateLimitError:
    bucket = limit.bucket
    wait_s = bucket.wait_s(limit.amount, now)
    numbers = f"limit {bucket.limit}, remaining {max(0, int(bucket.left(now)))}, requested {limit.amount}"
    if limit.period != "minute":
        renewed = window_end(bucket.what, now)
        error: RateLimitError = BudgetError(
            f"You exceeded your current quota: the {limit.period}'s budget of {limit.kind} of {limit.whose} "
            f"({bucket.what}) is used up: {numbers}. It is renewed at {utc(renewed)}."
        )
        error.retry_after_s = renewed - now
        return error
    error = RateLimitError(
        f"Rate limit reached for {limit.whose} on {limit.kind} per minute: {numbers}. Please try again in "
        f"{_duration(wait_s)}."
    )
    error.retry_after_s = wait_s
    return error


def _too_large(limit: _Limit) -> RateLimitError:
    kind: type[RateLimitError] = RateLimitError if limit.period == "minute" else BudgetError
    error = kind(
        f"Request too large for {limit.whose} on {limit.kind} per {limit.period}: limit {limit.bucket.limit}, "
        f"requested {limit.amount} (prompt and max_tokens together). Shorten the prompt or lower max_tokens."
    )
    error.retry_after_s = None
    return error


def _duration(seconds: float) -> str:
    """In the format of OpenAI's headers: 120ms, 1.5s, 6m0s, 16h24m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"
