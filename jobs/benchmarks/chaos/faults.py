"""What is done to a served home: each fault by its name, and the order in which a seed has them come."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from jobs.benchmarks.home_processes import kill

if TYPE_CHECKING:
    from jobs.benchmarks.chaos.server import ServedHome
    from jobs.benchmarks.mlflow_server import MlflowServer
    from jobs.benchmarks.postgres_server import PostgresServer

ENGINE, GATEWAY, PROXY = "engine replica killed", "gateway killed", "proxy killed"
SERVES, QUEUES = "Serve's controller killed", "queue's controller killed"
RAYLET, HEAD, GCS = "raylet killed", "Ray head killed", "GCS killed"
DATABASE, MLFLOW = "PostgreSQL away", "MLflow away"
FULL, NO_STORE = "request log on a full disk", "adapter cache cannot be written"
AHEAD, BACK = "clocks an hour ahead", "clocks an hour back"
WHOLE_SERVER = (RAYLET, HEAD, GCS)
"""After these the server is started again."""
NOT_LOADED = (DATABASE, MLFLOW, NO_STORE)
"""While these last some versions cannot be loaded; a name then keeps meaning the last one that could."""
AWAY_S, ODD_S = 6.0, 8.0  # how long what is away stays so; and what is odd
HOUR_S = 3600.0


class Faults:
    """Does them. Each returns once it is done; what it broke may still be coming back."""

    def __init__(
        self,
        served: ServedHome,
        rng: random.Random,
        postgres: PostgresServer,
        mlflow: MlflowServer | None,
        set_clock: Callable[[float], None] | None,
    ) -> None:
        self._served, self._rng = served, rng
        self._postgres, self._mlflow, self._set_clock = postgres, mlflow, set_clock
        self.known: Mapping[str, Callable[[], None]] = {
            ENGINE: lambda: self._kill("engine"),
            GATEWAY: lambda: self._kill("gateway"),
            PROXY: lambda: self._kill("proxy"),
            SERVES: lambda: self._kill("Serve's controller"),
            QUEUES: lambda: self._kill("queue's controller"),
            RAYLET: lambda: self._kill("raylet"),
            GCS: lambda: self._kill("GCS"),
            HEAD: self._kill_head,
            DATABASE: self._database_away,
            FULL: self._full_disk,
            NO_STORE: self._no_cache,
        }
        if mlflow is not None:
            self.known = {**self.known, MLFLOW: self._mlflow_away}
        if set_clock is not None:
            self.known = {**self.known, AHEAD: lambda: self._jump(HOUR_S), BACK: lambda: self._jump(-HOUR_S)}

    def _kill(self, kind: str) -> None:
        found = self._served.processes(kind)
        kill([self._rng.choice(found)] if found else [])

    def _kill_head(self) -> None:
        """The process that started raylet and GCS, which stay."""
        from pedro.cluster import find_head

        head = find_head(self._served.settings)
        assert head is not None, "the server runs on one"
        kill([psutil.Process(head.pid)])

    def _database_away(self) -> None:
        self._postgres.kill()
        time.sleep(AWAY_S)
        self._postgres.start()

    def _mlflow_away(self) -> None:
        assert self._mlflow is not None, "it is no fault without one"
        self._mlflow.kill()
        time.sleep(AWAY_S)
        self._mlflow.start()

    def _full_disk(self) -> None:
        """Whatever gateways log goes to a device that has no room."""
        log = self._served.settings.requests_log
        self._stand_in(log, lambda: log.symlink_to("/dev/full"))

    def _no_cache(self) -> None:
        """Where a host keeps what it fetches lies something that is no folder, so no adapter can be fetched."""
        cache = self._served.settings.cache / "adapters"
        self._stand_in(cache, cache.touch)

    def _stand_in(self, place: Path, make: Callable[[], None]) -> None:
        """Something else is where a thing of the server's was, for a while."""
        aside = place.with_name(f"{place.name}.aside")
        place.rename(aside)
        try:
            make()
            time.sleep(ODD_S)
        finally:
            with suppress(OSError):
                place.unlink()
            aside.rename(place)

    def _jump(self, seconds: float) -> None:
        assert self._set_clock is not None, "it is no fault without one"
        self._set_clock(seconds)
        try:
            time.sleep(ODD_S)
        finally:
            self._set_clock(0.0)


def schedule(known: Sequence[str], rounds: int, seed: int) -> list[str]:
    """The faults of a run in their order: each once in each round, which is drawn anew."""
    rng = random.Random(seed)  # noqa: S311
    order: list[str] = []
    for _ in range(rounds):
        order += rng.sample(known, len(known))
    return order
