"""The local head of a PEDRO_HOME, and a cluster of two nodes started by hand: the same commands run on both."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from steady_clients import SteadyClients

from pedro import cluster
from pedro.config import Settings, holds_secret, without_password
from pedro.errors import ConfigError, UnavailableError

PEDRO = [sys.executable, "-m", "pedro.cli"]
DEMO = Path(__file__).parents[1] / "platform" / "pedro" / "assets" / "demo" / "acme"
SPEC = f"""
tenant: acme
adapter: two-nodes
data: {{train: {DEMO / "train.jsonl"}, test: {DEMO / "test.jsonl"}}}
training: {{max_steps: 4, batch_size: 8, lr: 1e-2, eval_every: 4, eval_rows: 16}}
gate: {{max_rows: 16, min_gain: -1}}
resources: {{workers: 2, zero_stage: 1}}
"""


@pytest.fixture
def home():
    """A PEDRO_HOME with a short path: Ray's sockets allow no long one."""
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as path:
        yield Path(path)


def test_every_setting_is_absolute_and_survives_the_way_to_another_process(home, monkeypatch):
    monkeypatch.chdir(home)
    settings = Settings.from_env({"PEDRO_HOME": "here", "PEDRO_STORAGE": "there"})
    assert settings.home == home / "here"
    assert settings.storage == str(home / "there")
    assert Settings.from_env(settings.env()) == settings


SECRET = "hunter2"
SECRETS = {
    "PEDRO_DATABASE_URL": f"postgresql://pedro:{SECRET}@db/pedro",
    "MLFLOW_TRACKING_URI": f"https://ops:{SECRET}@mlflow",
}


def test_no_password_is_in_a_jobs_environment_nor_in_a_training_runs_settings(home, monkeypatch):
    from pedro.training import ray_jobs, trainer

    settings = Settings.from_env({"PEDRO_HOME": str(home), **SECRETS})
    assert settings.database_url == SECRETS["PEDRO_DATABASE_URL"]
    asked = []

    class Client:
        def submit_job(self, **options):
            asked.append(options)

    monkeypatch.setattr(ray_jobs, "_client", lambda url: Client())
    ray_jobs.launch("pedro.training.job", "ftjob-1", settings, "http://127.0.0.1:1", {})
    shown_by_ray = json.dumps([asked, trainer.pack_settings(settings)])
    assert SECRET not in shown_by_ray + repr(settings)
    assert "MLFLOW_TRACKING_URI_FILE" in shown_by_ray
    assert {path.stat().st_mode & 0o777 for path in (home / "secrets").iterdir()} == {0o600}
    assert trainer.unpack_settings(trainer.pack_settings(settings)) == settings
    stale = {**os.environ, **settings.env()}
    plain = Settings.from_env({"PEDRO_HOME": str(home)})
    assert Settings.from_env({**stale, **plain.env()}) == plain


def test_a_secrets_file_that_this_host_lacks_is_told_with_the_remedy_unless_the_variable_is_set(home):
    env = {"PEDRO_HOME": str(home), "PEDRO_DATABASE_URL_FILE": "/run/secrets/none"}
    with pytest.raises(ConfigError, match=r"PEDRO_DATABASE_URL_FILE: /run/secrets/none.*set PEDRO_DATABASE_URL on"):
        Settings.from_env(env)
    assert Settings.from_env({**env, **SECRETS}).database_url == SECRETS["PEDRO_DATABASE_URL"]


def test_a_file_that_the_user_named_is_handed_on_rather_than_copied(home, monkeypatch):
    file = home / "url"
    file.write_text(SECRETS["PEDRO_DATABASE_URL"] + "\n")
    monkeypatch.setenv("PEDRO_DATABASE_URL_FILE", str(file))
    settings = Settings.from_env({"PEDRO_HOME": str(home), "PEDRO_DATABASE_URL_FILE": str(file)})
    assert settings.env()["PEDRO_DATABASE_URL_FILE"] == str(file)
    assert not (home / "secrets").exists()


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql://pedro@db/pedro", False),
        ("postgresql://pedro:a/b#c@db/pedro", True),
        ("postgresql://db/pedro?user=a&password=b", True),
        ("https://token@mlflow", True),
        ("http://mlflow:5000", False),
        ("sqlite:////home/a:b@c/pedro.db", False),
        ("/srv/a@b", False),
    ],
)
def test_what_may_be_a_password_is_taken_for_one_and_not_shown(url, secret):
    assert holds_secret(url) is secret
    assert (without_password(url) == url) is not secret


