"""Delivers webhook events in the background: leases them, sends them, retries.

Every gateway runs one. Once the lease of a killed gateway expires, another one takes the event: it is sent at least
once, always with the same id. A tenant has a few deliveries in flight, each with a time limit, so that an unresponsive
receiver delays no other tenant.
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
LEASE_S = 4 * ATTEMPT_S  # attempts end long before
MOST, PER_TENANT = 64, 4  # in flight per gateway
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
            "Attempts to send an event to a webhook endpoint, by outcome.",
            ("outcome",),
            registry=registry,
        )
        for outcome in (DELIVERED, FAILED, GIVEN_UP):
            self._attempts.labels(outcome)
        sending = Gauge("pedro_gateway_webhooks_under_way", "Webhook events being sent.", registry=registry)
        sending.set_function(lambda: len(self._active))

    def start(self) -> None:
        """Start looking for events."""
        self._loop.start()

    async def close(self) -> None:
        """Stop, and leave deliveries in flight to other gateways."""
        await self._loop.end(self._active.values())
        with contextlib.suppress(PedroError):  # then the leases expire
            await asyncio.to_thread(self._store.release_deliveries, self._owner)
        self.sender.close()

    async def _look(self) -> None:
        """Start deliveries that are due, up to the limits."""
        room, now = MOST - len(self._active), self.clock()
        if room <= 0:
            return
        lease, until = self._store.lease_deliveries, now + self._lease_s
        for delivery in await asyncio.to_thread(lease, self._owner, now, until, PER_TENANT, room):
            if delivery.id not in self._active:
                self._active[delivery.id] = asyncio.create_task(self._deliver(delivery))

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        """Make one attempt and record its outcome; if recording fails, the lease expires and it is repeated."""
        try:
            why = await self._attempt(delivery)
            outcome = await asyncio.to_thread(self._settle, delivery, why)
            self._attempts.labels(outcome).inc()
        except Exception as error:  # any error: it is sent again
            log.warning("%s: %s", delivery.event_id, error, exc_info=not isinstance(error, PedroError))
        finally:
            self._active.pop(delivery.id, None)
            self._loop.wake()

    async def _attempt(self, delivery: WebhookDelivery) -> str:
        """Why the delivery failed; empty if it succeeded."""
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
    """Seconds to wait after this many attempts: exponential, with 10 % jitter."""
    wait = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(attempts - 1, 20))
    return wait * random.uniform(0.9, 1.1)  # noqa: S311
