"""Each alert fires when its incident is reproduced, and no other does; calm traffic and small mishaps set off none.

An incident happens at a real gateway, over real figures of replicas, of versions and of what is stored. What two
readings of /metrics gained is repeated as often as the incident lasts, and Prometheus's rules are worked out on that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_server import Gateway, serve
from prometheus_client.parser import text_string_to_metric_families
from promql import Series, fired
from test_runbook import alerts
from traffic_scrapes import STATS, end
from webhook_receiver import LOOPBACK, receiving

from pedro.config import Settings
from pedro.errors import AdapterError, UnavailableError
from pedro.gateway import usage, webhook_runner
from pedro.gateway.app import GatewaySettings
from pedro.gateway.edge import of_gateway
from pedro.refs import ModelRef
from pedro.serving.failover import VersionFaults
from pedro.serving.metrics import ReplicaMetrics, merged
from pedro.sizes import SizeGauges
from pedro.store import JobStatus

EVERY_S = 30.0
CALM_S, INCIDENT_S = 900.0, 4500.0
COUNTERS = ("_total", "_bucket", "_count", "_sum")
Scrape = dict[tuple[str, tuple[tuple[str, str], ...]], float] | None
"""What one reading gave; None where nobody answered."""


class Watched:
    """A gateway, one replica's figures and what is stored, read as Prometheus reads them."""

    def __init__(self, gateway: Gateway, folder: Path) -> None:
        self.gateway = gateway
        self.stats: dict[str, Any] = json.loads(json.dumps(STATS))
        self.stats["adapters"] |= {"pinned": 1, "resident": 4, "bytes": 50, "budget_bytes": 100}
        self.stats |= {"running": 2, "waiting": 0}
        self.replica = ReplicaMetrics("r1", "stories", lambda: self.stats)
        self.faults = VersionFaults()
        self.sizes = SizeGauges(Settings.from_env({"PEDRO_HOME": str(folder / "kept")}))
        self.tenant = gateway.http(gateway.key("acme", ("infer", "train")))
        self._operator = gateway.http(gateway.key("ops", ("admin",)))
        gateway.backend.metrics = self._metrics  # type: ignore[method-assign]

    async def _metrics(self) -> str:
        if not self.gateway.backend.engine_answers:
            raise UnavailableError("No engine replica answers.")
        return merged([self.replica.text(), of_gateway(self.faults.metrics(), "g1"), self.sizes.text()])

    def ask(self, prompt: str = "how are you", times: int = 1) -> list[int]:
        body = {"model": "words-1", "prompt": prompt, "max_tokens": 2}
        return [self.tenant.post("/v1/completions", json=body).status_code for _ in range(times)]

    def calm(self) -> None:
        """What is no incident: answers, a few mistakes of clients, one tenant that asks too much at once, work of the
        engine, an adapter loaded in place of another."""
        assert self.ask(times=20) == [200] * 20
        assert self.ask("queue") == [429]
        assert self.tenant.get("/v1/models/none").status_code == 404
        for _ in range(20):
            end(self.replica, first_s=0.2)
        self.stats["steps"] += 200
        self.stats["adapters"]["loads"] += 1
        self.stats["adapters"]["evictions"] += 1

    def scrape(self) -> Scrape:
        reply = self._operator.get("/metrics")
        assert reply.status_code == 200
        return {
            (sample.name, tuple(sorted({**sample.labels, "job": "pedro"}.items()))): sample.value
            for family in text_string_to_metric_families(reply.text)
            for sample in family.samples
        }

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Iterator[Watched]:
    monkeypatch.setattr(usage, "RETRY_S", 0.02)
    monkeypatch.setattr(usage, "LAST_FLUSH_S", 0.1)  # a database that stays away is not waited for at the end
    monkeypatch.setattr(webhook_runner, "POLL_S", 0.02)
    settings = GatewaySettings(
        name="g1", webhook_key_file=tmp_path / "key", webhook_networks=LOOPBACK, write_usage_every_s=0.01
    )
    with serve(tmp_path, settings=settings) as gateway:
        yield Watched(gateway, tmp_path)


