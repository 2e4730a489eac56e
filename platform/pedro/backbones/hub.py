"""Downloads a model of the hub by its id: the files that pedro reads, at one commit; an interrupted download resumes.

Needs no account for models that are open.
"""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedro.backbone import HUB_FILES, embedded_backbones
from pedro.backbone_files import config_problem
from pedro.backbones.kept import Log, check_space
from pedro.backbones.wheels import check_sha256
from pedro.errors import BackboneError, UnavailableError

TIMEOUT_S = 20.0
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)


@dataclass(frozen=True)
class Snapshot:
    """What the hub has of a model at one commit."""

    hub_id: str
    commit: str
    licence: str | None
    sizes: dict[str, int]
    """Bytes of each file that pedro reads."""
    sha256: dict[str, str]
    """Digests of the large ones."""


def find_snapshot(hub_id: str, revision: str | None) -> Snapshot:
    """Ask the hub. Raises BackboneError for an id or revision that there is not, UnavailableError without an answer."""
    from huggingface_hub import HfApi

    with _asking(hub_id, revision):
        info: Any = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    files = [file for file in info.siblings or () if _wanted(file.rfilename)]
    card = info.card_data
    licence = card.get("license") if card is not None else None
    return Snapshot(
        hub_id,
        str(info.sha),
        str(licence) if licence else None,
        {file.rfilename: int(file.size or 0) for file in files},
        {file.rfilename: str(file.lfs.sha256) for file in files if file.lfs is not None},
    )


def download_snapshot(snapshot: Snapshot, folder: Path, log: Log) -> None:
    """Have its files in `folder`, where an earlier try may have left some. The config comes first and is judged."""
    total = sum(snapshot.sizes.values())
    check_space(folder, total, f"{snapshot.hub_id} ({total / 1e6:,.0f} MB)")
    small = [name for name in snapshot.sizes if name.endswith(".json")]
    log(f"downloading {snapshot.hub_id} at {snapshot.commit[:12]} ({total / 1e6:,.0f} MB)")
    for names in (small, list(snapshot.sizes)):
        _download(snapshot, names, folder)
        if why := config_problem(folder, snapshot.hub_id):
            raise BackboneError(f"backbone: {snapshot.hub_id!r} {why}", param="backbone")
    for name, digest in snapshot.sha256.items():
        try:
            check_sha256(folder / name, digest, f"{name} of {snapshot.hub_id}")
        except BackboneError:
            (folder / name).unlink()
            raise


def _download(snapshot: Snapshot, names: list[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with _asking(snapshot.hub_id, snapshot.commit):
        snapshot_download(snapshot.hub_id, revision=snapshot.commit, allow_patterns=names, local_dir=folder)


def _wanted(name: str) -> bool:
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in HUB_FILES)


@contextmanager
def _asking(hub_id: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub's client raises within becomes one line of ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise BackboneError(f"backbone: {hub_id!r} is not a hub id; expected owner/name", param="backbone") from error
    except errors.GatedRepoError as error:
        raise BackboneError(
            f"backbone: {hub_id!r} is given only to accounts that accepted its terms; accept them on its page and set "
            "HF_TOKEN, or take another model",
            param="backbone",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if isinstance(error, errors.RevisionNotFoundError) else ""
        raise BackboneError(
            f"backbone: the hub has no model {hub_id!r}{at} that is open to you; check the name and the revision",
            param="backbone",
        ) from error
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        raise _unreachable(hub_id, error) from error
    except Exception as error:  # the client raises dozens of types; each means "not to be had"
        raise _unreachable(hub_id, error) from error


def _unreachable(hub_id: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"backbone: {hub_id!r} could not be fetched from the hub ({type(error).__name__}); check your network and "
        f"HF_TOKEN and pull again, which keeps the files that have come; `pedro backbones add` takes files, and "
        f"{', '.join(embedded_backbones())} need no network",
        param="backbone",
    )
