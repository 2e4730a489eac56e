"""Prometheus's text as OpenMetrics (https://prometheus.io/docs/specs/om/open_metrics_spec/), which has exemplars.

Replicas tell their figures as plain text, to which exemplars are nothing; so that is rewritten, and only the gateway's
own, of which it has the registry, carries them.
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
    """A registry's figures, without the end."""
    return str(generate_latest(registry).decode().removesuffix(END))


def of_text(text: str) -> str:
    """Plain text as OpenMetrics: a counter's heading lacks the suffix that its samples have. Without the end."""
    return COUNTER.sub(r"# \1 \2", text)
