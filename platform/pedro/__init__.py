"""pedro: multi-tenant fine-tuning and serving of prompt-dependent adapters.

Importing the package costs nothing; the names below load on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.methods.pedro import PedroConfig, PedroModel

__version__ = "0.1.0"
__all__ = ["PedroConfig", "PedroModel", "__version__"]


def __getattr__(name: str) -> object:
    if name in ("PedroConfig", "PedroModel"):
        import pedro.methods.pedro as tuner

        return getattr(tuner, name)
    raise AttributeError(f"module 'pedro' has no attribute {name!r}")
