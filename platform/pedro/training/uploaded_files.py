"""Fetches files that a spec names by id: `file-…`, only of the spec's tenant.

A job gets a copy among the data sets, named by content, so it does not depend on the file. Deleted or expired files are
only unavailable to new jobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.data.files import ending
from pedro.errors import ConfigError
from pedro.files import Contents
from pedro.files.names import FINE_TUNE
from pedro.refs import FILE_ID
from pedro.training.storage import put_uploaded

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.spec import FineTuneSpec


def with_uploaded_files(spec: FineTuneSpec, settings: Settings) -> FineTuneSpec:
    """The spec with ids replaced by copies of the files; unchanged if it has none.

    Raises NotFoundError, the same for an unknown file and another tenant's; ConfigError for one of another purpose.
    """
    named = {role: value for role, value in spec.data.files().items() if FILE_ID.fullmatch(value)}
    if not named:
        return spec
    from pedro.store import Store

    store, contents = Store(settings.database_url), Contents(settings.storage)
    copies = {}
    try:
        for role, file_id in named.items():
            record = store.get_file(file_id, spec.tenant)
            if record.purpose != FINE_TUNE:
                raise ConfigError(
                    f'data.{role}: {file_id} was uploaded for "{record.purpose}"; upload it with purpose "{FINE_TUNE}"',
                    param=f"data.{role}",
                )
            suffix = "".join(ending(record.filename))
            copies[role] = put_uploaded(contents.url(record.location), record.digest, suffix, settings.storage)
    finally:
        store.close()
    return spec.model_copy(update={"data": spec.data.model_copy(update=copies)})
