"""Whether the tensors of an adapter that PEFT wrote are of the modules that its config names.

PEFT loads no others, so an adapter that holds some would answer otherwise here than there. Reads no tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from pedro.errors import AdapterError
from pedro.methods.reader import ROOT

if TYPE_CHECKING:
    from peft import PeftConfig

PARTS = (".lora_", ".ia3_l", ".miss_block")  # what follows a module's path in the names of its tensors


def check_named(config: PeftConfig, names: Collection[str]) -> None:
    """Raise AdapterError for a tensor of a module that `target_modules` and its like leave out."""
    targets = getattr(config, "target_modules", None)
    if not targets:
        raise AdapterError(
            "adapter_config.json: target_modules: names none, so which modules the weights are of is not known; "
            "save the adapter again with PEFT",
            param="target_modules",
        )
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    for name in sorted(names):
        modules = {name.removeprefix(ROOT).partition(part)[0] for part in PARTS if part in name}
        if any(not check_target_module_exists(config, module) for module in modules):
            raise AdapterError(
                f"adapter weights: {name} is of a module that adapter_config.json does not name "
                f"(target_modules {str(targets)[:100]}); PEFT would not load it, save the adapter again",
                param="target_modules",
            )
