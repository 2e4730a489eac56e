"""Makes this package's methods methods that PEFT knows by name. Knows nothing of the methods themselves.

PEFT's list of methods is a closed enum, and its `register_peft_method` and transformers' `load_adapter` want a real
member, not a string; so one member is added for each method first.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


def add_members(*names: str) -> None:
    """Add a `PeftType` of each name, once."""
    for name in names:
        if name in PeftType.__members__:
            continue
        member = str.__new__(PeftType, name)
        vars(member).update(_name_=name, _value_=name, _sort_order_=len(PeftType.__members__))
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)


def register(name: str, config_cls: type, model_cls: type) -> None:
    """Tell PEFT which config and tuner `peft_type: name` means, once."""
    if PeftType(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
