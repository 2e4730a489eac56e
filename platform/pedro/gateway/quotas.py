"""Admits requests: each tenant and key has its requests and tokens a minute, and a tenant its share of the open ones.

A limit is a bucket that holds a minute's worth and refills evenly. Tokens are reserved before the work and settled by
what was used; a bucket may go below zero then, and is paid back by waiting. Buckets live in this process: with several
gateways each enforces its share, so that together they never give more than the quota.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.errors import RateLimitError
from pedro.gateway.edge import at_end, response_headers

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.types import Scope

    from pedro.gateway.auth import Principal
    from pedro.gateway.backend import GenerateCall

MAX_BUCKETS = 10_000  # above this number full ones are dropped: a new one is full as well
CHARACTERS_A_TOKEN = 4  # of a text that nobody has tokenised yet; what it really was is settled
ANSWER_ESTIMATE = 256  # tokens of an answer whose length the request leaves open
REQUESTS, TOKENS = "requests", "tokens"


class Bucket:
    """`limit` a minute. `level` is what is left now, below zero a debt; times are of the clock that is handed in."""

    def __init__(self, limit: int, share: float, now: float) -> None:
        self._share = share
        self._at = now
        self._set(limit)
        self._level = self.capacity

    def level(self, now: float) -> float:
        """What may be taken now."""
        self._level = min(self.capacity, self._level + (now - self._at) * self._rate)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Takes `amount`, or gives it back if it is negative."""
        self._level = min(self.capacity, self._level - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until the level is at `amount`; 0 if it is now."""
        return max(0.0, (amount - self.level(now)) / self._rate)

    def resize(self, limit: int, now: float) -> None:
        """Takes another limit: what is left stays, and what a higher one adds can be used at once."""
        left, old = self.level(now), self.capacity
        self._set(limit)
        self._level = min(self.capacity, left + max(0.0, self.capacity - old))

    def _set(self, limit: int) -> None:
        self.limit = limit
        self.capacity = max(1.0, limit * self._share)
        self._rate = limit * self._share / 60


class Ticket:
    """One admitted request: what it reserved, until it is settled."""

    def __init__(self, buckets: Sequence[Bucket], reserved: int) -> None:
        self._buckets = buckets
        self._reserved = reserved

    def settle(self, used: int) -> None:
        """Puts what was used in the place of what was reserved; only the first call counts."""
        for bucket in self._buckets:
            bucket.take(used - self._reserved)
        self._buckets = ()


@dataclass(frozen=True)
class _Limit:
    """One of the buckets that a request is held to."""

    kind: str
    whose: str
    bucket: Bucket
    amount: int


class Quotas:
    """Buckets of every tenant and key that has a quota. For one event loop: not thread-safe."""

    def __init__(self, gateways: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = 1 / gateways
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, caller: Principal, tokens: int = 0) -> Ticket:
        """Takes one request and `tokens` from the caller's quotas, all or nothing. Raises RateLimitError.

        Its `retry_after_s` is None where waiting does not help, because the quota never holds that many tokens.
        """
        now = self._clock()
        limits = [limit for limit in self._limits(caller, tokens, now) if limit.amount]
        for limit in limits:
            if limit.amount > limit.bucket.capacity:
                raise _too_large(limit)
        short = [limit for limit in limits if limit.bucket.wait_s(limit.amount, now) > 0]
        if short:
            raise _refusal(max(short, key=lambda limit: limit.bucket.wait_s(limit.amount, now)), now)
        for limit in limits:
            limit.bucket.take(limit.amount)
        return Ticket([limit.bucket for limit in limits if limit.kind == TOKENS], tokens)

    def headers(self, caller: Principal) -> dict[str, str]:
        """OpenAI's x-ratelimit-* of what is left, of the tighter of tenant's and key's; none without a quota."""
        now = self._clock()
        headers: dict[str, str] = {}
        for kind in (REQUESTS, TOKENS):
            buckets = [limit.bucket for limit in self._limits(caller, 0, now) if limit.kind == kind]
            if buckets:
                tightest = min(buckets, key=lambda bucket: bucket.level(now))
                headers[f"x-ratelimit-limit-{kind}"] = str(tightest.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(tightest.level(now))))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(tightest.wait_s(tightest.capacity, now))
        return headers

    def _limits(self, caller: Principal, tokens: int, now: float) -> list[_Limit]:
        limits = []
        for whose, subject, quota in (
            (f"tenant {caller.tenant}", f"tenant:{caller.tenant}", caller.tenant_quota),
            ("this API key", caller.key_id, caller.key_quota),
        ):
            if quota.requests_per_minute is not None:
                bucket = self._bucket(subject, REQUESTS, quota.requests_per_minute, now)
                limits.append(_Limit(REQUESTS, whose, bucket, 1))
            if quota.tokens_per_minute is not None:
                bucket = self._bucket(subject, TOKENS, quota.tokens_per_minute, now)
                limits.append(_Limit(TOKENS, whose, bucket, tokens))
        return limits

    def _bucket(self, subject: str, kind: str, limit: int, now: float) -> Bucket:
        bucket = self._buckets.get((subject, kind))
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                self._buckets = {k: b for k, b in self._buckets.items() if b.level(now) < b.capacity}
            bucket = self._buckets[subject, kind] = Bucket(limit, self._share, now)
        elif bucket.limit != limit:
            bucket.resize(limit, now)
        return bucket


