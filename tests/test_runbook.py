"""docs/runbook.md, the alerts and Grafana's dashboard name metrics, labels, messages and commands that there are."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from docs_pages import ROOT, blocks, prose
from prometheus_client.parser import text_string_to_metric_families
from test_serving_metrics import STATS, ended
from typer.main import get_command

from pedro.cli import app
from pedro.config import Settings
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.openapi_routes import ROUTES
from pedro.serving.failover import VersionFaults
from pedro.serving.metrics import ReplicaMetrics, merged
from pedro.sizes import SizeGauges
from pedro.store import Store

RUNBOOK = ROOT / "docs" / "runbook.md"
MONITORING = ROOT / "k8s" / "components" / "monitoring"
INCIDENT = re.compile(r"^## (\d+)\. (.+)$", re.MULTILINE)
PARTS = ("**Seen.**", "**Why.**", "**Do.**", "**Over** when")
COMMANDS = get_command(app)
METRIC = re.compile(r"\bpedro_[a-z_]+\b")
SELECTED = re.compile(r"\b(pedro_[a-z_]+)\{([^}]*)\}")
OURS = {"job", "le"}  # labels that Prometheus gives
ALERTS = "test_alerts.py::test_an_alert_fires_in_its_incident_and_no_other_does"
REPRODUCED = {
    1: (ALERTS, "test_serving_supervision.py::test_a_server_whose_head_is_killed_is_started_again"),
    2: (ALERTS, "test_serving_http.py::test_a_replica_killed_mid_answer_is_replaced_and_the_client_sees_no_seam"),
    3: (ALERTS, "test_gateway_edge.py::test_an_unexpected_error_is_a_500_without_internal_text"),
    4: (ALERTS, "test_serving_server.py::test_a_full_queue_is_a_503_that_says_when_to_come_back"),
    5: (ALERTS, "test_gateway_quotas.py::test_a_tenants_full_queue_is_a_429_and_the_servers_a_503"),
    6: (ALERTS, "test_serving_operators.py::test_a_champion_that_cannot_be_loaded_leaves_the_last_good_version_on"),
    7: ("test_serving_failover.py::test_a_request_that_kills_replicas_is_issued_twice_at_most",),
    8: (ALERTS, "test_serving_operators.py::test_pins_beyond_the_budget_are_refused_with_the_numbers"),
    9: (ALERTS, "test_bench_failures.py::test_a_small_run_keeps_every_promise"),
    10: (
        "test_store_migrations.py::test_a_file_upgrades_itself_when_it_is_opened_and_a_server_says_how",
        "test_store_migrations.py::test_a_schema_of_a_newer_release_is_refused_and_left_alone",
    ),
    11: (
        "test_alerts.py::test_what_is_kept_is_told_of_when_it_will_have_doubled_in_a_week",
        "test_files.py::test_a_full_disk_is_told_without_a_word_of_the_host_and_leaves_nothing",
    ),
    12: ("test_registry_promotion.py::test_mlflow_shows_each_move_and_is_not_waited_for",),
    13: ("test_training_queue.py::test_a_lost_driver_is_started_again_and_given_up_in_the_end",),
    14: (ALERTS, "test_gateway_webhooks.py::test_after_a_day_an_event_is_given_up_and_the_endpoint_says_so"),
    15: (
        "test_gateway_keys.py::test_a_revoked_key_is_refused_by_every_gateway_when_the_feed_is_next_due",
    ),
}  # fmt: skip
"""What brings each incident about, by how its name begins; `make chaos` brings several about at once."""


def alerts():
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def expressions():
    board = json.loads((MONITORING / "pedro.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    yield from (rule["expr"] for rule in alerts().values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every sample that a server exports, with its labels: a gateway's with all its services, and a replica's."""
    folder = tmp_path_factory.mktemp("metrics")
    store = Store(f"sqlite:///{folder}/pedro.db")
    settings = GatewaySettings(storage=f"{folder}/storage", webhook_key_file=folder / "key")
    gateway = create_app(lambda: pytest.fail("no backend is asked"), store, settings).state.metrics
    gateway.opened()
    gateway.answered({"method": "GET", "state": {}}, 200, 0.1)
    replica = ReplicaMetrics("r1", "stories", lambda: STATS)
    replica.finished(None, ended())
    kept = SizeGauges(Settings.from_env({"PEDRO_HOME": str(folder)}))
    kept.refresh()
    text = gateway.text() + merged([replica.text(), VersionFaults().metrics(), kept.text()])
    store.close()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", list(expressions()), ids=lambda text: (METRIC.findall(text) or ["up"])[0])
