"""Adapter versions and runs in MLflow. No other package calls its client, writes its filters or spells its tags."""

from pedro.registry.models import DAMAGED, MANIFEST, RegisteredAdapter, Registry
from pedro.registry.promotion import CANDIDATE, CHAMPION, PREVIOUS
from pedro.registry.versions import Version, utc

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "DAMAGED",
    "MANIFEST",
    "PREVIOUS",
    "RegisteredAdapter",
    "Registry",
    "Version",
    "utc",
]
