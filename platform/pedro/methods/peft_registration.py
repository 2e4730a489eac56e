"""Registers this package's methods with PEFT, by name.

PEFT's list of methods is a closed enum, and its `register_peft_method` and transformers' `load_adapter` want a real
member, not a string; so one member is added for each method first.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

OWN_NAMES: dict[str, str] = {}  # types that are trained by the name of a method of ours only


def register(config_cls: Any, model_cls: type[Any], method: str | None = None) -> None:
    """Tell PEFT, once, which config and tuner `peft_type: <config_cls.kind>` means.

    With `method`, the type is trained by that name only, not as `method: {peft_type: …}`.
    """
    kind = config_cls.kind
    if method is not None:
        OWN_NAMES[kind] = method
    if kind not in PeftType.__members__:
        _add_member(kind)
    if PeftType(kind) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=kind.lower(), config_cls=config_cls, model_cls=model_cls)


def _add_member(name: str) -> None:
    member = str.__new__(PeftType, name)
    vars(member).update(_name_=name, _value_=name, _sort_order_=len(PeftType.__members__))
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
