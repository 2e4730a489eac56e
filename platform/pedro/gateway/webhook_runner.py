"""Sends what webhook endpoints wait for, beside the gateway's requests: leases events, sends them, tries again.

Every gateway runs one. An event that a gateway held which was killed is another one's, or the next one's, once the
lease is over: it is sent at least once, each time with the same id. A tenant has a few events under way at a time,
each for a bounded time, so that whoever does not answer holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from pedro.errors import PedroError
from pedro.gateway.poll_loop import PollLoop
from pedro.gateway.webhook_sending import ATTEMPT_S
from pedro.store import DELIVERED, GIVEN_UP, utc

if TYPE_CHECKING:
    from pedro.gateway.webhook_sending import WebhookSender
    from pedro.store import Store, WebhookDelivery

POLL_S = 2.0
LEASE_S = 4 * ATTEMPT_S  # an attempt is over long before
MOST, PER_TENANT = 64, 4  # under way in one gateway
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 3600.0
GIVE_UP_S = 24 * 3600.0  # after the event
FAILED = "failed"
log = logging.getLogger("pedro.gateway")


class WebhookRunner:
    """For one event loop. `clock` gives Unix seconds."""

    def __init__(
        self,
        store: Store,
        sender: WebhookSender,
        registry: CollectorRegistry,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self.sender, self.clock = store, sender, clock
        self._lease_s = lease_s
        self._owner = f"gateway-{secrets.token_hex(8)}"
        self._active: dict[int, asyncio.Task[None]] = {}
        self._loop = PollLoop(self._look, POLL_S, "webhooks are not sent")
        self._attempts = Counter(
            "pedro_gateway_webhook_attempts",
            "Attempts to send an event to a webhook endpoint, by what came of them.",
            ("outcome",),
            registry=registry,
        )
        for outcome in (DELIVERED, FAILED, GIVEN_UP):
            self._attempts.labels(outcome)
        sending = Gauge("pedro_gateway_webhooks_under_way", "Events of webhooks being sent.", registry=registry)
        sending.set_function(lambda: len(self._active))

    def start(self) -> None:
        """Look for events from now on."""
        self._loop.start()

    async def close(self) -> None:
        """Leave what is under way to whoever takes it next."""
        await self._loop.end(self._active.values())
        with contextlib.suppress(PedroError):  # then the leases run out
            await asyncio.to_thread(self._store.release_deliveries, self._owner)
        self.sender.close()

    async def _look(self) -> None:
        """Begin what is due, as far as there is room."""
        room, now = MOST - len(self._active), self.clock()
        if room <= 0:
            return
        lease, until = self._store.lease_deliveries, now + self._lease_s
        for delivery in await asyncio.to_thread(lease, self._owner, now, until, PER_TENANT, room):
            if delivery.id not in self._active:
                self._active[delivery.id] = asyncio.create_task(self._deliver(delivery))

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        """One attempt, and the entry of its end; if that fails, the lease runs out and it is made again."""
        try:
            why = await self._attempt(delivery)
            outcome = await asyncio.to_thread(self._settle, delivery, why)
            self._attempts.labels(outcome).inc()
        except Exception as error:  # whatever it is: it is sent again
            log.warning("%s: %s", delivery.event_id, error, exc_info=not isinstance(error, PedroError))
        finally:
            self._active.pop(delivery.id, None)
            self._loop.wake()

    async def _attempt(self, delivery: WebhookDelivery) -> str:
        """Why the endpoint did not take it; empty if it did."""
        try:
            status = await self.sender.send(delivery.endpoint, delivery.event_id, delivery.body)
        except PedroError as error:
            return error.message
        if 200 <= status < 300:
            return ""
        return f"it answered {status}" + ("; redirects are not followed" if 300 <= status < 400 else "")

    def _settle(self, delivery: WebhookDelivery, why: str) -> str:
        """On a thread."""
        now, attempts = self.clock(), delivery.attempts + 1
        if not why:
            self._store.webhook_delivered(delivery, now)
            return DELIVERED
        again: float | None = now + retry_after(attempts)
        told = f"attempt {attempts} failed: {why}"
        if again is not None and again > delivery.created + GIVE_UP_S:
            again, told = None, f"given up after {attempts} attempts: {why}"
        else:
            told += f"; the next is at {utc(again or 0.0)}"
        self._store.webhook_failed(delivery, now, f"{delivery.event_id} ({delivery.type}): {told}", again)
        return FAILED if again is not None else GIVEN_UP


def retry_after(attempts: int) -> float:
    """Seconds to wait after so many attempts: twice as long each time, a tenth by chance."""
    wait = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(attempts - 1, 20))
    return wait * random.uniform(0.9, 1.1)  # noqa: S311
