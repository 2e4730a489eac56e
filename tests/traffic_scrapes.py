"""Replicas whose figures are scraped: real metrics over made-up counts. Pages are tested elsewhere."""

from __future__ import annotations

import json
import math
from typing import Any

from pedro.engine.sequence import Output, Timing
from pedro.refs import ModelRef
from pedro.serving.metrics import ReplicaMetrics, merged
from pedro.traffic.history import Interval, TrafficHistory
from pedro.traffic.scrape import parse_metrics

INF = math.inf
STATS: dict[str, Any] = {
    "running": 3, "waiting": 2, "slots": 8, "slots_free": 2, "kv_cache_bytes": 1024, "steps": 7,
    "kv_blocks": 8, "kv_blocks_used": 3,
    "speculation": {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0},
    "prefixes": {"budget_bytes": 1000, "evictions": 0, "bytes_by_adapter": {}},
    "adapters": {
        "resident": 4, "pinned": 1, "bytes": 99, "budget_bytes": 100, "loads": 6, "failed_loads": 0, "evictions": 2,
    },
}  # fmt: skip


def replica(name: str = "r1", **stats: Any) -> ReplicaMetrics:
    adapters = {**STATS["adapters"], **stats.pop("adapters", {})}
    return ReplicaMetrics(name, "stories", lambda: {**STATS, **stats, "adapters": adapters})


def end(
    metrics: ReplicaMetrics,
    adapter: str | None = "acme.faq",
    reason: str = "stop",
    tokens: int = 5,
    first_s: float = 0.2,
    total_s: float = 0.6,
) -> None:
    timing = Timing(0.01, first_s, total_s)
    ref = None if adapter is None else ModelRef.parse(f"{adapter}:1#sha256:1")
    metrics.finished(
        ref, Output("r", 0, finish_reason=reason, prompt_tokens=10, completion_tokens=tokens, timing=timing)
    )


def add(history: TrafficHistory, at: float, *replicas: ReplicaMetrics) -> None:
    history.add(at, parse_metrics(merged(one.text() for one in replicas)))


def window(history: TrafficHistory, now: float = 200.0, seconds: float = 3600.0) -> list[Interval]:
    """The intervals, read back as whoever asks reads them."""
    told = json.loads(history.window(now, seconds).to_json())
    return [Interval.from_dict(each) for each in told["data"]]
