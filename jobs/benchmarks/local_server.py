"""A server for the time of a benchmark: a home of its own, registered adapters, keys, a local Ray head."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.model_sizes import bench_folder
from pedro.config import Settings

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log
    from pedro.registry import Registry
    from pedro.serving.config import ServeConfig
    from pedro.store import Store

TENANT = "bench"


@dataclass(frozen=True)
class LocalServer:
    """Where it answers, the store that makes keys for it, and its home."""

    url: str
    store: Store
    settings: Settings

    def key(self, tenant: str = TENANT, *scopes: str) -> str:
        """A new key; it may infer if nothing else is said."""
        return self.store.create_key(tenant, scopes or ("infer",), "benchmark")[1]


@contextmanager
def local_server(
    config: ServeConfig, register: Callable[[Registry, Path], None], log: Log, *, database_url: str = ""
) -> Iterator[LocalServer]:
    """Serve what `register` puts into the registry of a new home; Ray head and home go with the `with`.

    The store is in a file of the home where no `database_url` is given."""
    from pedro.registry import Registry
    from pedro.serving.deploy import deploy, end
    from pedro.store import Store

    home = bench_folder() / "home"
    settings = Settings.from_env({"PEDRO_HOME": str(home), "PEDRO_DATABASE_URL": database_url})
    before = dict(os.environ)
    try:
        end(settings)  # of a run that was killed
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        register(Registry.open(settings), home)
        store = Store(settings.database_url)
        served = deploy(settings, config, port=0, log=log)
        _restore(before)
        yield LocalServer(served.url, store, settings)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # a driver whose head is gone hangs before it shows any error
        end(settings)
        shutil.rmtree(home, ignore_errors=True)
        _restore(before)


def _restore(environment: dict[str, str]) -> None:
    """Undo what deploying set: the benchmark's own files stay in the user's home, not in the server's."""
    os.environ.clear()
    os.environ.update(environment)


def register_version(registry: Registry, directory: Path, adapter: str) -> int:
    """The directory as the next version of that adapter of TENANT."""
    run = registry.start_run(experiment=TENANT, name="benchmark", params={}, tags={})
    version = registry.register(run, directory, TENANT, adapter)
    registry.finish_run(run)
    return version.version
