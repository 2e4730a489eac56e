"""Prometheus's text as OpenMetrics (https://prometheus.io/docs/specs/om/open_metrics_spec/), which has exemplars.

Replicas report their metrics as plain text, without exemplars; it is converted here. Only the gateway's own metrics,
which come from its registry, have exemplars.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OPEN_METRICS = CONTENT_TYPE_LATEST
MEDIA_TYPE = OPEN_METRICS.partition(";")[0]
END = "# EOF\n"
COUNTER = re.compile(r"^# (HELP|TYPE) (\w+)_total\b", re.MULTILINE)


def of_registry(registry: CollectorRegistry) -> str:
    """A registry's metrics, without the end marker."""
    return str(generate_latest(registry).decode().removesuffix(END))


def of_text(text: str) -> str:
    """Converts plain text: in OpenMetrics, headings of counters lack their samples' suffix. Without the end marker."""
    return COUNTER.sub(r"# \1 \2", text)