def replayed(*phases: tuple[float, Scrape, Scrape], every_s: float = EVERY_S) -> Series:
    """A time line: in each phase, so many seconds long, counters gain at each reading what they gained between the two
    readings, and gauges stand where they stood at the second."""
    series, totals, at = Series(), {}, 0.0
    for seconds, before, after in phases:
        for _ in range(int(seconds / every_s)):
            up = {("up", (("job", "pedro"),)): float(after is not None)}
            for key, value in (after or {}).items():
                if key[0].endswith(COUNTERS):
                    totals[key] = value = totals.get(key, 0.0) + value - (before or {}).get(key, 0.0)
                up[key] = value
            series.scrape(at, up)
            at += every_s
    return series


def first_seen(series: Series, until: float) -> dict[str, float]:
    return fired(alerts().values(), series, until, every=60.0)


def calm_readings(watched: Watched) -> tuple[Scrape, Scrape]:
    watched.calm()
    before = watched.scrape()
    watched.calm()
    return before, watched.scrape()


def down(watched: Watched) -> None:
    """No gateway answers: there is no reading."""


def no_engine(watched: Watched) -> None:
    watched.gateway.backend.engine_answers = False
    watched.ask(times=3)


def stuck(watched: Watched) -> None:
    watched.ask(times=3)


def errors(watched: Watched) -> None:
    watched.calm()
    assert watched.ask("crash", times=2) == [500, 500]


def slow(watched: Watched) -> None:
    watched.calm()
    for _ in range(4):
        end(watched.replica, first_s=8.0, total_s=9.0)


def queueing(watched: Watched) -> None:
    watched.calm()
    watched.stats["waiting"] = 1


def shedding(watched: Watched) -> None:
    watched.calm()
    assert watched.ask("queue", times=10) == [429] * 10


def out_of_quota(watched: Watched) -> None:
    watched.calm()
    watched.gateway.store.set_quota(tenant="acme", requests_per_minute=1)
    watched.until(lambda: watched.ask() == [429])
    assert watched.ask(times=40) == [429] * 40


def loads_fail(watched: Watched) -> None:
    watched.calm()
    watched.stats["adapters"]["failed_loads"] += 1


def set_aside(watched: Watched) -> None:
    watched.calm()
    watched.faults.add(ModelRef.parse("acme.faq:1#sha256:1"), AdapterError("cut short", code="adapter_unusable"))


def thrash(watched: Watched) -> None:
    watched.calm()
    watched.stats["adapters"]["evictions"] += 40
    watched.stats["adapters"]["bytes"] = 99


def pinned(watched: Watched) -> None:
    watched.calm()
    watched.stats["adapters"] |= {"pinned": 4, "resident": 4, "bytes": 99}


def database_away(watched: Watched) -> None:
    def away(*_: object) -> None:
        tries.append(1)
        raise UnavailableError("The platform's database does not answer; try again.")

    tries: list[int] = []
    watched.gateway.store.add_usage = away  # type: ignore[method-assign]
    watched.calm()
    watched.until(lambda: len(tries) > 2)


def given_up(watched: Watched) -> None:
    watched.calm()
    with receiving() as receiver:
        receiver.statuses = [503] * 9
        client = watched.gateway.client(watched.gateway.key("acme", ("infer", "train")))
        client.webhooks.create(name="hook", url=receiver.url, event_types=["fine_tuning.job.cancelled"])
        watched.gateway.app.state.webhooks.clock = lambda: time.time() + 25 * 3600.0
        job = watched.gateway.store.create_job("acme", "support", {}, queued=True)
        watched.gateway.store.ask_of_job(job.id, JobStatus.CANCELLED)
        watched.until(lambda: "given up" in (next(iter(client.webhooks.list())).last_error or ""))


