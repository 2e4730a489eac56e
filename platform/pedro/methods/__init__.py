"""What is trained: PEDRO as a PEFT tuner, the methods it is compared with, one registry, and adapter directories.

Importing this package registers its tuners with PEFT, after which get_peft_model, PeftModel.from_pretrained,
AutoPeftModel and transformers' load_adapter know their `peft_type`.
"""

from pedro.methods import peft_registration

peft_registration.add_members("PEDRO", "CONSTANT", "BOTTLENECK", "LATE_PROMPT", "SPARSE_SEARCH")

from pedro.methods.bottleneck import BottleneckConfig, BottleneckModel  # noqa: E402 - needs the members
from pedro.methods.constants import ConstantConfig, ConstantModel  # noqa: E402
from pedro.methods.late_prompt import LatePromptConfig, LatePromptModel  # noqa: E402
from pedro.methods.pedro import PedroConfig, PedroModel  # noqa: E402
from pedro.methods.sparse_search import SparseSearchConfig, SparseSearchModel  # noqa: E402

peft_registration.register("PEDRO", PedroConfig, PedroModel)
peft_registration.register("CONSTANT", ConstantConfig, ConstantModel)
peft_registration.register("BOTTLENECK", BottleneckConfig, BottleneckModel)
peft_registration.register("LATE_PROMPT", LatePromptConfig, LatePromptModel)
peft_registration.register("SPARSE_SEARCH", SparseSearchConfig, SparseSearchModel)

from pedro.methods.registry import METHODS, Method, count_parameters, get_method  # noqa: E402

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
