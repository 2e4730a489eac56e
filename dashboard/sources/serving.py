"""Serving over the last hour: scrapes become a bounded history, the history becomes lines and tables.

A history holds what each adapter gained between two scrapes, so its size follows the adapters with traffic, not all.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.registry import Registry
from sources.adapters import read_champions, read_promotions
from sources.metrics import Histogram, Scrape, SeriesSource, Traffic, gained, increase, parse_metrics
from sources.stores import ask_registry

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import Position
    from sources.gateway import GatewayClient

INTERVAL_S = 5.0
LONGEST_S = 3600.0  # that can be looked back
KEPT = int(LONGEST_S / INTERVAL_S)  # intervals
FORGOTTEN_S = 900.0  # a series unseen for so long starts anew
PERCENTILES = (0.5, 0.95, 0.99)
UNSEEN_S = 60.0  # between two scrapes: nobody looked
POINTS = 90  # of a line, however long its time
REST = "all others"
OWN = ""  # what no adapter gained: loads, evictions, refusals


@dataclass(frozen=True)
class ChampionSwap:
    """A champion that moved; `old` is None where there was none, or where nobody saw which it was."""

    at: float
    name: str
    new: int
    old: int | None = None


@dataclass(frozen=True)
class Interval:
    """From one scrape to the next, in seconds since the epoch. `gauges` are as of the end."""

    start: float
    end: float
    gauges: Mapping[str, float]
    traffic: Mapping[str, Traffic]

    @property
    def seconds(self) -> float:
        return max(self.end - self.start, 1e-9)


@dataclass
class History:
    """The last hour of one gateway. Shared by every session that looks at it; thread-safe."""

    kept: int = KEPT
    stamp: Position | None = None  # of the registry, as of the champions that are known
    _intervals: deque[Interval] = field(init=False)
    _swaps: deque[ChampionSwap] = field(default_factory=lambda: deque(maxlen=200), init=False)
    _seen: dict[SeriesSource, tuple[float, dict[str, float]]] = field(default_factory=dict, init=False)
    _champions: dict[str, int] | None = field(default=None, init=False)
    _asked: float = field(default=float("-inf"), init=False)
    _last: float | None = field(default=None, init=False)
    _gauges: Mapping[str, float] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._intervals = deque(maxlen=self.kept)

    def due(self, now: float, every_s: float = INTERVAL_S) -> bool:
        """Whether it is time to scrape; says so to one of the sessions that ask."""
        with self._lock:
            if now - self._asked < 0.8 * every_s:
                return False
            self._asked = now
            return True

    def add(self, now: float, scrape: Scrape) -> None:
        """Take in a scrape. A replica met for the first time brings its past along, so nothing of it counts yet."""
        with self._lock:
            if self._last is not None and now <= self._last:
                return
            met = {source.replica for source in self._seen}
            grown = {}
            for source, series in scrape.totals.items():
                if source.replica in met:
                    grown[source] = increase(self._seen.get(source, (now, {}))[1], series)
                self._seen[source] = now, series
            self._seen = {source: held for source, held in self._seen.items() if now - held[0] < FORGOTTEN_S}
            if self._last is not None:
                self._intervals.append(Interval(self._last, now, scrape.gauges, gained(grown)))
            self._last, self._gauges = now, scrape.gauges

    @property
    def latest(self) -> tuple[float | None, Mapping[str, float]]:
        """When the last scrape was, and its gauges."""
        with self._lock:
            return self._last, self._gauges

    def follow(
        self,
        now: float,
        champions: Mapping[str, int],
        earlier: Callable[[], Iterable[ChampionSwap]],
        names: Collection[str] | None = None,
    ) -> None:
        """Compare the champions, all of them or those among `names`, with those of the last time: what moved is a
        swap. `earlier` is asked once."""
        with self._lock:
            if self._champions is None:
                self._swaps.extend(earlier())
            else:
                for name, version in champions.items():
                    if self._champions.get(name) != version:
                        self._swaps.append(ChampionSwap(now, name, version, self._champions.get(name)))
            if names is None or self._champions is None:
                self._champions = dict(champions)
            else:
                for name in names:
                    self._champions.pop(name, None)
                self._champions.update(champions)

    def window(self, now: float, seconds: float) -> tuple[list[Interval], list[ChampionSwap]]:
        """The intervals and swaps of the last `seconds`, oldest first."""
        with self._lock:
            return (
                [interval for interval in self._intervals if interval.end > now - seconds],
                [swap for swap in self._swaps if swap.at > now - seconds],
            )


def scrape_into(history: History, gateway: GatewayClient, now: float) -> str:
    """Read the gateway's figures into the history; why that failed, or nothing."""
    try:
        history.add(now, parse_metrics(gateway.metrics()))
    except PedroError as error:
        return error.message
    except ValueError as error:
        return f"{gateway.url}/metrics gave no Prometheus text: {str(error)[:200]}"
    return ""


def follow_registry(history: History, settings: Settings, now: float) -> None:
    """Let the history know which champions there are, if the registry changed since; not while it does not answer."""
    stamp, _ = ask_registry(settings, Registry.stamp, None)
    if stamp is not None and stamp == history.stamp:
        return
    seen = read_champions(settings, history.stamp)
    if seen is not None:
        since = now - LONGEST_S
        earlier = lambda: [ChampionSwap(*moved) for moved in read_promotions(settings, since)]  # noqa: E731
        history.follow(now, seen.champions, earlier, seen.names)
        history.stamp = seen.position  # older than what was read, never newer


