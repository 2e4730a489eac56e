"""A replica's Prometheus metrics, per adapter and in total.

Label sets are bounded: the adapters with the most traffic have series of their own, the rest share "other".
"""

from __future__ import annotations

import threading
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pedro.refs import ModelRef

if TYPE_CHECKING:  # the ingress, which only merges texts, does not import the engine
    from pedro.engine.sequence import Output

OTHER = "other"
REASONS = ("stop", "length", "cancelled", "error")
MAX_LABELS = 100
MAX_COUNTED = 4096  # adapters whose traffic is counted without a series of their own
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


class Labels:
    """Gives at most `limit` names their own label; a name with twice the traffic of the lowest replaces it."""

    def __init__(self, limit: int, dropped: Callable[[str], None]) -> None:
        self._limit = limit
        self._dropped = dropped
        self._granted: dict[str, int] = {}
        self._counted: dict[str, int] = {}

    def of(self, name: str) -> str:
        """The current label of `name`."""
        return name if name in self._granted else OTHER

    def __call__(self, name: str) -> str:
        """Count one use of `name`; returns its current label."""
        if name in self._granted:
            self._granted[name] += 1
            return name
        count = self._counted.pop(name, 0) + 1
        if len(self._granted) >= self._limit:
            least = min(self._granted, key=self._granted.__getitem__)
            if count < 2 * self._granted[least]:
                if len(self._counted) >= MAX_COUNTED:
                    del self._counted[next(iter(self._counted))]  # the least recently seen
                self._counted[name] = count
                return OTHER
            self._counted[least] = self._granted.pop(least)
            self._dropped(least)
        self._granted[name] = count
        return name