class OpenRequests:
    """How many requests are open at once. A tenant may hold as many as are free, so there are always free ones.

    One busy tenant gets half of all, two a third each: however many there are, a newcomer finds its share.
    For one event loop: not thread-safe.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()

    def enter(self, tenant: str, scope: Scope) -> None:
        """Count the request of `scope` until it is answered. Raises RateLimitError."""
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


def admit(request: Request, caller: Principal, tokens: int = 0) -> Ticket:
    """Takes one request and `tokens` from the quotas; the response has the x-ratelimit-* headers either way.

    Raises RateLimitError. The ticket must be settled once the tokens used are known.
    """
    quotas: Quotas = request.app.state.quotas
    try:
        return quotas.admit(caller, tokens)
    except RateLimitError:
        request.state.over_quota = True  # for the metrics
        raise
    finally:
        response_headers(request.scope).update(quotas.headers(caller))


def reservation(calls: Sequence[GenerateCall]) -> int:
    """Tokens to set aside for `calls`: their prompts, and for each answer the most that it may have."""
    answers: int = sum(call.n * call.params.get("max_tokens", ANSWER_ESTIMATE) for call in calls)
    return sum(prompt_estimate(call) for call in calls) + answers


def prompt_estimate(call: GenerateCall) -> int:
    """Tokens of the prompt: counted where it came as ids, guessed from its length otherwise."""
    if call.messages is not None:
        return sum(_guess(message["content"]) for message in call.messages)
    return _guess(call.prompt) if isinstance(call.prompt, str) else len(call.prompt or ())


def _guess(text: str) -> int:
    return -(-len(text.encode()) // CHARACTERS_A_TOKEN)


def _refusal(limit: _Limit, now: float) -> RateLimitError:
    wait_s = limit.bucket.wait_s(limit.amount, now)
    error = RateLimitError(
        f"Rate limit reached for {limit.whose} on {limit.kind} per minute: limit {limit.bucket.limit}, remaining "
        f"{max(0, int(limit.bucket.level(now)))}, requested {limit.amount}. Please try again in {_duration(wait_s)}."
    )
    error.retry_after_s = wait_s
    return error


def _too_large(limit: _Limit) -> RateLimitError:
    error = RateLimitError(
        f"Request too large for {limit.whose} on {limit.kind} per minute: limit {int(limit.bucket.capacity)}, "
        f"requested {limit.amount} (prompt and max_tokens together). Shorten the prompt or lower max_tokens."
    )
    error.retry_after_s = None
    return error


def _duration(seconds: float) -> str:
    """As OpenAI's headers say it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
