"""Adapter versions and runs in MLflow, their aliases in the store. No other package calls MLflow's client, writes its
filters or spells its tags."""

from pedro.registry.models import DAMAGED, MANIFEST, Registry
from pedro.store import CANDIDATE, CHAMPION, PREVIOUS, RegisteredAdapter, Version, utc

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
