"""A sweep over HTTP: a job whose spec has a section `sweep`, of which only the schema was checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError
from pedro.spec_reader import validate_spec
from pedro.training.sweep.launch import job_spec
from pedro.training.sweep.records import Records, SweepRecord
from pedro.training.sweep.spec import SweepSpec
from pedro.training.sweep.variants import check_sweep

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.spec import FineTuneSpec

FIELD = "method.pedro.sweep"
PLANNED = ("workers", "at_once")
"""Keys that the queue adds to the section after validation."""


def sweep_spec(fields: Mapping[str, Any], base: FineTuneSpec, *, options: bool) -> SweepSpec:
    """The sweep of a job's spec, whose `base` is validated. Raises ConfigError for impossible trials; `options`: also
    validate the method's options."""
    section = {name: value for name, value in fields["sweep"].items() if name not in PLANNED}
    asked = {name: value for name, value in fields.items() if name != "sweep"}
    try:
        spec = validate_spec({**section, "base": asked}, SweepSpec, source=FIELD)
    except ConfigError as error:
        raise ConfigError(error.message, param=FIELD) from None
    spec = spec.model_copy(update={"base": base})
    try:
        check_sweep(spec, options=options)
    except ConfigError as error:
        key = (error.param or "").partition(" ")[0]  # for combinations of values, no single key is at fault
        raise ConfigError(error.message, param=FIELD if key == "base" else f"{FIELD}.{key}") from None
    return spec


def record(job_id: str, spec: SweepSpec, fields: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Record the sweep under the job's id; returns the job's spec for the queue."""
    Records(settings.storage, job_id).write_record(SweepRecord(job_id, spec.to_dict()))
    planned = job_spec(spec, settings)
    section = {**fields["sweep"], **{name: planned["sweep"][name] for name in PLANNED}}
    return {**fields, "resources": planned["resources"], "sweep": section}