class ReplicaMetrics:
    """The metrics of one replica. Thread-safe.

    `stats` gives `Engine.stats()`; `calls` how many calls are unfinished; `backbone` names calls without an adapter.
    """

    def __init__(self, replica: str, backbone: str, stats: Callable[[], dict[str, Any]]) -> None:
        disable_created_metrics()
        self._replica = replica
        self._backbone = backbone
        self._stats = stats
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()

        def made(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"pedro_{name}", text, ("replica", "adapter", *labels), registry=self._registry, **options)

        self._requests = made(Counter, "requests", "Finished answers (choices), by finish reason.", "finish_reason")
        self._tokens_in = made(Counter, "prompt_tokens", "Prompt tokens of finished answers.")
        self._queries = made(Counter, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = made(Counter, "prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._tokens_out = made(Counter, "completion_tokens", "Generated tokens of finished answers.")
        self._queued = made(Histogram, "queue_seconds", "From arrival to the start of prefill.", buckets=SECONDS)
        self._first = made(
            Histogram, "time_to_first_token_seconds", "From arrival at the engine to the first token.", buckets=SECONDS
        )
        self._each = made(
            Histogram,
            "time_per_token_seconds",
            "An answer's mean time per token after its first.",
            buckets=TOKEN_SECONDS,
        )
        self._registry.register(_Gauges(self))
        self._label = Labels(MAX_LABELS, self._drop)

    def finished(self, ref: ModelRef | None, output: Output) -> None:
        """Count a finished answer. `ref` is its adapter version; `output` has what is not counted yet."""
        with self._lock:
            adapter = self._label(self._backbone if ref is None else ref.name)
            at = (self._replica, adapter)
            self._requests.labels(*at, output.finish_reason).inc()
            self._tokens_out.labels(*at).inc(output.completion_tokens)
            self._tokens_in.labels(*at).inc(output.prompt_tokens)
            self._queries.labels(*at).inc(output.prompt_tokens)
            self._hits.labels(*at).inc(output.cached_tokens)
            timing = output.timing
            if timing is None or output.finish_reason not in ("stop", "length"):
                return
            self._queued.labels(*at).observe(timing.queue_s)
            self._first.labels(*at).observe(timing.first_token_s)
            if output.completion_tokens > 1:
                each_s = (timing.total_s - timing.first_token_s) / (output.completion_tokens - 1)
                self._each.labels(*at).observe(each_s)

    def text(self) -> str:
        """The Prometheus text of this replica. Takes no lock: the engine's thread must not wait for a scrape."""
        return generate_latest(self._registry).decode()

    def gauges(self) -> Iterator[Metric]:
        """The engine's current statistics."""
        stats = self._stats()
        adapters, prefixes, speculation = stats["adapters"], stats["prefixes"], stats["speculation"]
        blocks, used = stats["kv_blocks"], stats["kv_blocks_used"]
        for name, text, value in (
            ("running", "Answers being made.", stats["running"]),
            ("waiting", "Answers waiting for a slot, KV cache blocks or an adapter.", stats["waiting"]),
            ("slots", "Answers that can run concurrently.", stats["slots"]),
            ("slots_used", "Slots in use; each beam uses one.", stats["slots"] - stats["slots_free"]),
            ("kv_blocks", "Blocks in the KV cache's budget.", blocks),
            ("kv_blocks_used", "Blocks used by running answers.", used),
            ("kv_cache_usage_ratio", "Share of the KV cache's blocks in use.", used / blocks),
            ("kv_cache_bytes", "Memory budget of the KV cache.", stats["kv_cache_bytes"]),
            ("adapters_resident", "Adapters in memory.", adapters["resident"]),
            ("adapters_pinned", "Adapters pinned by an operator.", adapters["pinned"]),
            ("adapter_bytes", "Memory of the resident adapters.", adapters["bytes"]),
            ("adapter_budget_bytes", "Memory budget of adapters.", adapters["budget_bytes"]),
            ("prefix_cache_budget_bytes", "Memory budget of the prefix cache.", prefixes["budget_bytes"]),
        ):
            gauge = GaugeMetricFamily(f"pedro_{name}", text, labels=("replica",))
            gauge.add_metric((self._replica,), value)
            yield gauge
        for name, text, value in (
            ("adapter_loads", "Adapters loaded.", adapters["loads"]),
            ("adapter_load_failures", "Loads that failed.", adapters["failed_loads"]),
            ("adapter_evictions", "Adapters evicted to free memory.", adapters["evictions"]),
            ("prefix_cache_evictions", "Blocks evicted from the prefix cache.", prefixes["evictions"]),
            (
                "preemptions",
                "Answers preempted for another tenant, or for lack of KV cache blocks.",
                stats.get("preempted", 0),
            ),
            ("steps", "Steps of the engine.", stats["steps"]),
            ("spec_decode_num_drafts", "Drafts verified.", speculation["drafts"]),
            ("spec_decode_num_draft_tokens", "Their tokens.", speculation["draft_tokens"]),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted into answers.", speculation["accepted_tokens"]),
        ):
            counter = CounterMetricFamily(f"pedro_{name}", text, labels=("replica",))
            counter.add_metric((self._replica,), value)
            yield counter
        kept: Sums[str] = Sums()
        for ref, nbytes in prefixes["bytes_by_adapter"].items():
            kept[self._label.of(self._backbone if ref is None else ModelRef.parse(ref).name)] += nbytes
        gauge = GaugeMetricFamily(
            "pedro_prefix_cache_bytes", "Memory of cached prompts.", labels=("replica", "adapter")
        )
        for adapter, nbytes in kept.items():
            gauge.add_metric((self._replica, adapter), nbytes)
        yield gauge

    def _drop(self, adapter: str) -> None:
        """Remove an adapter's series, some of which may not exist."""
        at = (self._replica, adapter)
        counters = (self._tokens_in, self._queries, self._hits, self._tokens_out)
        for metric in (*counters, self._queued, self._first, self._each):
            with suppress(KeyError):
                metric.remove(*at)
        for reason in REASONS:
            with suppress(KeyError):
                self._requests.remove(*at, reason)


class _Gauges:
    """The collector, which reads the statistics at each scrape."""

    def __init__(self, of: ReplicaMetrics) -> None:
        self._of = of

    def collect(self) -> Iterator[Metric]:
        return self._of.gauges()

    def describe(self) -> list[Metric]:
        return []


def merged(texts: Iterable[str]) -> str:
    """Merges Prometheus texts with different series: each family gets one heading, as the format requires."""
    families: dict[str, list[str]] = {}
    heading = ""
    for text in texts:
        for line in text.splitlines():
            if line.startswith("# HELP"):
                heading = line
            elif line.startswith("# TYPE"):
                heading = f"{heading}\n{line}"
                families.setdefault(heading, [])
            elif line:
                families[heading].append(line)
    return "".join(f"{heading}\n" + "".join(f"{line}\n" for line in lines) for heading, lines in families.items())
