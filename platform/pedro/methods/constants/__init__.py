"""Constant vectors as a PEFT tuner: RED, BitFit and (IA)³ with a projection are settings of it."""

from pedro.methods.constants.config import ConstantConfig, constant_vectors
from pedro.methods.constants.layer import ConstantLayer
from pedro.methods.constants.model import ConstantModel

__all__ = ["ConstantConfig", "ConstantLayer", "ConstantModel", "constant_vectors"]
