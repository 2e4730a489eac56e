"""What is trained: PEDRO as a PEFT tuner, the methods it is compared with, one registry, and adapter directories.

Importing this package registers its tuners with PEFT, after which get_peft_model, PeftModel.from_pretrained,
AutoPeftModel and transformers' load_adapter know their `peft_type`.
"""

from pedro.methods import peft_registration

peft_registration.add_members("PEDRO", "CONSTANT")

from pedro.methods.constants import ConstantConfig, ConstantModel  # noqa: E402 - needs the members
from pedro.methods.pedro import PedroConfig, PedroModel  # noqa: E402

peft_registration.register("PEDRO", PedroConfig, PedroModel)
peft_registration.register("CONSTANT", ConstantConfig, ConstantModel)

from pedro.methods.registry import METHODS, Method, count_parameters, get_method  # noqa: E402

__all__ = ["METHODS", "ConstantConfig", "Method", "PedroConfig", "PedroModel", "count_parameters", "get_method"]
