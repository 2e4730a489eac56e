"""PEDRO (arXiv 2409.17834) as a PEFT tuner."""

from pedro.methods.pedro.config import PedroConfig
from pedro.methods.pedro.layer import PedroLayer
from pedro.methods.pedro.model import PedroModel
from pedro.methods.pedro.rational import fit_gelu

__all__ = [
    "PedroConfig",
    "PedroLayer",
    "PedroModel",
    "fit_gelu",
]
