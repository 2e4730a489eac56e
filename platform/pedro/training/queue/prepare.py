"""Looks at a job that came over HTTP, of which only the shape was checked, and readies what its driver reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pedro.backbones.sharing import offer_backbone
from pedro.config import validate_spec
from pedro.errors import ConfigError
from pedro.refs import FILE_ID
from pedro.store import Store
from pedro.training.job import check_data, stage
from pedro.training.parent import pin_parent
from pedro.training.spec import FineTuneSpec
from pedro.training.storage import join, write_text
from pedro.training.uploaded_files import with_uploaded_files

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import JobRecord


def prepare(job: JobRecord, settings: Settings) -> None:
    """Put the resolved spec into the storage, its data with it.

    Raises PedroError: ConfigError for a spec that is wrong, or names anything but uploaded files; NotFoundError for a
    file, or a version to go on from, that was deleted; DataError with the first bad line of a
    file that cannot be trained on.
    """
    spec = validate_spec(job.spec, FineTuneSpec, source="method.pedro")
    for role, file in spec.data.files().items():
        if not FILE_ID.fullmatch(file):
            raise ConfigError(f"data.{role}: {file!r} is no id of an uploaded file", param=f"data.{role}")
    store = Store(settings.database_url)
    try:
        spec = pin_parent(spec, store)
    finally:
        store.close()
    staged = stage(with_uploaded_files(spec, settings), settings.storage)
    check_data(staged, settings, lambda _line: None)
    offer_backbone(settings, staged.backbone)
    location = join(settings.storage, "jobs", job.id, "spec.json")
    write_text(location, json.dumps(staged.to_dict(), indent=2))
