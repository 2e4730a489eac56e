"""Adapter versions: registered in MLflow, with their aliases in the store, found, moved, deleted and downloaded.

A registered model is `<tenant>.<adapter>`. A version is immutable: a plain PEFT directory among its run's
artifacts (safetensors, never pickle) and tags that carry its digests, method, spec and metrics. Which versions there
are and where aliases stand is the store's to say (`store/standings.py`); MLflow is told afterwards, so that its pages
show it, and is not waited for.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pedro.config import Settings, check_name
from pedro.data.prompt_format import PromptFormat, check_format
from pedro.errors import AdapterError, ConflictError, PedroError, UnavailableError, model_not_found
from pedro.refs import ModelRef
from pedro.registry.mirror import log, tell
from pedro.registry.seal import TAG, Seal
from pedro.registry.tags import stored
from pedro.registry.takeover import TakenOver, take_over
from pedro.registry.tracking import Tracking
from pedro.registry.versions import made_version, version_tags
from pedro.store import CHAMPION, WHATEVER, By, Position, RegisteredAdapter, Store, Version, exclusive
from pedro.stored_files import touch

MANIFEST = "pedro_adapter.json"
DAMAGED = "adapter_damaged"  # the code of an error that fetching again does not mend
PATIENCE_S, LOCAL_PATIENCE_S = 3.0, 30.0  # how long a move waits for MLflow's server, or file, to show it
TRIES = 3  # to register a version of a name that somebody deletes meanwhile; failures that say that MLflow is away


class Registry(Tracking):
    """Versions and runs of one MLflow store, and the aliases in ours."""

    def __init__(
        self,
        tracking_uri: str,
        artifact_root: str,
        cache_dir: Path,
        database_url: str,
        seal_file: Path | None = None,
        server_database: str | None = None,
    ) -> None:
        super().__init__(tracking_uri, artifact_root, server_database)
        self.database_url = database_url
        self.cache_dir = Path(cache_dir)
        self._seal = Seal(seal_file or self.cache_dir.parent / "secrets" / "seal.key")

    @classmethod
    def open(cls, settings: Settings) -> Registry:
        """The registry that the environment names."""
        return cls(
            settings.tracking_uri,
            settings.artifact_root,
            settings.cache,
            settings.database_url,
            settings.seal_file,
            settings.mlflow_database_url,
        )

    @cached_property
    def store(self) -> Store:
        """Where names, versions and aliases are. What MLflow held of them in a home of an earlier release is taken
        over first. Raises UnavailableError, also where a server's store waits for `pedro db upgrade` to do so."""
        store = Store(self.database_url)
        if store.imported() is None:
            if not store.is_file:
                raise UnavailableError(
                    "the adapters of the registry are not in the platform's database yet; run `pedro db upgrade`",
                    param="database_url",
                    code="schema",
                )
            take_over(self, store)
        return store

    def take_over(self, *, unsealed: bool = False) -> TakenOver:
        """Enter adapters and versions of MLflow's registry that the store does not know, once the first was done only
        those that bear the platform's seal, or all (`unsealed`). Raises UnavailableError."""
        store = Store(self.database_url)
        anyway = unsealed or store.imported() is None
        return take_over(self, store, again=True, sealed=None if anyway else self._seal.holds)

    def register(self, run_id: str, directory: str | Path, tenant: str, adapter: str, *, gate: str = "") -> Version:
        """Make the adapter directory the next version of `tenant.adapter`; no alias moves.

        Raises AdapterError, and registers nothing, if it is no whole adapter of known files and finite weights,
        DataError if its prompt's template exceeds its bounds.
        """
        from pedro.adapter_check import check_adapter
        from pedro.adapter_directory import manifest_digest

        name = ModelRef(check_name("tenant", tenant), check_name("adapter", adapter)).name
        manifest = check_adapter(directory)
        manifest.setdefault("manifest_digest", manifest_digest(manifest))  # manifests of others may lack it
        if manifest.get("prompt_format"):
            check_format(PromptFormat.from_dict(manifest["prompt_format"]))
        self.client.log_artifacts(run_id, str(directory), "adapter")
        tags, model_tags = version_tags(manifest, gate), stored({"tenant": tenant, "adapter": adapter})
        for tries_left in reversed(range(TRIES)):
            with exclusive(self.store.url, name):
                tell(self, self.store, name)  # that an earlier adapter of this name was deleted, above all
                made = self.store.made_of(name)
                try:
                    self.client.create_registered_model(name, tags=model_tags)
                except self.error:  # exists already
                    self.client.get_registered_model(name)
                source = f"runs:/{run_id}/adapter"
                entity = self.client.create_model_version(name, source=source, run_id=run_id, tags=tags)
                version = made_version(entity, ModelRef.parse(name), run_id, tags)
                self.client.set_model_version_tag(name, str(version.version), TAG, self._seal.of(version))
                try:
                    self.store.add_version(version, made)
                    break
                except ConflictError:
                    if not tries_left:
                        raise
        return self.get(name, version.version)

    def get(self, name: str, which: str | int = CHAMPION) -> Version:
        """A version of `tenant.adapter` by number or alias; NotFoundError (the uniform 404) if there is none."""
        return self.store.get_version(name, which)

    def find(self, ref: ModelRef) -> Version:
        """The version that `ref` names, the champion where it names none; NotFoundError if there is none."""
        version = self.get(ref.name, CHAMPION if ref.which is None else ref.which)
        if ref.digest not in ("", version.digest):
            raise model_not_found(str(ref))
        return version

    def versions(self, name: str) -> list[Version]:
        """All versions of `tenant.adapter`, oldest first; empty if there is no such adapter."""
        return self.store.list_versions(name)

    def all_versions(self, tenant: str | None = None) -> dict[str, list[Version]]:
        """The versions of every adapter, of one tenant or of all."""
        return self.store.list_all_versions(tenant)

    def models(self, tenant: str | None = None) -> list[str]:
        """Names of the registered adapters, of one tenant or of all."""
        return list(self.store.list_adapters(tenant))

    def catalog(self) -> dict[str, RegisteredAdapter]:
        """Every registered adapter with its aliases."""
        return self.store.list_adapters()

    def stamp(self) -> Position:
        """Changes whenever the catalogue may have, at a hundredth of its cost. Raises UnavailableError."""
        return self.store.position()

    def set_alias(self, name: str, alias: str, version: int) -> Version:
        """Point `alias` at a version that exists."""
        moved = self.store.set_alias(name, alias, version)
        self._show(name)
        return moved

    def set_gate(self, version: Version, gate: str) -> None:
        """Record on a version what its gate decided and why."""
        self.store.set_gate(version, gate)
        self._show(version.name)

    def judge(
        self, version: Version, passed: bool, reason: str, judged_against: int | None, *, actor: By = None
    ) -> tuple[str, str]:
        """Enter what the gate decided: champion or candidate, and the reason that holds (`Store.judge`)."""
        settled = self.store.judge(version, passed, reason, judged_against, actor=actor)
        self._show(version.name)
        return settled

    def promote(self, name: str, version: int, *, expected: int | None = WHATEVER, actor: By = None) -> Version:
        """Make a version champion; the champion until now becomes `previous`.

        Raises ConflictError if `expected` is given and the champion is another one by now (None: there is one).
        """
        moved = self.store.promote(name, version, expected=expected, actor=actor)
        self._show(name)
        return moved

    def rollback(self, name: str, *, expected: int | None = None, actor: By = None) -> Version:
        """Swap champion and previous; ConflictError if there is no previous version, or another than `expected`."""
        moved = self.store.rollback(name, expected=expected, actor=actor)
        self._show(name)
        return moved

    def canary(self, name: str, version: int, weight: float, *, actor: By = None) -> Version:
        """Have a version answer a share of what is asked of the champion; 0 ends it. Raises ConflictError."""
        moved = self.store.set_canary(name, version, weight, actor=actor)
        self._show(name)
        return moved

    def shadow(self, name: str, version: int, weight: float, *, actor: By = None) -> Version:
        """Have a version asked a share of what the champion answers, for nobody to see; 0 ends it. Raises
        ConflictError."""
        moved = self.store.set_shadow(name, version, weight, actor=actor)
        self._show(name)
        return moved

    def delete(self, name: str, version: int | None = None, *, actor: By = None) -> None:
        """Delete one version, or the adapter with all of them; the champion alone is refused (ConflictError)."""
        if version is None:
            self.store.delete_adapter(name, actor=actor)
        else:
            self.store.delete_version(name, version, actor=actor)
        self._show(name)

    def retire(self, name: str, version: int, promoted_before: float = math.inf, *, actor: By = None) -> None:
        """Delete a version that no alias names (`Store.retire_version`). Raises ConflictError, NotFoundError."""
        self.store.retire_version(name, version, promoted_before, actor=actor)
        self._show(name)

    def mirror(self) -> list[str]:
        """Tell MLflow what it has not heard of yet; the names of which it still has not."""
        failed = 0
        for name in self.store.unmirrored():
            failed += not self._tell(name)
            if failed == TRIES:
                break  # it is away
        return self.store.unmirrored()

    def _show(self, name: str) -> None:
        """Have MLflow show a move that was made; a server that does not answer is not waited for."""
        from mlflow import MlflowClient  # noqa: F401 - seconds, which are not the server's to answer for

        telling = threading.Thread(target=self._tell, args=(name,), daemon=True, name=f"mirror {name}")
        telling.start()
        telling.join(PATIENCE_S if self.sqlite_file is None else LOCAL_PATIENCE_S)
        if telling.is_alive():
            log.warning("%s: moved; MLflow does not answer and will be updated later", name)

    def _tell(self, name: str) -> bool:
        try:
            with exclusive(self.store.url, name):
                tell(self, self.store, name)
        except (self.error, PedroError, OSError) as error:
            why = str(error).partition("\n")[0]
            log.warning("%s: moved; MLflow could not be updated and will be later (%s)", name, why)
            return False
        return True

    @property
    def adapter_cache(self) -> Path:
        """This host's copies of versions."""
        return self.cache_dir / "adapters"

    def cached(self, digest: str, run_id: str) -> Path:
        """Where this host's copy of a version is, or would be."""
        return self.adapter_cache / f"{digest.removeprefix('sha256:')}-{run_id}"

    def download(self, version: Version) -> Path:
        """The version's adapter directory on this host, from a cache keyed by its digest and its run.

        The digest covers the weights alone: equal weights may come with another prompt format. Raises AdapterError
        if what the store holds is not what was registered, the prompt format among it.
        """
        target = self.cached(version.digest, version.run_id)
        touch(target)  # so that it is not taken for one that nobody uses
        if (target / MANIFEST).is_file():
            return target
        with self._fetched(version, target.parent) as source:
            try:
                source.rename(target)
            except OSError:  # another process was first with the same content
                if not (target / MANIFEST).is_file():
                    raise
        return target

    def verify(self, version: Version) -> None:
        """Read a version's files from where they lie, not from the cache. Raises AdapterError as `download` does."""
        with self._fetched(version, self.adapter_cache):
            pass

    @contextmanager
    def _fetched(self, version: Version, beside: Path) -> Iterator[Path]:
        """A verified copy for as long as the block lasts, in a folder within `beside`."""
        beside.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".loading-", dir=beside))
        try:
            source = self.download_artifacts(version.run_id, "adapter", scratch, of=version.ref)
            _verify(version, source)
            yield source
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _verify(version: Version, directory: Path) -> None:
    """Raise AdapterError unless the files are, to the byte, those that the store's row is of.

    The row names the digest of the manifest, which names those of weights and config: whoever can write artifacts, but
    not the store, can have no other weights and no other template served.
    """
    from pedro.adapter_directory import manifest_digest, verify_adapter

    others = f"{version.ref}: the stored files are not those that were registered"
    try:
        manifest = verify_adapter(directory, None)
    except AdapterError as error:
        raise AdapterError(f"{others} ({error.message})", code=DAMAGED) from error
    sealed = version.manifest_digest or manifest_digest(manifest)  # earlier releases recorded none
    if manifest["digest"] != version.digest or manifest_digest(manifest) != sealed:
        raise AdapterError(others, code=DAMAGED)
