"""Adapter versions in MLflow's model registry: registered, found, promoted, deleted and downloaded.

A registered model is `<tenant>.<adapter>`. A version is immutable: a plain PEFT directory among its run's
artifacts (safetensors, never pickle) and tags that carry its digests, method, spec and metrics. Three aliases
move: `champion` (what the bare name means), `previous` (what rollback returns to) and `candidate` (the newest
version that its gate refused).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.config import Settings, check_name
from pedro.data.prompt_format import PromptFormat, check_format
from pedro.database import FileWatch, exclusive
from pedro.errors import AdapterError, ConflictError, NotFoundError, UnavailableError, model_not_found
from pedro.refs import ModelRef
from pedro.registry.connection import SQLITE
from pedro.registry.promotion import CANDIDATE, CHAMPION, PREVIOUS, aliases_of, finish, move
from pedro.registry.tags import stored
from pedro.registry.tracking import Tracking
from pedro.registry.versions import GATE, TENANT, Version, read_version, version_tags

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

WHATEVER = -1  # an expected champion that is not compared
MANIFEST = "pedro_adapter.json"
DAMAGED = "adapter_damaged"  # the code of an error that fetching again does not mend


@dataclass(frozen=True)
class RegisteredAdapter:
    """Its aliases, and when its name was made (ms): a name made again after a deletion is another adapter."""

    created: int
    aliases: dict[str, int]


class Registry(Tracking):
    """Versions and runs of one MLflow store."""

    def __init__(self, tracking_uri: str, artifact_root: str, cache_dir: Path, database_url: str = "") -> None:
        """`database_url`: whose lock those who move aliases share. Beside an sqlite store it is the store's own."""
        super().__init__(tracking_uri, artifact_root)
        own = tracking_uri if self.sqlite_file else f"{SQLITE}{Path(cache_dir) / 'registry'}"
        self._lock = own if own == tracking_uri or not database_url else database_url
        self.cache_dir = Path(cache_dir)
        self._watch = FileWatch()

    @classmethod
    def open(cls, settings: Settings) -> Registry:
        """The registry that the environment names."""
        return cls(settings.tracking_uri, settings.artifact_root, settings.cache, settings.database_url)

    def register(self, run_id: str, directory: str | Path, tenant: str, adapter: str, *, gate: str = "") -> Version:
        """Make the adapter directory the next version of `tenant.adapter`; no alias moves.

        Raises AdapterError, and registers nothing, if it is no whole adapter of known files and finite weights,
        DataError if its prompt's template exceeds its bounds.
        """
        from pedro.methods.adapter_check import check_adapter

        name = _model_name(tenant, adapter)
        manifest = check_adapter(directory)
        if manifest.get("prompt_format"):
            check_format(PromptFormat.from_dict(manifest["prompt_format"]))
        self.client.log_artifacts(run_id, str(directory), "adapter")
        try:
            self.client.create_registered_model(name, tags=stored({"tenant": tenant, "adapter": adapter}))
        except self.error:  # exists already
            self.client.get_registered_model(name)
        tags = version_tags(manifest, gate)
        made = self.client.create_model_version(name, source=f"runs:/{run_id}/adapter", run_id=run_id, tags=tags)
        return self.get(name, int(made.version))

    def get(self, name: str, which: str | int = CHAMPION) -> Version:
        """A version of `tenant.adapter` by number or alias; NotFoundError (the uniform 404) if there is none."""
        return self._version(name, which, self._aliases(name))

    def _version(self, name: str, which: str | int, aliases: dict[str, int]) -> Version:
        """The version, where the adapter's aliases are known: half the questions."""
        number = which if isinstance(which, int) or which.isdigit() else aliases.get(which, 0)
        try:
            return read_version(self.client.get_model_version(name, str(number)), aliases)
        except self.error as error:
            if not _is_missing(error):
                raise UnavailableError("the adapter registry does not answer; try again in a moment") from error
            raise model_not_found(name if which == CHAMPION else f"{name}@{which}") from error

    def find(self, ref: ModelRef) -> Version:
        """The version that `ref` names, the champion where it names none; NotFoundError if there is none."""
        version = self.get(ref.name, CHAMPION if ref.which is None else ref.which)
        if ref.digest not in ("", version.digest):
            raise model_not_found(str(ref))
        return version

    def versions(self, name: str) -> list[Version]:
        """All versions of `tenant.adapter`, oldest first; empty if there is no such adapter."""
        entities = self.pages(self.client.search_model_versions, filter_string=f"name = '{_quotable(name)}'")
        aliases = self._aliases(name)
        return sorted((read_version(entity, aliases) for entity in entities), key=lambda version: version.version)

    def models(self, tenant: str | None = None) -> list[str]:
        """Names of the registered adapters, of one tenant or of all."""
        return sorted(name for name in self.catalog() if tenant is None or name.startswith(f"{tenant}."))

    def catalog(self) -> dict[str, RegisteredAdapter]:
        """Every registered adapter with its aliases: the one query that a watcher repeats."""
        models = self.pages(self.client.search_registered_models, filter_string=None)
        return {
            model.name: RegisteredAdapter(created=int(model.creation_timestamp), aliases=aliases_of(model))
            for model in models
            if TENANT in model.tags
        }

    def stamp(self) -> object | None:
        """Changes whenever an sqlite store does, at a hundredth of `catalog`'s cost; None for a tracking server.

        Raises UnavailableError where the store is gone.
        """
        if self.sqlite_file is None:
            return None
        try:
            return self._watch.stamp(str(self.sqlite_file))
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError("the adapter registry does not answer; try again in a moment") from error

    def set_alias(self, name: str, alias: str, version: int) -> Version:
        """Point `alias` at a version that exists."""
        with self._moving(name) as aliases:
            self._version(name, version, aliases)
            self.client.set_registered_model_alias(name, alias, str(version))
            return self._version(name, version, {**aliases, alias: version})

    def tag_gate(self, version: Version, gate: str) -> None:
        """Record on a version what its gate decided and why."""
        self.client.set_model_version_tag(version.name, str(version.version), GATE, gate)

    def promote(self, name: str, version: int, *, expected: int | None = WHATEVER) -> Version:
        """Make a version champion; the champion until now becomes `previous`.

        Raises ConflictError if `expected` is given and the champion is another one by now (None: there is one).
        """
        with self._moving(name) as aliases:
            self._version(name, version, aliases)
            champion = aliases.get(CHAMPION)
            if expected not in (WHATEVER, champion):
                now, then = (f"version {n}" if n is not None else "none" for n in (champion, expected))
                raise ConflictError(
                    f"the champion is {now} by now, not {then}; compare {name}:{version} with it and promote it by hand"
                )
            wanted: dict[str, int | None] = {CHAMPION: version}
            if champion is not None and champion != version:
                wanted[PREVIOUS] = champion
            if aliases.get(CANDIDATE) == version:
                wanted[CANDIDATE] = None
            return self._version(name, version, move(self.client, name, wanted))

    def rollback(self, name: str, *, expected: int | None = None) -> Version:
        """Swap champion and previous; ConflictError if there is no previous version, or another than `expected`."""
        with self._moving(name) as aliases:
            if not aliases and not self.versions(name):
                raise model_not_found(name)
            if PREVIOUS not in aliases or CHAMPION not in aliases:
                raise ConflictError(
                    f"{name}: no previous version to roll back to; `promote` one of its versions instead"
                )
            if expected not in (None, aliases[PREVIOUS]):
                raise ConflictError(
                    f"{name}: the previous version is {aliases[PREVIOUS]} by now; look, and roll back again"
                )
            previous = aliases[PREVIOUS]
            self._version(name, previous, aliases)
            moved = move(self.client, name, {CHAMPION: previous, PREVIOUS: aliases[CHAMPION]})
            return self._version(name, previous, moved)

    def delete(self, name: str, version: int | None = None) -> None:
        """Delete one version, or the adapter with all of them; the champion alone is refused (ConflictError)."""
        with self._moving(name):
            if version is None:
                if name not in self.catalog():
                    raise model_not_found(name)
                self.client.delete_registered_model(name)
                return
            current = self.get(name, version)
            if CHAMPION in current.aliases:
                raise ConflictError(
                    f"{current.ref} is the champion; promote another version first, or delete all of {name}"
                )
            for alias in current.aliases:
                self.client.delete_registered_model_alias(name, alias)
            self.client.delete_model_version(name, str(version))

    def download(self, version: Version) -> Path:
        """The version's adapter directory on this host, from a cache keyed by its digest and its run.

        The digest covers the weights alone: equal weights may come with another prompt format. Raises AdapterError
        if what the store holds is not what was registered, the prompt format among it.
        """
        target = self.cache_dir / "adapters" / f"{version.digest.removeprefix('sha256:')}-{version.run_id}"
        if (target / MANIFEST).is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".loading-", dir=target.parent))
        try:
            source = self.download_artifacts(version.run_id, "adapter", scratch, of=version.ref)
            manifest = _read_manifest(source)
            sealed = version.manifest_digest or manifest.get("manifest_digest")  # earlier releases recorded none
            if manifest["digest"] != version.digest or manifest.get("manifest_digest") != sealed:
                raise AdapterError(f"{version.ref}: the stored files are not those that were registered", code=DAMAGED)
            try:
                source.rename(target)
            except OSError:  # another process was first with the same content
                if not (target / MANIFEST).is_file():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    @contextmanager
    def _moving(self, name: str) -> Iterator[dict[str, int]]:
        """Alone among all who move an adapter's aliases: these, after a move that was broken off has been finished."""
        with exclusive(self._lock, name):
            model = self._model(name)
            if model is not None:
                with suppress(self.error):  # what is left over once more is finished by the next who moves
                    finish(self.client, model)
            yield {} if model is None else aliases_of(model)

    def _aliases(self, name: str) -> dict[str, int]:
        """The adapter's aliases; none if there is no such adapter."""
        model = self._model(name)
        return {} if model is None else aliases_of(model)

    def _model(self, name: str) -> RegisteredModel | None:
        """What MLflow has of the adapter; None, as what follows will say, if there is no such adapter."""
        try:
            return self.client.get_registered_model(name)
        except self.error as error:
            if not _is_missing(error):
                raise UnavailableError("the adapter registry does not answer; try again in a moment") from error
            return None


def _is_missing(error: Any) -> bool:
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _model_name(tenant: str, adapter: str) -> str:
    return ModelRef(check_name("tenant", tenant), check_name("adapter", adapter)).name


def _quotable(name: str) -> str:
    tenant, dot, adapter = name.partition(".")
    if not dot:
        raise NotFoundError(f"{name!r} is no adapter name; expected tenant.adapter", param="model")
    return _model_name(tenant, adapter)


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest
    except (OSError, ValueError, RecursionError) as error:
        message = f"{directory.name}: no readable {MANIFEST}, so this is no adapter directory"
        raise AdapterError(message, code=DAMAGED) from error
