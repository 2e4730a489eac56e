"""What a method is: options in, a model with an adapter out, and what it says it can do.

All methods take the same forward call, `prompt_lens` and `prompt_mask` included; those that do not condition on the
prompt ignore the two.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from pedro.errors import ConfigError
from pedro.methods.architectures import config_of
from pedro.methods.config_check import changed_backbone, wrong_invocation
from pedro.methods.patterns import check_patterns
from pedro.methods.prompt import PROMPT_ARGUMENTS

if TYPE_CHECKING:
    from pedro.methods.reader import Reader
    from pedro.methods.training_hook import TrainingHook
    from pedro.model_protocols import ModelConfig

Parameters = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a backbone, and what can be done with the result.

    `build(model_config, **options)` makes the PEFT config, or None to train the backbone itself; its keyword-only
    arguments are the method's options and their defaults. A capability that depends on the options is None.
    """

    name: str
    title: str
    source: str
    equation: str
    build: Callable[..., PeftConfig | None]
    mergeable: bool | None  # can be folded into the backbone's weights
    identity_at_init: bool | None  # a fresh adapter changes nothing
    readers: tuple[
        Reader, ...
    ] = ()  # make what the engine runs of its adapters, by their `peft_type`; none: not served
    conditions_on_prompt: bool = False
    reads_weights: bool = False  # multiplies the backbone's weights at every step, so they must be whole on each worker
    theta: tuple[str, ...] = ()  # parts of the names of what Θ steps train (eq. 8); the rest is Ω
    b_up: tuple[str, ...] = ()  # parts of the names of b_up of eq. 6, which may learn at a rate of its own
    paper: dict[str, Any] = field(default_factory=dict)  # options of the PEDRO paper's table 1, where not the defaults
    make_hook: Callable[[Any, int, dict[str, Any]], TrainingHook | None] | None = None  # model, steps, options

    @property
    def mixed_batches(self) -> bool | None:
        """Whether its adapters are served in batches that mix adapters; None where that depends on the options."""
        return bool(self.readers)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the method takes, with their defaults."""
        named = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def known(self, options: dict[str, Any]) -> Sequence[str]:
        """Names of the options that are understood, given these."""
        return list(self.options)

    def config(self, model_config: ModelConfig, options: dict[str, Any] | None = None) -> PeftConfig | None:
        """The PEFT config for a backbone's config. Raises ConfigError for an unknown option or a wrong value."""
        options = dict(options or {})
        known = self.known(options)
        if unknown := [name for name in options if name not in known]:
            raise ConfigError("; ".join(self._explain(name, known) for name in unknown), param=f"method.{unknown[0]}")
        with _named():
            config = self.build(model_config, **options)
            wrong = ""
            if config is not None:
                wrong = changed_backbone(config) or wrong_invocation(config, model_config.vocab_size)
            if wrong:
                raise ConfigError(wrong, param=wrong.partition(":")[0])
        if config is not None:
            config.task_type = TaskType.CAUSAL_LM
        return config

    def apply(self, model: nn.Module, options: dict[str, Any] | None = None) -> nn.Module:
        """A fresh adapter named "default" on `model`, in float32 whatever the backbone's dtype; for `full`, the model.

        Raises ConfigError for options that do not fit, BackboneError for an unsupported architecture.
        """
        config = self.config(config_of(model), options)
        if config is None:
            return self.wrap(model.requires_grad_(True))
        with _named():
            attached = self._attach(model, config)
        return self.wrap(attached)

    def _attach(self, model: nn.Module, config: PeftConfig) -> nn.Module:
        check_patterns(config, (name for name, _ in model.named_modules()))
        attached = get_peft_model(model, config)
        for name, parameter in attached.named_parameters():
            if ".ranknum." in name:  # AdaLoRA's counts of ranks: on a bf16 backbone PEFT casts them to weights
                parameter.requires_grad_(False)
        return attached

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make `model` accept and ignore `prompt_lens` and `prompt_mask`, where the method has no use for them."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if not self.conditions_on_prompt and _ignore_prompt not in inner._forward_pre_hooks.values():
            inner.register_forward_pre_hook(_ignore_prompt, with_kwargs=True)
        return model

    def training_hook(self, model: nn.Module, options: dict[str, Any], steps: int) -> TrainingHook | None:
        """What goes along with a training of `steps` steps, for a method that changes its shape while it trains.

        Raises ConfigError where that is too few steps for its work.
        """
        if self.make_hook is None:
            return None
        return self.make_hook(model, steps, {**self.options, **options})

    def parameter_groups(self, model: nn.Module) -> tuple[Parameters, Parameters]:
        """The trainable parameters as (omega, theta) of eq. 8: for PEDRO theta is all a and b of eq. 7."""
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        theta = [(name, p) for name, p in trainable if self._is_theta(name)]
        return [(name, p) for name, p in trainable if not self._is_theta(name)], theta

    def is_b_up(self, name: str) -> bool:
        """Whether the parameter called `name` is b_up of eq. 6."""
        return any(part in f"{name}." for part in self.b_up)

    def _is_theta(self, name: str) -> bool:
        return any(part in f"{name}." for part in self.theta)

    def _explain(self, option: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(option, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        valid = f"{self.name} takes {', '.join(known)}" if known else f"{self.name} takes no options"
        return f"method.{option}: unknown option; {hint}{valid}"


@contextmanager
def _named() -> Iterator[None]:
    """Mistakes in options are told as those of `method.` in a spec."""
    try:
        yield
    except ConfigError as error:
        if error.param is None or error.param.startswith("method."):
            raise
        raise ConfigError(f"method.{error.message}", param=f"method.{error.param}") from error


def stop_ignoring_prompt(model: nn.Module) -> None:
    """Take off what `wrap` put on: the next adapter may have use for `prompt_lens` and `prompt_mask`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _ignore_prompt:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def _ignore_prompt(
    _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name not in PROMPT_ARGUMENTS}
