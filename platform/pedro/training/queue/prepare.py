"""Validates a job over HTTP, of which only the schema was checked, and stores what its driver reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedro.backbones.sharing import offer_backbone
from pedro.errors import ConfigError
from pedro.refs import FILE_ID
from pedro.spec_reader import validate_spec
from pedro.store import JobKind
from pedro.training.job import check_data, stage
from pedro.training.parent import with_pinned_parent
from pedro.training.spec import FineTuneSpec
from pedro.training.storage import join, write_text
from pedro.training.sweep import of_api
from pedro.training.uploaded_files import with_uploaded_files

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.errors import PedroError
    from pedro.store import JobRecord

FIELDS = {
    **{"data.train": "training_file", "data.validation": "validation_file", "parent": "model"},
    "resources": "method.pedro.resources",
}
"""The API's field names for a spec's."""


def prepare(job: JobRecord, settings: Settings) -> dict[str, Any] | None:
    """Store the resolved spec and its data; for a sweep, returns the spec for its row.

    Raises as `looked_at` does."""
    staged = looked_at(job.spec, settings)
    offer_backbone(settings, staged.backbone)
    if job.kind == JobKind.SWEEP:
        return of_api.record(job.id, of_api.sweep_spec(job.spec, staged, options=False), job.spec, settings)
    location = join(settings.storage, "jobs", job.id, "spec.json")
    write_text(location, json.dumps(staged.to_dict(), indent=2))
    return None


def looked_at(fields: Mapping[str, Any], settings: Settings) -> FineTuneSpec:
    """The resolved spec, with its data in the storage; for a sweep, that of its trials.

    Raises PedroError: ConfigError if the spec is invalid, or names anything but uploaded files; NotFoundError if a file
    or the parent was deleted; DataError with the first bad line of a file that cannot be used.
    """
    own = {name: value for name, value in fields.items() if name != "sweep"}
    spec = validate_spec(own, FineTuneSpec, source="method.pedro")
    for role, file in spec.data.files().items():
        if not FILE_ID.fullmatch(file):
            raise ConfigError(f"data.{role}: {file!r} is not the id of an uploaded file", param=f"data.{role}")
    staged = stage(with_uploaded_files(with_pinned_parent(spec, settings), settings), settings.storage)
    check_data(staged, settings, lambda _line: None)
    return staged


def told_error(error: PedroError) -> dict[str, str | None]:
    """Code and field of an error, in the API's terms."""
    return {"code": error.code or "invalid_training_file", "param": FIELDS.get(error.param or "", error.param)}
