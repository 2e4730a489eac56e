"""The history of served traffic as a Prometheus keeps it, which may reach further back than a gateway's own.

Asked over its HTTP API for the raw counters and gauges; what grew between two steps is worked out as for a gateway's
own readings. Reference: https://prometheus.io/docs/prometheus/latest/querying/api/#range-queries
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from pedro.config import without_password
from pedro.traffic.history import Interval
from pedro.traffic.scrape import COUNTERS, GAUGES, HISTOGRAMS, SeriesSource, gained, increase
from sources.serving import POINTS, History

if TYPE_CHECKING:
    from sources.gateway import GatewayClient

STEP_S = 15.0  # as a Prometheus scrapes; longer where a window would have more than `POINTS` of them
UNSCRAPED_S = 120.0  # a time without a scrape that is longer was not observed
TIMEOUT_S = 10.0
MOST_BYTES = 64 * 2**20
LABELS = ("finish_reason", "le", "reason")  # by which one source has several series; others are of the scrape
NAMES = "|".join((*COUNTERS, *GAUGES, *(f"{name}_bucket" for name in HISTOGRAMS)))
SERIES = f'{{__name__=~"{NAMES}"}}'
SCRAPED = "max(timestamp(pedro_gateway_open_streams))"  # when the last scrape was, as of each step

Readings = dict[float, dict[SeriesSource, dict[str, float]]]


class PrometheusError(Exception):
    """Why there are no figures, for people."""


@dataclass
class PrometheusHistory(History):
    """One window of the history, asked for as a whole each time. Shared by every session that looks at it."""

    url: str = field(default="", repr=False)
    seconds: float = 900.0

    @property
    def step_s(self) -> float:
        return max(STEP_S, math.ceil(self.seconds / POINTS / STEP_S) * STEP_S)

    def due(self, now: float, every_s: float = STEP_S) -> bool:
        return super().due(now, max(every_s, STEP_S))

    def refresh(self, gateway: GatewayClient, seconds: float) -> str:
        """Ask for the window up to now; why that failed, or nothing."""
        if not self._asking.acquire(blocking=False):
            return self.problem
        try:
            intervals = self._ask(time.time())
        except PrometheusError as error:
            return f"Prometheus at {without_password(self.url)} {error}"
        finally:
            self._asking.release()
        with self._lock:
            self._intervals = intervals
            last = intervals[-1] if intervals else None
            self.read_at, self.gauges = (last.end, last.gauges) if last else (None, {})
        return ""

    def _ask(self, now: float) -> list[Interval]:
        end = math.floor(now / STEP_S) * STEP_S
        ask = {"start": end - math.ceil(self.seconds / self.step_s) * self.step_s, "end": end, "step": self.step_s}
        with httpx.Client(timeout=TIMEOUT_S) as client:
            scraped = dict(point for series in _query(client, self.url, SCRAPED, ask) for point in _points(series))
            totals, gauges = _readings(_query(client, self.url, SERIES, ask))
        return _intervals(scraped, max(UNSCRAPED_S, 1.5 * self.step_s), totals, gauges)


def _query(client: httpx.Client, url: str, query: str, ask: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """The series of a range query. Raises PrometheusError."""
    try:
        with client.stream("GET", f"{url}/api/v1/query_range", params={"query": query, **ask}) as reply:
            read = b""
            for part in reply.iter_bytes():
                read += part
                if len(read) > MOST_BYTES:
                    raise PrometheusError(f"answered with more than {MOST_BYTES // 2**20} MiB")
            status = reply.status_code
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        why = "in time" if isinstance(error, httpx.TimeoutException) else f"({type(error).__name__})"
        raise PrometheusError(f"does not answer {why}") from None
    try:
        told = httpx.Response(200, content=read).json()
        if status != 200 or told["status"] != "success":
            raise PrometheusError(f"refused the query: {str(told['error'])[:200]}")
        if told["data"]["resultType"] != "matrix":
            raise KeyError("matrix")
        return list(told["data"]["result"])
    except (ValueError, KeyError, TypeError):
        raise PrometheusError(f"gave no answer of its API (status {status})") from None


def _points(series: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """The finite values of a series. Raises PrometheusError for what is no series."""
    try:
        for at, text in series["values"]:
            if math.isfinite(value := float(text)):
                yield float(at), value
    except (KeyError, TypeError, ValueError):
        raise PrometheusError("gave no series of its API") from None


def _readings(found: Iterable[Mapping[str, Any]]) -> tuple[Readings, dict[float, dict[str, dict[str, float]]]]:
    """By time: the counts of each source, and each gauge by replica. A replica that several gateways tell of is one."""
    totals: Readings = {}
    gauges: dict[float, dict[str, dict[str, float]]] = {}
    for series in found:
        labels = series.get("metric", {})
        name = labels.get("__name__", "")
        who = labels.get("replica") or labels.get("gateway") or labels.get("instance", "")
        source = SeriesSource(name.removesuffix("_bucket"), who, labels.get("adapter", ""))
        label = next((labels[each] for each in LABELS if each in labels), "")
        for at, value in _points(series):
            if name in GAUGES:
                by_replica = gauges.setdefault(at, {}).setdefault(GAUGES[name], {})
                by_replica[who] = max(value, by_replica.get(who, value))
            else:
                counts = totals.setdefault(at, {}).setdefault(source, {})
                counts[label] = max(value, counts.get(label, value))
    return totals, gauges


def _intervals(
    scraped: Mapping[float, float],
    longest_s: float,
    totals: Readings,
    gauges: Mapping[float, dict[str, dict[str, float]]],
) -> list[Interval]:
    """From scrape to scrape, of those that steps show. A replica met for the first time brings its past along."""
    made: list[Interval] = []
    seen: dict[SeriesSource, dict[str, float]] = {}
    last: float | None = None
    for step, at in sorted(scraped.items()):
        if last is not None and at <= last:  # nothing new: Prometheus repeats a value for some minutes
            continue
        now = totals.get(step, {})
        met = {source.replica for source in seen}
        grown = {source: increase(seen.get(source, {}), now[source]) for source in now if source.replica in met}
        seen |= now
        if last is not None and at - last <= longest_s:
            peaks = {name: sum(each.values()) for name, each in gauges.get(step, {}).items()}
            if "kv_cache_usage" in peaks:
                peaks["kv_cache_usage"] /= len(gauges[step]["kv_cache_usage"])
            made.append(Interval(last, at, peaks, gained(grown)))
        last = at
    return made