INCIDENTS = {
    "PedroDown": down,
    "PedroNoEngine": no_engine,
    "PedroEngineStuck": stuck,
    "PedroErrors": errors,
    "PedroSlowFirstToken": slow,
    "PedroQueueing": queueing,
    "PedroShedding": shedding,
    "PedroOutOfQuota": out_of_quota,
    "PedroAdapterLoadsFail": loads_fail,
    "PedroVersionSetAside": set_aside,
    "PedroAdaptersThrash": thrash,
    "PedroPinnedFull": pinned,
    "PedroDatabaseAway": database_away,
    "PedroWebhooksGivenUp": given_up,
}


@pytest.mark.parametrize("alert", INCIDENTS)
def test_an_alert_fires_in_its_incident_and_no_other_does(watched, alert):
    calm = calm_readings(watched)
    before = calm[1]
    INCIDENTS[alert](watched)
    after = None if alert == "PedroDown" else watched.scrape()
    seen = first_seen(replayed((CALM_S, *calm), (INCIDENT_S, before, after)), CALM_S + INCIDENT_S)
    assert seen.keys() == {alert}
    assert seen[alert] >= CALM_S, "not before"


def test_what_is_kept_is_told_of_when_it_will_have_doubled_in_a_week_and_not_when_it_grows_slowly(watched, tmp_path):
    kept = tmp_path / "kept" / "storage" / "runs" / "r" / "file"
    kept.parent.mkdir(parents=True)
    for gain, expected in ((2**20, {"PedroStorageGrows"}), (2**14, set())):  # of 1 GiB, every five minutes
        readings = []
        for size in (2**30 + gain * step for step in range(200)):
            with kept.open("ab") as file:
                file.truncate(size)
            watched.sizes._due_at = 0.0
            watched.sizes.refresh()
            if not readings:
                watched.calm()
                readings.append(watched.scrape())
            readings.append({**readings[0], **_stored(watched)})
        series = Series()
        for at, reading in enumerate(readings):
            series.scrape(at * 300.0, {("up", (("job", "pedro"),)): 1.0, **reading})
        rule = alerts()["PedroStorageGrows"]
        assert fired([rule], series, 200 * 300.0, every=600.0).keys() == expected


def _stored(watched: Watched) -> dict[Any, float]:
    return {
        (sample.name, tuple(sorted({**sample.labels, "job": "pedro"}.items()))): sample.value
        for family in text_string_to_metric_families(watched.sizes.text())
        for sample in family.samples
    }


def test_every_alert_has_an_incident():
    assert {*INCIDENTS, "PedroStorageGrows"} == alerts().keys()


def test_a_moments_mishap_is_no_alert(watched):
    """A restart of the only gateway, one failed write of usage, one failing request, an engine that is replaced."""
    calm = calm_readings(watched)
    before = calm[1]
    database_away(watched)
    watched.ask("crash")
    moment = watched.scrape()
    without = {key: value for key, value in (moment or {}).items() if dict(key[1]).get("replica") is None}
    phases = [(CALM_S, *calm), (30.0, before, moment), (CALM_S, *calm), (60.0, None, None), (CALM_S, *calm)]
    phases += [(60.0, before, without), (CALM_S, *calm)]
    assert first_seen(replayed(*phases), sum(phase[0] for phase in phases)) == {}


def test_of_several_gateways_each_of_which_answers_some_readings_one_alone_can_set_off_an_alert(watched):
    """Any gateway answers Prometheus: a figure of one is there in its readings, and has ended in the others'."""
    calm = watched.scrape()
    set_aside(watched)
    for ours, expected in ((watched.scrape(), {"PedroVersionSetAside"}), (calm, set())):
        series = Series()
        for number in range(60):
            series.scrape(number * EVERY_S, (ours if number % 3 == 0 else _of_another(calm)) or {})
        assert fired([alerts()["PedroVersionSetAside"]], series, 60 * EVERY_S).keys() == expected


def _of_another(reading: Scrape) -> Scrape:
    return {
        (name, tuple((label, "g2" if label == "gateway" else text) for label, text in labels)): value
        for (name, labels), value in (reading or {}).items()
    }