def test_a_storage_with_a_key_in_its_url_is_refused_because_manifests_would_hold_it(home):
    with pytest.raises(ConfigError, match="PEDRO_STORAGE: contains a password"):
        Settings.from_env({"PEDRO_HOME": str(home), "PEDRO_STORAGE": f"s3://id:{SECRET}@bucket/x"})


def test_a_multi_host_cluster_is_refused_with_single_host_storage():
    settings = Settings.from_env({"PEDRO_HOME": "/x", "MLFLOW_TRACKING_URI": "http://mlflow:5000"})
    with pytest.raises(ConfigError, match=r"2 hosts.*PEDRO_DATABASE_URL=sqlite.*PEDRO_STORAGE=/x/storage"):
        cluster.check_storage(settings, hosts=2)
    cluster.check_storage(settings, hosts=1)


HEAD_OF_FEW_TRIES = """#!{python}
import pathlib, socket, sys, time
tries = pathlib.Path({tries!r})
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
print("Ray runtime started", flush=True)
(port,) = (int(word.split("=")[1]) for word in sys.argv if word.startswith("--dashboard-port="))
if len(tries.read_text()) < {good}:
    sys.exit("dashboard [exit code=1]")
server = socket.create_server(("127.0.0.1", port))
time.sleep(60)
"""


@pytest.mark.parametrize("good", [1, 2, 3])
def test_a_head_whose_parts_give_up_while_it_starts_is_started_once_more(home, tmp_path, monkeypatch, good):
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    ray, tries = tmp_path / "ray", tmp_path / "tries"
    ray.write_text(HEAD_OF_FEW_TRIES.format(python=sys.executable, tries=str(tries), good=good))
    ray.chmod(0o755)
    monkeypatch.setattr(cluster.sys, "executable", str(ray))
    if good > 2:
        with pytest.raises(UnavailableError, match=r"did not start; its log is .*head\.log"):
            cluster._ensure_head(settings, print)
    else:
        head = cluster._ensure_head(settings, print)
        assert cluster.find_head(settings) == head
        assert cluster.stop_head(settings)
    assert len(tries.read_text()) == min(good, 2)


def test_addresses_of_both_kinds_have_urls_and_ports_of_their_own():
    assert cluster.url_of("::", 8000) == "http://[::]:8000"
    assert cluster.url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert cluster.port_is_free(0, "127.0.0.1")
    assert not cluster.port_is_free(0, "203.0.113.1")
    assert not cluster.port_is_free(0, "2001:db8::1")
    if cluster.port_is_free(0, "::1"):
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            assert not cluster.port_is_free(taken.getsockname()[1], "::1")
            assert not cluster.port_is_free(taken.getsockname()[1], "::")


def test_a_recorded_head_that_is_gone_is_not_found(home):
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    (home / "ray").mkdir()
    record = {"address": "127.0.0.1:1", "dashboard_url": "http://127.0.0.1:2", "pid": os.getpid(), "started": 1.0}
    (home / "ray" / "head.json").write_text(json.dumps(record))
    assert cluster.find_head(settings) is None
    assert cluster.stop_head(settings) is False


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("127.0.0.1:1", UnavailableError, "no Ray cluster answers at 127.0.0.1:1 .Connection refused"),
        ("ray://127.0.0.1:1", UnavailableError, "Connection refused"),
        ("http://127.0.0.1:8265", ConfigError, "expected host:port"),
        ("127.0.0.1", ConfigError, "expected host:port"),
        ("127.0.0.1:99999", ConfigError, "expected host:port"),
    ],
)
def test_a_wrong_ray_address_is_told_before_ray_tries_it_for_minutes(home, monkeypatch, address, error, message):
    import ray

    tried = []
    monkeypatch.setattr(ray, "init", lambda **options: tried.append(options))
    settings = Settings.from_env({"PEDRO_HOME": str(home), "RAY_ADDRESS": address})
    with pytest.raises(error, match=message):
        cluster.connect(settings)
    assert not tried


STRANGER = """
import socket
from pedro import cluster
from pedro.config import Settings, holds_secret, without_password
from pedro.errors import UnavailableError
cluster.CONNECT_TIMEOUT_S = 1
with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    try:
        cluster.connect(Settings.from_env({"RAY_ADDRESS": address}))
    except UnavailableError as error:
        print(error.message)
"""


