"""What is trained: PEDRO as a PEFT tuner, the methods it is compared with, one registry, and adapter directories.

Importing this package registers PEDRO with PEFT, after which get_peft_model, PeftModel.from_pretrained, AutoPeftModel
and transformers' load_adapter know `peft_type: "PEDRO"`.
"""

from pedro.methods import peft_registration

peft_registration.add_member()

from pedro.methods.pedro import PedroConfig, PedroModel  # noqa: E402 - needs the member

peft_registration.register(PedroConfig, PedroModel)

from pedro.methods.registry import METHODS, Method, count_parameters, get_method  # noqa: E402

__all__ = ["METHODS", "Method", "PedroConfig", "PedroModel", "count_parameters", "get_method"]
