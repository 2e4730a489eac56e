"""Serving over time: the intervals that the gateway keeps become lines and tables.

The gateway reads its figures and the engines' whether or not anybody looks (`/metrics/history`); this holds what it
told already and asks for what is new.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.registry import CHAMPION
from pedro.store import Store
from pedro.traffic.history import COARSE_S, FINE_S, UNSEEN_S, Interval
from pedro.traffic.scrape import Histogram, Traffic
from sources.stores import ask_store
from sources.view import sees

if TYPE_CHECKING:
    from pedro.config import Settings
    from sources.gateway import GatewayClient

INTERVAL_S = 5.0
PERCENTILES = (0.5, 0.95, 0.99)
POINTS = 90  # of a line, however long its time
REST = "all others"
OWN = ""  # what no adapter gained: loads, evictions, refusals


@dataclass(frozen=True)
class ChampionSwap:
    """A champion that moved; `old` is None where there was none."""

    at: float
    name: str
    new: int
    old: int | None = None


@dataclass
class History:
    """What one gateway told of one resolution. Shared by every session that looks at it; thread-safe."""

    began: float | None = None
    """Since when the gateway has kept figures."""
    read_at: float | None = None
    gauges: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    """Why the last asking failed."""
    _id: str = field(default="", init=False)
    _intervals: list[Interval] = field(default_factory=list, init=False)
    _asked: float = field(default=float("-inf"), init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _asking: threading.Lock = field(default_factory=threading.Lock, init=False)

    def due(self, now: float, every_s: float = INTERVAL_S) -> bool:
        """Whether it is time to ask; says so to one of the sessions that look."""
        with self._lock:
            if now - self._asked < 0.8 * every_s:
                return False
            self._asked = now
            return True

    def refresh(self, gateway: GatewayClient, seconds: float) -> str:
        """Ask for what is new of the last `seconds`; why that failed, or nothing."""
        if not self._asking.acquire(blocking=False):  # another session asks
            return self.problem
        try:
            ended = [held.end for held in self._intervals if seconds <= FINE_S or held.seconds >= COARSE_S]
            after = max(ended, default=0.0)  # an interval that still grows is asked for again
            told = gateway.metrics_history(seconds, after)
            if told["id"] != self._id:
                told, after = (gateway.metrics_history(seconds) if after else told), 0.0
            self._take(told, after, seconds)
        except PedroError as error:
            return error.message
        except (KeyError, TypeError, ValueError, AttributeError):
            return f"{gateway.url}/metrics/history gave no history of figures; is it of another release?"
        finally:
            self._asking.release()
        return ""

    def _take(self, told: Mapping[str, Any], after: float, seconds: float) -> None:
        new = [Interval.from_dict(each) for each in told["data"]]
        gauges = {str(name): float(value) for name, value in told["gauges"].items()}
        with self._lock:
            held = [*(each for each in self._intervals if each.end <= after), *new]
            self._intervals = [each for each in held if each.end > held[-1].end - seconds]
            self._id, self.began, self.read_at, self.gauges = str(told["id"]), told["began"], told["read_at"], gauges

    def window(self, now: float, seconds: float) -> list[Interval]:
        """The intervals of the last `seconds`, oldest first."""
        with self._lock:
            return [interval for interval in self._intervals if interval.end > now - seconds]


def read_swaps(settings: Settings, since: float) -> list[ChampionSwap]:
    """Every champion that moved since then, the first first: as the store's history has it."""
    moves, _ = ask_store(settings, lambda store: Store.recent_moves(store, since), [])
    swaps = []
    for name, move in reversed(moves):
        if not sees(settings, name):
            continue
        old, new = (((side or {}).get("aliases") or {}).get(CHAMPION) for side in (move.before, move.after))
        if new is not None and new != old:
            swaps.append(ChampionSwap(move.at, name, new, old))
    return swaps


def gaps(intervals: Sequence[Interval], start: float, end: float) -> list[tuple[float, float]]:
    """From when to when nothing was observed between `start` and `end`; what is shorter than `UNSEEN_S` is none."""
    seen, found = start, []
    for interval in intervals:
        if interval.start - seen > UNSEEN_S:
            found.append((seen, interval.start))
        seen = max(seen, interval.end)
    return [*found, (seen, end)] if end - seen > UNSEEN_S else found


def adapters_of(intervals: Iterable[Interval]) -> list[str]:
    """Those with traffic, the busiest first."""
    tokens: dict[str, float] = {}
    for interval in intervals:
        for name, traffic in interval.traffic.items():
            if name != OWN:
                counts = traffic.counts
                tokens[name] = tokens.get(name, 0.0) + counts.get("completion_tokens", 0) + counts.get("requests", 0)
    return sorted(tokens, key=lambda name: (-tokens[name], name))


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
    """Gauges by the names under which they are shown, one row an interval and gauge; None while no engine answered."""
    return [
        {"at": interval.end, "what": shown, "value": interval.gauges.get(gauge)}
        for interval in intervals
        for gauge, shown in names.items()
    ]


def request_rows(intervals: Iterable[Interval], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Counts a minute of all adapters together, by the names under which they are shown."""
    return [
        {"at": each.end, "what": shown, "value": 60 * sum(_count(each, name, what) for name in each.traffic)}
        for each in intervals
        for what, shown in names.items()
    ]


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


def _count(interval: Interval, name: str, what: str) -> float:
    return interval.traffic.get(name, Traffic()).counts.get(what, 0.0) / interval.seconds


def _version(number: int | None) -> str:
    return "" if number is None else f"v{number} "