def test_what_listens_but_is_no_ray_is_not_waited_for(home):
    ended = subprocess.run([sys.executable, "-c", STRANGER], cwd=home, capture_output=True, text=True, timeout=300)
    assert "no Ray cluster answers at 127.0.0.1" in ended.stdout
    assert "(TimeoutError)" in ended.stdout
    assert ended.returncode == 0


@pytest.mark.slow
def test_submit_and_serve_run_on_a_head_and_a_worker_and_a_killed_gateway_or_proxy_costs_no_answer(home):
    """Each node has one CPU and each training worker wants one, so one worker runs on each node.

    Both nodes are on this machine, and their proxies share the server's port, among which the kernel divides
    connections: it stands for the load balancer that is before several hosts.
    """
    (home / "token").write_text("f" * 64)
    (home / "spec.yaml").write_text(SPEC)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token"), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
    env |= {"PEDRO_HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    gcs, dashboard, *agents = (cluster.free_port() for _ in range(4))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
    head = [*ray, "--head", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    nodes = [_start([*head, f"--dashboard-agent-listen-port={agents[0]}"], env, home / "head.log")]
    try:
        address = _address(home / "head.log", gcs)
        worker = [*ray, f"--address={address}", f"--dashboard-agent-listen-port={agents[1]}"]
        nodes.append(_start(worker, env, home / "worker.log"))
        _wait_for(home / "worker.log", "Ray runtime started")
        env["RAY_ADDRESS"] = address

        reply = _run(["submit", str(home / "spec.yaml"), "--wait", "--json"], env)
        result = json.loads(reply.splitlines()[-1])
        assert result["model"] == "acme.two-nodes:1"
        assert result["alias"] == "champion"

        serve = ["serve", "--port", "0", "--gateways", "3", "--detach", "--json"]
        served = json.loads(_run(serve, env).splitlines()[-1])
        key = json.loads(_run(["keys", "create", "acme", "--json"], env))["secret"]
        answer = _run(["chat", "acme.two-nodes", "play some jazz", "--json"], env | {"PEDRO_API_KEY": key})
        assert json.loads(answer)["model"] == "acme.two-nodes"
        assert served["url"].startswith("http://127.0.0.1:")

        gateways = _processes(home, "ServeReplica:pedro:gateway")
        assert {os.getsid(gateway.pid) for gateway in gateways} == {nodes[1].pid}, "one is on the head"
        _run(["tenants", "set", "acme", "--requests-per-minute", "100000", "--tokens-per-day", "10000000"], env)
        with SteadyClients(served["url"], key, "acme.two-nodes") as clients:
            clients.go_on(64)
            gateways[0].kill()
            clients.go_on(64)
            proxies = _processes(home, "ProxyActor")
            assert len(proxies) == 2
            proxies[-1].kill()
            clients.go_on(64)
        assert not clients.failures
        assert not clients.wrong
        _wait_until(lambda: len(_processes(home, "ServeReplica:pedro:gateway")) == 3)
        _wait_until(lambda: len(_processes(home, "ProxyActor")) == 2)
        reply = httpx.post(
            f"{served['url']}/v1/completions",
            json={"model": "acme.two-nodes", "prompt": "play", "max_tokens": 1},
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) <= 10_000_000 - 48 * len(clients.answers) * 0.9
        assert json.loads(_run(["down", "--json"], env)) == {"server": True, "head": False}
    finally:
        for node in reversed(nodes):
            node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with contextlib.suppress(ProcessLookupError):  # what the node left of its own session
                os.killpg(node.pid, signal.SIGKILL)
            node.wait(10)


def _processes(home, title):
    """Ray's processes of that title on a cluster of this test."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()) and process.environ().get("PEDRO_HOME") == str(home):
                found.append(process)
    return found


def _wait_until(condition, timeout_s=300):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def _start(command, env, log):
    with log.open("wb") as out:
        return subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)


def _wait_for(log, text, timeout_s=600):
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


def _address(log, port):
    _wait_for(log, "Ray runtime started")
    found = re.search(r"Local node IP: (\S+)", re.sub(r"\x1b\[[0-9;]*m", "", log.read_text()))
    assert found, log.read_text()[-2000:]
    return f"{found[1]}:{port}"


def _run(arguments, env):
    done = subprocess.run([*PEDRO, *arguments], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout
