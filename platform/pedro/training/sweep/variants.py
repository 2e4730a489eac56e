"""A trial's job: the base spec with the trial's parameters, and validation of a whole space.

Starts nothing. The methods' checks need torch and peft, which are only imported for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import load_config, named_directory, resolve_backbone
from pedro.errors import BackboneError, ConfigError
from pedro.spec_reader import validate_spec
from pedro.training.spec import FineTuneSpec

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig
    from pedro.search_space import Parameters
    from pedro.training.sweep.spec import SweepSpec


def variant(spec: SweepSpec, parameters: Parameters) -> FineTuneSpec:
    """The job of a trial. Raises ConfigError for an unknown key or an invalid value."""
    fields = spec.to_dict()["base"]
    for key, value in parameters.items():
        _put(fields, key, value)
    return validate_spec(fields, FineTuneSpec, source="space")


def planned_trials(spec: SweepSpec) -> list[Parameters] | None:
    """The trials' parameters in order; None if each trial depends on earlier ones."""
    return spec.search.planned(spec.space)


def planned_count(spec: SweepSpec) -> int:
    """The maximum number of trials."""
    planned = planned_trials(spec)
    return spec.search.draws(spec.space) if planned is None else len(planned)


def check_sweep(spec: SweepSpec, *, options: bool = True) -> None:
    """Raise one ConfigError with all mistakes in the space, before anything starts, including the methods' options,
    which are only checked in processes that may import torch."""
    mistakes: dict[str, str] = {}
    for label, parameters in probes(spec):
        try:
            job = variant(spec, parameters)
        except ConfigError as error:
            head, *lines = error.message.split("\n  ")
            for line in lines or [head]:
                mistakes.setdefault(line, label)
            continue
        for line in _method_mistakes(job) if options else ():
            mistakes.setdefault(line, label)
    if mistakes:
        lines = [f"{label}: {line}" for line, label in mistakes.items()]
        head = f"sweep {spec.name}: {len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise ConfigError("\n  ".join([head, *lines]), param=next(iter(mistakes.values())))


def probes(spec: SweepSpec) -> Iterator[tuple[str, Parameters]]:
    """The base, every listed value and both ends of every range separately, then the planned combinations."""
    yield "base", {}
    for key, dimension in spec.space.items():
        for value in dimension.values:
            yield f"space.{key}", {key: value}
    for parameters in planned_trials(spec) or []:
        yield f"space ({', '.join(f'{key}={value}' for key, value in parameters.items())})", parameters


def _put(fields: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{key}: {parent!r} is not a section, so it has no keys", param=key)
    fields[leaf] = value


def _method_mistakes(job: FineTuneSpec) -> list[str]:
    """Errors of the method's options: of their names, and of their values if the backbone is available."""
    from pedro.methods.registry import get_method

    options = job.method.options
    try:
        method = get_method(job.method.name)
        known = method.known(options)
        unknown = [name for name in options if name not in known]
        config = None if unknown else _model_config(job.backbone)
        if config is not None or unknown:
            method.config(config, options)  # type: ignore[arg-type]  # None: unknown options are found first
    except ConfigError as error:
        return error.message.split("; method.")
    except BackboneError as error:
        return [error.message]
    return []


@cache
def _model_config(backbone: str) -> ModelConfig | None:
    """The config of a backbone on this host; None for a hub id, which the job checks itself."""
    directory = named_directory(backbone) or Path(backbone).expanduser()
    return load_config(resolve_backbone(backbone)) if (directory / "config.json").is_file() else None
