"""Makes PEDRO a method that PEFT knows by name. Knows nothing of the method itself.

PEFT's list of methods is a closed enum, and its `register_peft_method` and transformers' `load_adapter` want a real
member, not a string; so one member is added first.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "PEDRO"


def add_member() -> None:
    """Add `PeftType.PEDRO`, once."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    vars(member).update(_name_=NAME, _value_=NAME, _sort_order_=len(PeftType.__members__))
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register(config_cls: type, model_cls: type) -> None:
    """Tell PEFT which config and tuner `peft_type: "PEDRO"` means, once."""
    if PeftType(NAME) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