def test_alerts_and_graphs_ask_for_figures_and_labels_that_there_are(exported, expression):
    for name in METRIC.findall(expression):
        assert name in exported, f"nobody exports {name}"
    selected = SELECTED.findall(expression)
    assert len(selected) == len(METRIC.findall(expression)), "each figure is that of the job pedro"
    for name, selectors in selected:
        labels = set(re.findall(r"(\w+)[=!]", selectors))
        assert "job" in labels
        assert labels - OURS <= exported[name], f"{name} has no label {sorted(labels - OURS - exported[name])}"
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
    known = set().union(*(exported[name] for name in METRIC.findall(expression))) | OURS
    assert grouped <= known
    assert expression.count("(") == expression.count(")")


def test_every_alert_has_a_severity_and_says_what_it_sees():
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"].keys() == {"summary"}, f"{name}: a comma divides what is not quoted"
        assert rule["annotations"]["summary"].endswith("."), name


def incidents():
    text = RUNBOOK.read_text()
    starts = [*INCIDENT.finditer(text)]
    ends = [*(found.start() for found in starts[1:]), len(text)]
    return {found[0].removeprefix("## "): text[found.end() : end] for found, end in zip(starts, ends, strict=True)}


def test_there_are_fifteen_incidents_and_each_says_what_is_seen_why_what_to_do_and_when_it_is_over():
    assert [int(title.partition(".")[0]) for title in incidents()] == list(range(1, 16))
    for title, text in incidents().items():
        places = [text.find(part) for part in PARTS]
        assert -1 not in places, title
        assert places == sorted(places), title


def test_every_incident_is_brought_about_by_a_test():
    assert sorted(REPRODUCED) == [int(title.partition(".")[0]) for title in incidents()]
    for names in REPRODUCED.values():
        for file, _, name in (each.partition("::") for each in names):
            assert f"\ndef {name}" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"


def test_every_alert_is_one_of_the_runbook_and_no_other_is():
    named = re.findall(r"`(Pedro[A-Z]\w+)`", "".join(incidents().values()))
    assert sorted(named) == sorted(alerts()), "each in one section"


def test_every_figure_in_the_runbook_is_one_that_is_exported(exported):
    names = set(METRIC.findall(prose(RUNBOOK)))
    histograms = {name.removesuffix("_bucket") for name in exported if name.endswith("_bucket")}
    assert names
    assert names <= exported.keys() | histograms


def words():
    """Everything of the runbook in backticks, and the lines of its blocks."""
    yield from re.findall(r"`([^`]+)`", prose(RUNBOOK))
    for block in blocks(RUNBOOK):
        yield from (line.partition("#")[0].strip() for line in block.text.splitlines())


@pytest.mark.parametrize("line", sorted({word for word in words() if word.startswith("pedro ")}))
def test_every_command_in_the_runbook_is_one_of_pedros(line):
    command, rest = COMMANDS, line.split()[1:]
    while hasattr(command, "commands"):
        assert rest, f"{line}: which of {sorted(command.commands)}"
        assert rest[0] in command.commands, f"{line}: there is no {rest[0]}"
        command = command.commands[rest.pop(0)]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("-")} <= options, line
    takes = sum(parameter.param_type_name == "argument" for parameter in command.params)
    flags = {name for parameter in command.params if getattr(parameter, "is_flag", False) for name in parameter.opts}
    plain = [word for at, word in enumerate(rest) if not word.startswith("-") and not _is_value(rest, at, flags)]
    assert len(plain) <= takes, line


def _is_value(words, at, flags):
    return at > 0 and words[at - 1].startswith("-") and words[at - 1] not in flags


def test_every_option_setting_route_and_code_in_the_runbook_is_one_of_the_code():
    found = {word for word in words() if not word.startswith(("pedro ", "kubectl ", "grep "))}
    (serve,) = [command for name, command in COMMANDS.commands.items() if name == "serve"]
    options = {name for parameter in serve.params for name in parameter.opts}
    assert {word for word in found if word.startswith("--")} - {"--older-than 7d"} <= options
    settings = {word for word in found if re.fullmatch(r"PEDRO_[A-Z_]+", word)}
    code = "\n".join(path.read_text() for path in (ROOT / "platform").rglob("*.py"))
    assert settings
    assert not {name for name in settings if name not in code and not _kept(name, code)}
    routes = {word for word in found if re.match(r"(GET|POST) /", word)}
    assert routes <= ROUTES.keys()
    for code_word in {word for word in found if re.fullmatch(r"[a-z]+(_[a-z]+)+", word)} - {"session_latest"}:
        if not code_word.startswith("pedro_"):
            assert f'"{code_word}"' in code, f"no error has the code {code_word}"


def _kept(name, code):
    return name.startswith("PEDRO_KEEP_") and name.removeprefix("PEDRO_KEEP_").removesuffix("_DAYS").lower() in code
