"""What is trained: PEDRO as a PEFT tuner, the methods it is compared with, one registry, and adapter directories.

Importing this package registers its tuners with PEFT, after which get_peft_model, PeftModel.from_pretrained,
AutoPeftModel and transformers' load_adapter know their `peft_type`. A method's file holds its tensors and equation
alone: it imports nothing of training, and files are written by adapter_files.py.
"""

from pedro.methods.bottleneck import BottleneckConfig
from pedro.methods.constants import ConstantConfig
from pedro.methods.late_prompt import LatePromptConfig
from pedro.methods.method import Method
from pedro.methods.pedro import PedroConfig, PedroModel
from pedro.methods.registry import METHODS, count_parameters, get_method
from pedro.methods.sparse_search import SparseSearchConfig

__all__ = [
    "METHODS",
    "BottleneckConfig",
    "ConstantConfig",
    "LatePromptConfig",
    "Method",
    "PedroConfig",
    "PedroModel",
    "SparseSearchConfig",
    "count_parameters",
    "get_method",
]
