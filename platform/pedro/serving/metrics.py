"""A replica's figures for Prometheus: for each adapter and in total.

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

if TYPE_CHECKING:  # the ingress, which only joins texts, does without an engine
    from pedro.engine.sequence import Output

OTHER = "other"
REASONS = ("stop", "length", "cancelled", "error")
MAX_LABELS = 100
MAX_COUNTED = 4096  # adapters whose traffic is counted though they have no series
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


class Labels:
    """Grants at most `limit` names a label of their own; a name with twice the traffic of the least takes its place."""

    def __init__(self, limit: int, dropped: Callable[[str], None]) -> None:
        self._limit = limit
        self._dropped = dropped
        self._granted: dict[str, int] = {}
        self._counted: dict[str, int] = {}

    def of(self, name: str) -> str:
        """The label that `name` has now."""
        return name if name in self._granted else OTHER

    def __call__(self, name: str) -> str:
        """Count one use of `name`; the label it has now."""
        if name in self._granted:
            self._granted[name] += 1
            return name
        count = self._counted.pop(name, 0) + 1
        if len(self._granted) >= self._limit:
            least = min(self._granted, key=self._granted.__getitem__)
            if count < 2 * self._granted[least]:
                if len(self._counted) >= MAX_COUNTED:
                    del self._counted[next(iter(self._counted))]  # the one not seen for longest
                self._counted[name] = count
                return OTHER
            self._counted[least] = self._granted.pop(least)
            self._dropped(least)
        self._granted[name] = count
        return name


class ReplicaMetrics:
    """The figures of one replica. Thread-safe.

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

        self._requests = made(Counter, "requests", "Answers that ended, by how: one a choice.", "finish_reason")
        self._tokens_in = made(Counter, "prompt_tokens", "Prompt tokens read for answers that ended.")
        self._queries = made(Counter, "prefix_cache_queries", "Prompt tokens that were looked for among those kept.")
        self._hits = made(Counter, "prefix_cache_hits", "Prompt tokens that were found there, and not read again.")
        self._tokens_out = made(Counter, "completion_tokens", "Tokens made for answers that ended.")
        self._queued = made(Histogram, "queue_seconds", "From arrival until prefill began.", buckets=SECONDS)
        self._first = made(
            Histogram, "time_to_first_token_seconds", "From arrival at the engine to the first token.", buckets=SECONDS
        )
        self._each = made(
            Histogram, "time_per_token_seconds", "Mean of an answer's tokens after its first.", buckets=TOKEN_SECONDS
        )
        self._registry.register(_Gauges(self))
        self._label = Labels(MAX_LABELS, self._drop)

    def finished(self, ref: ModelRef | None, output: Output) -> None:
        """Count one answer that ended. `ref` is its adapter version; `output` tells what is not counted yet."""
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
        """The Prometheus text of this replica. Takes no lock: the engine's thread must not wait for a reader."""
        return generate_latest(self._registry).decode()

    def gauges(self) -> Iterator[Metric]:
        """What the engine says of itself, as of now."""
        stats = self._stats()
        adapters, prefixes, speculation = stats["adapters"], stats["prefixes"], stats["speculation"]
        blocks, used = stats["kv_blocks"], stats["kv_blocks_used"]
        for name, text, value in (
            ("running", "Answers being made.", stats["running"]),
            ("waiting", "Answers that wait for a slot, for room in the KV cache or an adapter.", stats["waiting"]),
            ("slots", "Answers that can be made at once.", stats["slots"]),
            ("slots_used", "Of these slots, those taken; each beam takes one.", stats["slots"] - stats["slots_free"]),
            ("kv_blocks", "Blocks that the KV cache may have.", blocks),
            ("kv_blocks_used", "Of these, those of answers being made.", used),
            ("kv_cache_usage_ratio", "Share of the KV cache's blocks in use.", used / blocks),
            ("kv_cache_bytes", "Memory that the KV cache may take.", stats["kv_cache_bytes"]),
            ("adapters_resident", "Adapters in memory.", adapters["resident"]),
            ("adapters_pinned", "Adapters that an operator pinned.", adapters["pinned"]),
            ("adapter_bytes", "Memory of the resident adapters.", adapters["bytes"]),
            ("adapter_budget_bytes", "Memory that adapters may take.", adapters["budget_bytes"]),
            ("prefix_cache_budget_bytes", "Memory that kept prompts may take.", prefixes["budget_bytes"]),
        ):
            gauge = GaugeMetricFamily(f"pedro_{name}", text, labels=("replica",))
            gauge.add_metric((self._replica,), value)
            yield gauge
        for name, text, value in (
            ("adapter_loads", "Adapters that were loaded.", adapters["loads"]),
            ("adapter_load_failures", "Loads that failed.", adapters["failed_loads"]),
            ("adapter_evictions", "Adapters evicted for want of room.", adapters["evictions"]),
            ("prefix_cache_evictions", "Blocks of kept prompts that gave way to others.", prefixes["evictions"]),
            (
                "preemptions",
                "Answers that gave their slot to another tenant's, or had no room to grow.",
                stats.get("preempted", 0),
            ),
            ("steps", "Steps of the engine.", stats["steps"]),
            ("spec_decode_num_drafts", "Guesses of next tokens.", speculation["drafts"]),
            ("spec_decode_num_draft_tokens", "Their tokens.", speculation["draft_tokens"]),
            ("spec_decode_num_accepted_tokens", "Of these, those that answers have.", speculation["accepted_tokens"]),
        ):
            counter = CounterMetricFamily(f"pedro_{name}", text, labels=("replica",))
            counter.add_metric((self._replica,), value)
            yield counter
        kept: Sums[str] = Sums()
        for ref, nbytes in prefixes["bytes_by_adapter"].items():
            kept[self._label.of(self._backbone if ref is None else ModelRef.parse(ref).name)] += nbytes
        gauge = GaugeMetricFamily("pedro_prefix_cache_bytes", "Memory of kept prompts.", labels=("replica", "adapter"))
        for adapter, nbytes in kept.items():
            gauge.add_metric((self._replica, adapter), nbytes)
        yield gauge

    def _drop(self, adapter: str) -> None:
        """Take back an adapter's series; some it may never have had."""
        at = (self._replica, adapter)
        counters = (self._tokens_in, self._queries, self._hits, self._tokens_out)
        for metric in (*counters, self._queued, self._first, self._each):
            with suppress(KeyError):
                metric.remove(*at)
        for reason in REASONS:
            with suppress(KeyError):
                self._requests.remove(*at, reason)


class _Gauges:
    """The collector that asks at each reading."""

    def __init__(self, of: ReplicaMetrics) -> None:
        self._of = of

    def collect(self) -> Iterator[Metric]:
        return self._of.gauges()

    def describe(self) -> list[Metric]:
        return []


def merged(texts: Iterable[str]) -> str:
    """One Prometheus text of several whose series differ: each family's heading stands once, as the format asks."""
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
