"""A bounded history of one gateway's scrapes: fine intervals of the last hour, coarse ones of the last two days.

An interval holds what each adapter gained between two scrapes, so its size follows the adapters with traffic, of which
a replica names 100 at most. It is kept as compressed JSON, as it is sent to whoever asks.
"""

from __future__ import annotations

import json
import math
import threading
import uuid
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedro.traffic.scrape import Histogram, Scrape, SeriesSource, Traffic, gained, increase

FINE_S = 3600.0
COARSE_S = 300.0  # an interval of the coarse ones
LONGEST_S = 48 * 3600.0
MOST_FINE = 720  # one every 5 s
UNSEEN_S = 60.0  # between two scrapes: nothing is known of that time
FORGOTTEN_S = 900.0  # a series unseen for so long starts anew


@dataclass(frozen=True)
class Interval:
    """From one scrape to the next, in seconds since the epoch. `gauges` are as of the end; of several, their peak."""

    start: float
    end: float
    gauges: Mapping[str, float]
    traffic: Mapping[str, Traffic]

    @property
    def seconds(self) -> float:
        return max(self.end - self.start, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: the last bucket of a histogram is the infinite one, which is not named."""
        return {
            "start": round(self.start, 3),
            "end": round(self.end, 3),
            "gauges": dict(self.gauges),
            "traffic": {
                name: {
                    "counts": part.counts,
                    "histograms": {
                        which: [held.upper[:-1], held.counts]
                        for which, held in part.histograms.items()
                        if held.total and math.isinf(held.upper[-1])
                    },
                }
                for name, part in self.traffic.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Interval:
        """Raises KeyError, TypeError or ValueError for what `to_dict` did not write."""
        traffic = {
            str(name): Traffic(
                {what: float(count) for what, count in part["counts"].items()},
                {
                    which: Histogram((*map(float, upper), math.inf), tuple(map(float, counts)))
                    for which, (upper, counts) in part["histograms"].items()
                },
            )
            for name, part in values["traffic"].items()
        }
        gauges = {str(name): float(value) for name, value in values["gauges"].items()}
        return cls(float(values["start"]), float(values["end"]), gauges, traffic)


@dataclass(frozen=True)
class Window:
    """Part of a history: intervals with the oldest first, when it began to be kept, and its last scrape."""

    id: str
    """Of the history: another one is another process, or one that was started anew."""
    began: float | None
    read_at: float | None
    gauges: Mapping[str, float]
    packed: tuple[bytes, ...]

    def to_json(self) -> bytes:
        """As it is sent; the intervals need not be read for that."""
        head = {
            "object": "metrics.history",
            "id": self.id,
            "began": self.began,
            "read_at": self.read_at,
            "gauges": dict(self.gauges),
        }
        data = b",".join(map(zlib.decompress, self.packed))
        return json.dumps(head).encode().removesuffix(b"}") + b', "data": [' + data + b"]}"


class TrafficHistory:
    """Takes in scrapes, one after the other, and tells what happened between them. Thread-safe."""

    def __init__(self, most_fine: int = MOST_FINE) -> None:
        self.id = uuid.uuid4().hex
        self._fine: deque[tuple[float, bytes]] = deque(maxlen=most_fine)
        self._coarse: deque[tuple[float, bytes]] = deque(maxlen=int(LONGEST_S / COARSE_S))
        self._growing: Interval | None = None  # the next of the coarse ones
        self._seen: dict[SeriesSource, tuple[float, dict[str, float]]] = {}
        self._began: float | None = None
        self._last: float | None = None
        self._gauges: Mapping[str, float] = {}
        self._lock = threading.Lock()

    @property
    def read_at(self) -> float | None:
        """When the last scrape was."""
        return self._last

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
            if self._last is not None and now - self._last <= UNSEEN_S:
                self._keep(Interval(self._last, now, scrape.gauges, gained(grown)))
            self._began = now if self._began is None else self._began
            self._last, self._gauges = now, scrape.gauges

    def window(self, now: float, seconds: float, after: float = 0.0) -> Window:
        """The intervals that end within the last `seconds` and later than `after`: coarse ones beyond an hour."""
        with self._lock:
            since = max(now - seconds, after)
            if seconds <= FINE_S:
                kept = [packed for end, packed in self._fine if end > since]
            else:
                kept = [packed for end, packed in self._coarse if end > since]
                if self._growing is not None and self._growing.end > since:
                    kept.append(_packed(self._growing))
            return Window(self.id, self._began, self._last, self._gauges, tuple(kept))

    def _keep(self, interval: Interval) -> None:
        self._fine.append((interval.end, _packed(interval)))
        growing = self._growing
        if growing is not None and (growing.seconds >= COARSE_S or interval.start > growing.end):
            self._coarse.append((growing.end, _packed(growing)))
            growing = None
        self._growing = interval if growing is None else joined([growing, interval])


def coarser(intervals: Sequence[Interval], points: int) -> list[Interval]:
    """Neighbours joined until at most about `points` are left; none across a time that was not observed."""
    if len(intervals) <= points:
        return list(intervals)
    step = (intervals[-1].end - intervals[0].start) / points
    groups: list[list[Interval]] = [[]]
    for interval in intervals:
        group = groups[-1]
        if group and (interval.end - group[0].start > step or interval.start - group[-1].end > UNSEEN_S):
            groups.append([])
        groups[-1].append(interval)
    return [joined(group) for group in groups]


def joined(group: Sequence[Interval]) -> Interval:
    """Several intervals as one: what was gained in all, and the peak of each gauge."""
    traffic: dict[str, Traffic] = {}
    for interval in group:
        for name, part in interval.traffic.items():
            traffic[name] = traffic.get(name, Traffic()) + part
    return Interval(group[0].start, group[-1].end, _peaks(group), traffic)


def _peaks(group: Iterable[Interval]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for interval in group:
        for name, value in interval.gauges.items():
            peaks[name] = max(value, peaks.get(name, value))
    return peaks


def _packed(interval: Interval) -> bytes:
    return zlib.compress(json.dumps(interval.to_dict(), separators=(",", ":")).encode())