def adapters_of(intervals: Iterable[Interval]) -> list[str]:
    """Those with traffic, the busiest first."""
    tokens: dict[str, float] = {}
    for interval in intervals:
        for name, traffic in interval.traffic.items():
            if name != OWN:
                counts = traffic.counts
                tokens[name] = tokens.get(name, 0.0) + counts.get("completion_tokens", 0) + counts.get("requests", 0)
    return sorted(tokens, key=lambda name: (-tokens[name], name))


def coarser(intervals: Sequence[Interval], points: int = POINTS) -> list[Interval]:
    """Neighbours joined until at most about `points` are left."""
    if len(intervals) <= points:
        return list(intervals)
    step = (intervals[-1].end - intervals[0].start) / points
    joined: list[list[Interval]] = [[]]
    for interval in intervals:
        if joined[-1] and interval.end - joined[-1][0].start > step:
            joined.append([])
        joined[-1].append(interval)
    return [_joined(group) for group in joined]


def rate_rows(
    intervals: Iterable[Interval], names: Sequence[str], what: str = "completion_tokens"
) -> list[dict[str, Any]]:
    """What the named adapters gained a second, one row an interval and adapter; all others together are `REST`."""
    rows = []
    for interval in intervals:
        values = {name: _count(interval, name, what) for name in names}
        rest = sum(_count(interval, name, what) for name in interval.traffic if name not in values)
        shown = {**values, REST: rest} if rest else values
        rows += [{"at": interval.end, "adapter": name, "value": value} for name, value in shown.items()]
    return rows


def gauge_rows(intervals: Iterable[Interval], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Gauges by the names under which they are shown, one row an interval and gauge.

    Nothing is known of a time when nobody looked: a row without a value stands before it.
    """
    rows: list[dict[str, Any]] = []
    for interval in intervals:
        for gauge, shown in names.items():
            if interval.seconds > UNSEEN_S:
                rows.append({"at": interval.start + 1e-3, "what": shown, "value": None})
            rows.append({"at": interval.end, "what": shown, "value": interval.gauges.get(gauge, 0.0)})
    return rows


def percentile_rows(
    intervals: Iterable[Interval], which: str, names: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """p50, p95 and p99 of one histogram over time, of the named adapters together (all of them by default).

    Where nothing was observed there is no point.
    """
    kept = None if names is None else set(names)
    rows = []
    for interval in intervals:
        observed = histogram([interval], which, kept)
        for q in PERCENTILES:
            value = observed.quantile(q)
            if value is not None:
                rows.append({"at": interval.end, "percentile": f"p{100 * q:g}", "value": value})
    return rows


def histogram(intervals: Iterable[Interval], which: str, names: Iterable[str] | None = None) -> Histogram:
    """All observations of the named adapters together."""
    kept = None if names is None else set(names)
    whole = Histogram()
    for interval in intervals:
        for name, traffic in interval.traffic.items():
            if which in traffic.histograms and (kept is None or name in kept):
                whole = whole + traffic.histograms[which]
    return whole


def adapter_table(intervals: Sequence[Interval]) -> list[dict[str, Any]]:
    """One row an adapter with traffic, the busiest first: rates over the whole time, percentiles in milliseconds."""
    seconds = sum(interval.seconds for interval in intervals)
    rows = []
    for name in adapters_of(intervals):
        total = Traffic()
        for interval in intervals:
            if name in interval.traffic:
                total = total + interval.traffic[name]
        row: dict[str, Any] = {
            "adapter": name,
            "requests": total.counts.get("requests", 0.0),
            "failed": total.counts.get("failed", 0.0),
            "requests_per_s": total.counts.get("requests", 0.0) / seconds,
            "tokens_per_s": total.counts.get("completion_tokens", 0.0) / seconds,
            "prompt_tokens_per_s": total.counts.get("prompt_tokens", 0.0) / seconds,
        }
        for which in ("first", "each", "queued"):
            for q in PERCENTILES:
                value = total.histograms.get(which, Histogram()).quantile(q)
                row[f"{which}_p{100 * q:g}"] = None if value is None else 1000 * value
        rows.append(row)
    return rows


def total(intervals: Iterable[Interval], what: str, name: str = OWN) -> float:
    """What was gained in all, of counts that belong to no adapter by default."""
    return sum(interval.traffic.get(name, Traffic()).counts.get(what, 0.0) for interval in intervals)


def marks(intervals: Iterable[Interval], swaps: Iterable[ChampionSwap]) -> list[dict[str, Any]]:
    """What happened at a moment: swaps, evictions, refusals, failed loads."""
    rows: list[dict[str, Any]] = [
        {"at": swap.at, "event": "Swap", "text": f"{swap.name}: {_version(swap.old)}→ v{swap.new}"} for swap in swaps
    ]
    shown = {"evictions": "Eviction", "refused": "429", "load_failures": "Failed load"}
    for interval in intervals:
        for what, event in shown.items():
            count = total([interval], what)
            if count:
                rows.append({"at": interval.end, "event": event, "text": f"{count:,.0f} in {interval.seconds:.0f} s"})
    return sorted(rows, key=lambda row: row["at"])


def _joined(group: Sequence[Interval]) -> Interval:
    traffic: dict[str, Traffic] = {}
    for interval in group:
        for name, part in interval.traffic.items():
            traffic[name] = traffic.get(name, Traffic()) + part
    gauges = {
        name: max(interval.gauges.get(name, 0.0) for interval in group)
        for name in {name for interval in group for name in interval.gauges}
    }
    return Interval(group[0].start, group[-1].end, gauges, traffic)


def _count(interval: Interval, name: str, what: str) -> float:
    return interval.traffic.get(name, Traffic()).counts.get(what, 0.0) / interval.seconds


def _version(number: int | None) -> str:
    return "" if number is None else f"v{number} "
