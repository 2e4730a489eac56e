"""The spec of a sweep: the YAML of `pedro sweep`, validated and immutable."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from pedro.backbone import locate_backbone
from pedro.config import check_name
from pedro.errors import ConfigError
from pedro.search_space import Dimension, SchedulerSpec, SearchSpec
from pedro.spec_reader import Frozen, load_spec
from pedro.training.spec import FineTuneSpec, check_backbones, check_data_files

FIXED = {
    "parent": "all trials start from the same parent",
    "tenant": "a sweep trains versions of one adapter",
    "adapter": "a sweep trains versions of one adapter",
    "data.train": "trials are compared on the same rows",
    "data.validation": "trials are compared on the same rows",
    "data.test": "trials are compared on the same rows",
    "data.fields": "trials are compared on the same rows",
    "objective": "trials are compared by one loss",
    "dpo": "losses with different β are not comparable",
    "resources.share": "each trial has its own workers",
    "gate": "trials are compared on the same rows, and the gate only judges the best",
}


class SweepSpec(Frozen):
    """One sweep: a fine-tuning job, and the keys of it that vary."""

    name: str
    """The sweep's name among those of its adapter."""
    base: FineTuneSpec
    """The job, as for `pedro submit`."""
    space: dict[str, Dimension] = Field(min_length=1)
    """Dotted keys of the job, each with its possible values."""
    search: SearchSpec = SearchSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    concurrency: int | None = Field(None, ge=1, le=4096)
    """Maximum number of concurrent trials; default: as many as fit on the cluster when the sweep starts, besides other
    waiting jobs (4 with PEDRO_LAUNCHER=kuberay, where each has its own pods). These resources are reserved until it
    ends."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        try:
            return check_name("name", value)
        except ConfigError as error:
            raise ValueError(error.message.partition(": ")[2]) from error

    @model_validator(mode="after")
    def _possible(self) -> SweepSpec:
        if self.base.resources.share:
            raise ValueError("base.resources.share: each trial has its own workers; leave it false")
        for key in self.space:
            for fixed, why in FIXED.items():
                if key == fixed or key.startswith(f"{fixed}."):
                    raise ValueError(f"space.{key}: cannot vary: {why}")
            if self.base.parent and key.partition(".")[0] == "method":
                raise ValueError(f"space.{key}: cannot vary: trials continue base.parent with its method")
        if "data.theta" in self.space and any(isinstance(v, str) for v in self.space["data.theta"].values):
            raise ValueError("space.data.theta: shares can vary, files cannot; set a file in base.data.theta")
        if self.base.data.validation == 0:
            raise ValueError("base.data.validation: trials are compared by their loss on it; set a share or a file")
        self.search.check(self.space)
        if self.scheduler.name == "asha" and not (self.scheduler.grace_steps or self.base.training.eval_every):
            raise ValueError("scheduler.grace_steps: required if base.training.eval_every is 0 (once per epoch)")
        return self

    @property
    def grace_steps(self) -> int:
        """Steps before the first rung."""
        return self.scheduler.grace_steps or self.base.training.eval_every

    def to_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON; `SweepSpec.model_validate` parses it."""
        fields = self.model_dump(mode="json")
        if "training.max_steps" in self.space and "epochs" not in self.base.training.model_fields_set:
            del fields["base"]["training"]["epochs"]  # the default would end trials before their max_steps
        return fields


def load_sweep_spec(path: str | Path, overrides: Iterable[str] = ()) -> SweepSpec:
    """Read a spec file; relative paths start from its folder. Raises one ConfigError that lists every mistake."""
    overrides = list(overrides)
    spec = load_spec(path, overrides, SweepSpec)
    base = Path(path).absolute().parent
    space = dict(spec.space)
    if (tried := space.get("backbone")) is not None and tried.listed:
        values = tuple(locate_backbone(str(value), base, Path.cwd()) for value in tried.values)
        space["backbone"] = tried.model_copy(update={"values": values})
    located = spec.base.located(base)
    check_data_files(located.data, base, overrides, "base.data")
    tried = space.get("backbone")
    check_backbones({"base.backbone": located.backbone}, base, overrides)
    for name in tried.values if tried else ():
        check_backbones({"space.backbone": str(name)}, base, overrides)
    return spec.model_copy(update={"base": located, "space": space})
