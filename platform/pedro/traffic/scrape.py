"""Prometheus text as numbers: samples, increases that survive a restart, percentiles of histograms. Pure functions.

Reference: https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

COUNTERS = {
    "pedro_requests_total": "requests",
    "pedro_prompt_tokens_total": "prompt_tokens",
    "pedro_completion_tokens_total": "completion_tokens",
    "pedro_adapter_loads_total": "loads",
    "pedro_adapter_load_failures_total": "load_failures",
    "pedro_adapter_evictions_total": "evictions",
    "pedro_preemptions_total": "preemptions",
    "pedro_gateway_too_many_requests_total": "refused",
}
HISTOGRAMS = {
    "pedro_time_to_first_token_seconds": "first",
    "pedro_time_per_token_seconds": "each",
    "pedro_queue_seconds": "queued",
}
GAUGES = {
    "pedro_running": "running",
    "pedro_waiting": "waiting",
    "pedro_adapters_resident": "resident",
    "pedro_adapters_pinned": "pinned",
    "pedro_adapter_bytes": "adapter_bytes",
    "pedro_adapter_budget_bytes": "adapter_budget_bytes",
    "pedro_kv_cache_usage_ratio": "kv_cache_usage",
    "pedro_gateway_open_streams": "open_streams",
}
FAILED = ("error",)


class SeriesSource(NamedTuple):
    """Who counts: a metric of one replica or gateway, for one adapter. A restart sets all its series back together."""

    metric: str
    replica: str
    adapter: str


@dataclass(frozen=True)
class Scrape:
    """One reading of /metrics. `totals`: of each source, its series by their one label (`le`, `finish_reason`, …)."""

    totals: dict[SeriesSource, dict[str, float]]
    gauges: dict[str, float]


@dataclass(frozen=True)
class Histogram:
    """Observations by bucket: `upper` bounds in seconds, the last infinite, and how many lie at or under each."""

    upper: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        return self.counts[-1] if self.counts else 0.0

    def __add__(self, other: Histogram) -> Histogram:
        if not other.counts:
            return self
        if not self.counts:
            return other
        if self.upper != other.upper:  # replicas of two releases: what both bound alike is still true
            both = sorted(set(self.upper) & set(other.upper))
            return self.over(both) + other.over(both)
        return Histogram(self.upper, tuple(np.add(self.counts, other.counts).tolist()))

    def over(self, upper: Iterable[float]) -> Histogram:
        """The same observations in fewer buckets, all of them bounds of its own."""
        known = dict(zip(self.upper, self.counts, strict=True))
        bounds = tuple(upper)
        return Histogram(bounds, tuple(known[bound] for bound in bounds))

    def quantile(self, q: float) -> float | None:
        """As Prometheus's histogram_quantile: linear within the bucket that holds the rank; None without observations.

        In the infinite bucket it is the largest finite bound: the least that is certain.
        """
        if not self.total or not math.isinf(self.upper[-1]):
            return None
        counts = np.maximum.accumulate(self.counts)
        rank = q * counts[-1]
        at = int(np.searchsorted(counts, rank, side="left"))
        if at >= len(counts) - 1:
            return self.upper[-2] if len(self.upper) > 1 else None
        low, under = (self.upper[at - 1], counts[at - 1]) if at else (0.0, 0.0)
        if not at and self.upper[0] <= 0:
            return self.upper[0]
        inside = counts[at] - under
        return float(low + (self.upper[at] - low) * ((rank - under) / inside if inside else 0.0))


@dataclass(frozen=True)
class Traffic:
    """What one adapter gained: counts by name ("requests", "failed", tokens) and its three histograms."""

    counts: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            _summed(self.counts, other.counts),
            {
                name: self.histograms.get(name, Histogram()) + other.histograms.get(name, Histogram())
                for name in self.histograms | other.histograms
            },
        )


def parse_metrics(text: str) -> Scrape:
    """The samples that the dashboard shows. Raises ValueError for what is no Prometheus text."""
    totals: dict[SeriesSource, dict[str, float]] = {}
    gauges: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels, value = sample.name, sample.labels, float(sample.value)
            if not math.isfinite(value):
                continue
            base = name.removesuffix("_bucket")
            if name in COUNTERS or (base in HISTOGRAMS and name != base):
                source = SeriesSource(base, labels.get("replica", labels.get("gateway", "")), labels.get("adapter", ""))
                series = totals.setdefault(source, {})
                label = _label(labels)
                series[label] = series.get(label, 0.0) + value
            elif name in GAUGES:
                gauges.setdefault(GAUGES[name], []).append(value)
    merged = {name: sum(values) for name, values in gauges.items()}
    if "kv_cache_usage" in merged:
        merged["kv_cache_usage"] /= len(gauges["kv_cache_usage"])
    return Scrape(totals, merged)


def increase(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """How much each series of one source grew; after a restart, which sets them back, all that they show now."""
    if any(now.get(label, 0.0) < value for label, value in before.items()):
        return dict(now)
    return {label: value - before.get(label, 0.0) for label, value in now.items()}


def gained(grown: Mapping[SeriesSource, Mapping[str, float]]) -> dict[str, Traffic]:
    """Increases of sources as traffic by adapter, replicas together; "" is what belongs to no adapter."""
    traffic: dict[str, Traffic] = {}
    for source, series in grown.items():
        if not any(series.values()):
            continue
        if source.metric in HISTOGRAMS:
            part = Traffic(histograms={HISTOGRAMS[source.metric]: _histogram(series)})
        else:
            part = Traffic({COUNTERS[source.metric]: sum(series.values())})
            if source.metric == "pedro_requests_total":
                part.counts["failed"] = sum(series.get(reason, 0.0) for reason in FAILED)
        traffic[source.adapter] = traffic.get(source.adapter, Traffic()) + part
    return traffic


def _histogram(series: Mapping[str, float]) -> Histogram:
    bounds = sorted((float(label), count) for label, count in series.items())
    return Histogram(tuple(bound for bound, _ in bounds), tuple(count for _, count in bounds))


def _label(labels: Mapping[str, str]) -> str:
    return next((value for name, value in labels.items() if name not in ("replica", "gateway", "adapter")), "")


def _summed(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}
