"""A tuner whose layers need to know which tokens are prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pedro.methods.blocks import BlockTuner
from pedro.methods.prompt import PromptPass

if TYPE_CHECKING:
    from torch import nn


class ConditionedTuner(BlockTuner):
    """A BlockTuner with one PromptPass, which follows every forward pass of the model and is shared by all layers."""

    title: ClassVar[str]  # the method's, for messages

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        present = next(self.layers(), None)
        if present is not None:
            self._prompts = present.prompts
        else:
            self._prompts = PromptPass(self.title)
            self._prompts.attach(model)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        self._prompts.detach(model)
        return model
