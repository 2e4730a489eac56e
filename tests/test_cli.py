"""The `pedro` command as people and programs use it: help, results, errors, exit codes."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import gateway_server
import pytest
import typer
from cli_commands import command_runner
from gateway_backend import BACKBONE
from safetensors.torch import load_file
from serving_adapters import OTHER_BACKBONE, make_adapter, register, settings_at
from store_moves import fill

from pedro import cli
from pedro.config import SERVER_RECORD, Settings
from pedro.methods.adapter_files import save_adapter
from pedro.registry import Registry
from pedro.store import LIMITS, Store, Usage

ASSETS = Path(cli.__file__).parents[1] / "assets"
TRAIN = ASSETS / "demo" / "acme" / "train.jsonl"
PEDRO = [sys.executable, "-m", "pedro.cli"]
HELP_OF_EACH = """
import json, os, sys
import typer
from pedro import cli

pedro = typer.main.get_command(cli.app)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
try:
    pedro(["keys", "--help"], prog_name="pedro")  # imports what all would
except SystemExit:
    sys.stdout.flush()


def told(words):
    try:
        pedro([*words, "--help"], prog_name="pedro")
    except SystemExit as end:
        sys.stdout.flush()
        return end.code or 0


for number, words in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:  # each command is the first that its process runs
        os.dup2(os.open(str(number), os.O_CREAT | os.O_WRONLY), 1)
        os._exit(told(words))  # taking Python down costs ten times what the help does
    assert os.wait()[1] == 0, words
"""


def commands() -> list[tuple[str, ...]]:
    """Every command and group, as words."""

    def walk(command, words):
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, (*words, name))

    return list(walk(typer.main.get_command(cli.app), ()))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A PEDRO_HOME that holds acme.faq, versions 1 and 2 (champion)."""
    home = tmp_path_factory.mktemp("home")
    registry = Registry.open(settings_at(home))
    for seed in (1, 2):
        make_adapter(home / "made" / str(seed), seed, "completion")
        register(registry, home / "made" / str(seed), "acme.faq")
    return home


@pytest.fixture
def pedro(home, monkeypatch, capfd):
    """Run a command in this process; gives exit status, standard output and standard error."""
    for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "RAY_ADDRESS", "PEDRO_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEDRO_HOME", str(home))
    environment = dict(os.environ)
    yield command_runner(monkeypatch, capfd)
    os.environ.clear()  # connecting to a cluster sets what Ray's processes must agree on
    os.environ.update(environment)


def one_error(result, *parts):
    """Assert exit status 1 and that standard error ends in one message that holds `parts`; gives the message."""
    status, _, err = result
    assert status == 1, err
    message = err.partition("error: ")[2]
    assert message
    for part in parts:
        assert part in message
    return message


def one_value(result, status=0):
    """Assert the exit status and that standard output is one JSON value; gives the value."""
    assert result[0] == status, result[2]
    return json.loads(result[1])


def test_help_answers_for_every_command_and_group(tmp_path):
    script = [sys.executable, "-c", HELP_OF_EACH, json.dumps(commands())]
    run = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    for number, words in enumerate(commands()):
        assert (tmp_path / str(number)).read_text().startswith(f"Usage: {' '.join(['pedro', *words])} ")


def test_the_module_answers_as_the_command_does():
    run = subprocess.run([*PEDRO, "keys", "list", "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Usage: python -m pedro.cli keys list ")


def test_help_costs_under_half_a_second_of_cpu():
    def cost():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PEDRO, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(cost() < 0.5 for _ in range(3))


def test_the_version_is_the_packages(pedro):
    import pedro as package

    assert pedro("--version")[:2] == (0, f"{package.__version__}\n")


def test_a_wrong_option_or_command_is_a_usage_error(pedro):
    for words in (("keys", "create"), ("nothing",), ("serve", "--port", "99999"), ("keys", "list", "--nope")):
        status, _, err = pedro(*words)
        assert status == 2
        assert "Usage:" in err


# keys


def test_a_key_is_made_shown_once_listed_without_its_secret_and_revoked(pedro, tmp_path):
    home = {"PEDRO_HOME": tmp_path}
    made = one_value(pedro("keys", "create", "acme", "--scope", "infer", "--name", "web", "--json", **home))
    assert (made["tenant"], made["scopes"], made["secret"][:9]) == ("acme", ["infer"], "sk-pedro-")
    (listed,) = one_value(pedro("keys", "list", "--json"))
    assert (listed["id"], listed["revoked"]) == (made["id"], None)
    assert made["secret"] not in json.dumps(listed)
    assert one_value(pedro("keys", "revoke", made["id"], "--json"))["revoked"]
    status, out, _ = pedro("keys", "list")
    assert (status, "revoked" in out) == (0, True)


def test_quotas_of_tenants_and_keys_are_set_shown_and_taken_away(pedro, tmp_path):
    made = one_value(pedro("keys", "create", "acme", "--requests-per-minute", 5, "--json", PEDRO_HOME=tmp_path))
    none = dict.fromkeys(LIMITS)
    assert made["quota"] == {**none, "requests_per_minute": 5}
    _, out, _ = pedro("tenants", "quota", "acme", "--requests-per-minute", 600, "--tokens-per-minute", 100_000)
    assert out == "acme: 600 requests/min, 100,000 tokens/min\n"
    _, out, _ = pedro("tenants", "set", "acme", "--requests-per-minute", 0, "--tokens-per-month", 2_000_000_000_000)
    assert out == "acme: no limit of requests, 100,000 tokens/min, 2,000,000,000,000 tokens/month\n"
    changed = one_value(pedro("keys", "quota", made["id"], "--tokens-per-minute", 70, "--json"))
    assert changed == {"key": made["id"], **none, "requests_per_minute": 5, "tokens_per_minute": 70}
    assert one_value(pedro("tenants", "list", "--json")) == [
        {"tenant": "acme", **none, "tokens_per_minute": 100_000, "tokens_per_month": 2_000_000_000_000}
    ]
    assert "100,000" in pedro("tenants", "list")[1]
    _, out, _ = pedro("tenants", "set", "globex", "--training-hours-per-day", 5, "--training-hours-per-month", 60)
    assert out.endswith("5 training hours/day, 60 training hours/month\n")
    assert "70 tokens/min" in pedro("keys", "show", made["id"])[1]
    one_error(pedro("keys", "quota", "key_none"), "key_none")
    assert "has no key yet" in pedro("tenants", "quota", "acmee", "--requests-per-minute", 1)[2]


def test_a_key_is_made_for_some_adapters_and_a_time_shown_whole_and_rotated(pedro, tmp_path):
    home = {"PEDRO_HOME": tmp_path}
    fill(Store(settings_at(tmp_path).database_url), 1, "acme.faq")
    made = one_value(
        pedro("keys", "create", "acme", "--expires", "90d", "--adapters", "faq, acme.faq", "--json", **home)
    )
    assert (made["adapters"], made["state"]) == (["faq"], "active")
    assert made["expires"] == pytest.approx(made["created"] + 90 * 86_400, abs=60)
    status, out, err = pedro("keys", "rotate", made["id"], "--overlap", "2h")
    assert (status, out.count("\n"), out[:9]) == (0, 1, "sk-pedro-")
    assert f"replaces {made['id']}, which ends at 20" in err
    old, new = one_value(pedro("keys", "list", "--json"))
    assert (new["replaces"], new["adapters"]) == (made["id"], ["faq"])
    assert old["expires"] < old["created"] + 3 * 3600
    assert old == one_value(pedro("keys", "show", made["id"], "--json"))
    assert "never" in pedro("keys", "show", new["id"])[1]
    assert out.strip() not in json.dumps([old, new])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("create", "acme", "--expires", "2020-01-31"), ("expires", "over")),
        (("create", "acme", "--expires", "soon"), ("expires", "'soon'", "90d")),
        (("create", "acme", "--adapters", "nope"), ("adapters", "'nope'", "acme has no adapter")),
        (("create", "acme", "--adapters", "globex.faq"), ("adapters", "'globex.faq'")),
        (("create", "acme", "--adapters", ","), ("adapters", "none")),
        (("create", "acme", "--name", "a\x1b[2Jb"), ("name", "printable")),
        (("rotate", "key_none"), ("key_none",)),
        (("rotate", "key_none", "--overlap", "-1h"), ("overlap", "24h")),
        (("rotate", "key_none", "--overlap", "99w"), ("overlap", "90 days")),
        (("show", "key_none"), ("key_none",)),
    ],
)
def test_a_wrong_word_about_a_key_is_one_clear_line(pedro, words, parts):
    assert one_error(pedro("keys", *words), *parts).count("\n") == 1


def test_only_the_secret_is_on_standard_output_so_that_it_can_be_substituted(pedro, tmp_path):
    status, out, err = pedro("keys", "create", "acme", PEDRO_HOME=tmp_path)
    assert (status, out.count("\n"), out[:9]) == (0, 1, "sk-pedro-")
    assert "not shown again" in err


def test_a_bad_tenant_scope_or_key_id_is_told_with_its_value(pedro):
    one_error(pedro("keys", "create", "../acme"), "tenant", "'../acme'", "a-z")
    one_error(pedro("keys", "create", "acme", "--scope", "root"), "root", "infer")
    one_error(pedro("keys", "revoke", "key_none"), "key_none")


def test_an_error_with_json_is_one_json_value_too(pedro):
    result = pedro("keys", "create", "Bad Name", "--json")
    assert one_value(result, status=1)["error"]["param"] == "tenant"
    one_error(result, "Bad Name")


# data


def test_a_good_file_is_usable(pedro):
    report = one_value(pedro("data", "check", TRAIN, "--show", "2", "--json"))
    assert (report["usable"], report["error_count"], len(report["masks"])) == (True, 0, 2)
    status, out, _ = pedro("data", "check", TRAIN, "--show", "1")
    assert (status, "usable" in out) == (0, True)


def test_bad_lines_are_named_and_the_exit_status_says_so(pedro, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\nnot json\n')
    report = one_value(pedro("data", "check", file, "--json"), status=1)
    assert [error["line"] for error in report["errors"]] == [2, 3]
    status, out, _ = pedro("data", "check", file)
    assert (status, "line 2: prompt" in out) == (1, True)


def test_an_empty_file_is_not_usable(pedro, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert one_value(pedro("data", "check", tmp_path / "empty.jsonl", "--json"), status=1)["usable"] is False
    status, out, _ = pedro("data", "check", tmp_path / "empty.jsonl")
    assert (status, "no examples" in out) == (1, True)


def test_a_missing_file_or_a_directory_is_told_by_its_path(pedro, tmp_path):
    one_error(pedro("data", "check", tmp_path / "nothere.jsonl"), "nothere.jsonl")
    one_error(pedro("data", "check", tmp_path), str(tmp_path))
    one_error(pedro("data", "check", TRAIN, "--validation", tmp_path / "nothere.jsonl"), "nothere.jsonl")


@pytest.mark.parametrize("name", ["./nothere", "/nothere/model", "nothere", "a/b/c"])
def test_a_backbone_that_does_not_exist_is_told_with_those_that_do(pedro, name):
    one_error(pedro("data", "check", TRAIN, "--backbone", name), name, "stories260K")


def test_a_directory_without_a_backbone_is_told_as_such(pedro, tmp_path):
    one_error(pedro("data", "check", TRAIN, "--backbone", tmp_path), str(tmp_path), "safetensors")


# adapters


def test_adapters_are_listed_and_shown(pedro):
    (listed,) = one_value(pedro("adapters", "list", "--json"))
    assert (listed["model"], listed["aliases"]) == ("acme.faq", {"champion": 2, "previous": 1})
    shown = one_value(pedro("adapters", "show", "acme.faq", "--json"))
    assert [version["version"] for version in shown] == [1, 2]
    assert one_value(pedro("adapters", "show", "acme.faq@previous", "--json"))[0]["version"] == 1
    assert one_value(pedro("adapters", "list", "globex", "--json")) == []
    status, out, _ = pedro("adapters", "list", "acme")
    assert (status, "acme.faq" in out, "v2" in out) == (0, True, True)
    assert pedro("adapters", "show", "acme.faq")[0] == 0


def test_promote_and_roll_back_move_the_champion(pedro):
    assert one_value(pedro("adapters", "promote", "acme.faq", "1", "--json"))["aliases"] == ["champion"]
    assert one_value(pedro("adapters", "rollback", "acme.faq", "--json"))["version"] == 2


@pytest.mark.parametrize(
    "words",
    [
        ("show", "acme.nothere"),
        ("show", "acme.faq:9"),
        ("show", "acme.faq@nothere"),
        ("promote", "acme.faq", "9"),
        ("promote", "acme.nothere", "1"),
        ("rollback", "acme.nothere"),
        ("delete", "acme.nothere", "--yes"),
        ("delete", "acme.faq:9", "--yes"),
        ("export", "acme.nothere", "out"),
    ],
    ids=" ".join,
)
def test_an_unknown_adapter_is_told_by_name(pedro, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_error(pedro("adapters", *words), words[1].partition(":")[0].partition("@")[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["acme", "acme.", "a.b.c", "../../etc", "acme.x'y", "ACME.faq", "acme.faq:", ""])
def test_a_bad_adapter_name_is_told(pedro, name):
    one_error(pedro("adapters", "show", name))


def test_a_version_that_could_not_be_served_is_not_promoted_nor_rolled_back_to(pedro, home, tmp_path):
    make_adapter(tmp_path / "alien", 3, "completion", digest=OTHER_BACKBONE)
    registry = Registry.open(Settings.from_env({"PEDRO_HOME": str(home)}))
    register(registry, tmp_path / "alien", "globex.alien", promote=False)
    one_error(pedro("adapters", "promote", "globex.alien", "1"), OTHER_BACKBONE, "trained on")
    assert registry.catalog()["globex.alien"].aliases == {}
    registry.promote("globex.alien", 1)
    register(registry, home / "made" / "1", "globex.alien")
    one_error(pedro("adapters", "rollback", "globex.alien"), OTHER_BACKBONE, "trained on")
    assert registry.catalog()["globex.alien"].aliases == {"champion": 2, "previous": 1}
    registry.delete("globex.alien")


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_deleting_an_adapter_says_what_is_served_and_wants_a_yes(pedro, how):
    told = one_error(pedro("adapters", "delete", "acme.faq", *how), "with all its 2 versions", "give --yes")
    assert "\n" not in told.strip()
    assert "version 2 is its champion and is served" in pedro("adapters", "delete", "acme.faq", *how)[2]
    assert [row["version"] for row in one_value(pedro("adapters", "show", "acme.faq", "--json"))] == [1, 2]


def test_the_champion_alone_cannot_be_deleted(pedro):
    one_error(pedro("adapters", "delete", "acme.faq:2", "--yes"), "champion", "promote")


def test_export_and_import_keep_the_digest(pedro, tmp_path):
    exported = one_value(pedro("adapters", "export", "acme.faq:1", tmp_path / "out", "--json"))
    imported = one_value(pedro("adapters", "import", "globex.copy", tmp_path / "out", "--json"))
    assert imported["digest"] == exported["digest"]
    assert (imported["version"], imported["aliases"]) == (1, ["candidate"])
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    again = one_value(pedro("adapters", "export", "globex.copy@candidate", tmp_path / "again", "--json"))
    assert again["digest"] == exported["digest"]
    assert one_value(pedro("adapters", "delete", "globex.copy", "--yes", "--json"))["deleted"] == "globex.copy"


def test_an_export_never_writes_over_anything(pedro, tmp_path):
    one_error(pedro("adapters", "export", "acme.faq", tmp_path), str(tmp_path), "exists")


def test_only_a_whole_adapter_of_a_known_backbone_is_imported(pedro, home, tmp_path):
    good = home / "made" / "1"
    one_error(pedro("adapters", "import", "acme.new", tmp_path / "nothere"), "is not a directory")
    one_error(pedro("adapters", "import", "acme", good), "adapter")
    one_error(pedro("adapters", "import", "acme.a.b", good), "'acme.a.b'")
    one_error(pedro("adapters", "import", "acme.new:3", good), "'acme.new:3' names a version")
    damaged = shutil.copytree(good, tmp_path / "damaged")
    with (damaged / "adapter_model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    one_error(pedro("adapters", "import", "acme.new", damaged), "digest")
    pickled = shutil.copytree(good, tmp_path / "pickled")
    (pickled / "extra.bin").write_bytes(b"")
    one_error(pedro("adapters", "import", "acme.new", pickled), "pickle")
    make_adapter(tmp_path / "alien", 3, "completion", digest=OTHER_BACKBONE)
    one_error(pedro("adapters", "import", "acme.new", tmp_path / "alien"), OTHER_BACKBONE)
    assert [row["model"] for row in one_value(pedro("adapters", "list", "--json"))] == ["acme.faq"]


def test_an_adapter_without_a_prompt_format_is_not_imported(pedro, tmp_path):
    """It could be registered and promoted, and then every chat with it would fail."""
    from serving_adapters import backbone, tuned_model

    manifest = {
        "backbone": {"id": "stories260K", "digest": backbone().digest},
        "method": {"name": "pedro", "options": {}},
    }
    save_adapter(tuned_model(5), tmp_path / "plain", manifest)
    one_error(pedro("adapters", "import", "acme.new", tmp_path / "plain"), "prompt_format")


def test_eval_of_an_unknown_adapter_or_file_is_told(pedro, tmp_path):
    one_error(pedro("eval", "acme.nothere", "--data", TRAIN), "acme.nothere")
    one_error(pedro("eval", "acme.faq", "--data", tmp_path / "nothere.jsonl"), "nothere.jsonl")


def test_eval_takes_the_names_of_columns(pedro, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What colour is it?", "answer": "red"}\n')
    one_error(pedro("eval", "acme.faq", "--data", rows), "--fields")
    named = ("--fields", "prompt=question,completion=answer")
    assert one_value(pedro("eval", "acme.faq", "--data", rows, *named, "--json"))["rows"] == 1


# usage


@pytest.fixture
def used(tmp_path, monkeypatch):
    """A ledger with two tenants, in a home of its own."""
    url = f"sqlite:///{tmp_path}/pedro.db"
    store = Store(url)
    rows = [
        Usage("2026-03-30", "acme", "acme.faq", "key_1", 1, 1000, 0, 50),
        Usage("2026-03-31", "acme", "@sum(a1)", "key_1", 2, 20, 0, 6, 700, 1.5),
        Usage("2026-03-31", "globex", "globex.faq", "key_3", 4, 40, 0, 8),
    ]
    store.add_usage(rows, "test", 1)
    store.close()
    return {"PEDRO_DATABASE_URL": url}


def test_usage_is_a_table_with_a_total_json_and_csv_that_no_spreadsheet_computes(pedro, used, tmp_path):
    status, out, _ = pedro("usage", **used)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines() if line.strip() and "─" not in line] == [
        "tenant", "acme", "acme", "globex", "total",
    ]  # fmt: skip
    assert "1,060" in out.splitlines()[-2]
    march = ("--tenant", "acme", "--from", "2026-03-31", "--to", "2026-03-31")
    value = one_value(pedro("usage", *march, "--by", "day,key", "--json", **used))
    assert [(row["day"], row["key_id"], row["requests"]) for row in value["usage"]] == [("2026-03-31", "key_1", 2)]
    assert value["total"]["training_tokens"] == 700
    assert one_value(pedro("usage", "--by", "", "--json", **used))["usage"] == [value["total"] | {
        "requests": 7, "prompt_tokens": 1060, "completion_tokens": 64,
    }]  # fmt: skip
    status, out, _ = pedro("usage", "--csv", "-", "--by", "model", **used)
    assert out.splitlines()[0].startswith("model,requests,prompt_tokens,cached_tokens,completion_tokens")
    assert out.splitlines()[1].startswith("'@sum(a1),2,20,0,6")
    pedro("usage", "--csv", tmp_path / "march.csv", **used)
    assert len((tmp_path / "march.csv").read_text().splitlines()) == 4
    assert "nothing was used" in pedro("usage", "--tenant", "nobody", **used)[1]


def test_usage_says_what_is_wrong_with_a_question(pedro, used):
    one_error(pedro("usage", "--from", "march", **used), "--from", "'march'", "2026-03-31")
    one_error(pedro("usage", "--from", "2026-04-01", "--to", "2026-03-01", **used), "--from", "--to", "exchange")
    one_error(pedro("usage", "--by", "week", **used), "--by", "'week'", "tenant, model, key, day")
    one_error(pedro("usage", "--csv", "-", "--json", **used), "--csv", "--json")
    one_error(pedro("usage", "--csv", "/nowhere/march.csv", **used), "/nowhere/march.csv")


# the server, which does not run here


def test_chat_without_a_key_or_a_server_says_what_to_do(pedro):
    one_error(pedro("chat", "acme.faq", "hello"), "PEDRO_API_KEY", "pedro keys create")
    one_error(pedro("chat", "acme.faq", "hello", "--key", "k"), "pedro serve", "--url")
    one_error(pedro("chat", "acme.faq", "hello", "--key", "k", "--url", "http://127.0.0.1:9"), "127.0.0.1:9")
    one_error(pedro("chat", "acme.faq", "hello", "--key", "k", "--url", "nonsense"), "nonsense")


def test_the_backbone_of_the_local_server_answers_without_a_key(pedro, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    with gateway_server.serve(tmp_path) as gateway:
        (tmp_path / SERVER_RECORD).write_text(json.dumps({"url": gateway.url, "backbone": BACKBONE}))
        assert pedro("chat", BACKBONE, "so it is", "--max-tokens", "2")[:2] == (0, "so it \n")
        one_error(pedro("chat", "acme.support", "hello"), "PEDRO_API_KEY")
        one_error(pedro("chat", BACKBONE, "hello", "--url", gateway.url), "PEDRO_API_KEY")
        one_error(pedro("chat", BACKBONE, "overload"), "queue is full")
        keys = gateway.store.list_keys()
        assert [key.tenant for key in keys] == ["pedro-chat"] * 2
        assert all(key.revoked for key in keys), "also where the answer was an error"


def test_down_where_nothing_runs_is_no_error(pedro):
    assert one_value(pedro("down", "--json")) == {"server": False, "head": False}


def test_serve_refuses_wrong_settings_before_anything_starts(pedro, home):
    one_error(pedro("serve", "--backbone", "nothere", "--port", "0"), "nothere", "stories260K")
    options = ("--dtype", "int3", "--replicas", "0", "--adapter-budget-mb", "0")
    one_error(pedro("serve", *options), "dtype", "int3", "replicas", "adapter_budget_mb")
    for host in ("203.0.113.1", "[2001:db8::1]", ""):
        one_error(pedro("serve", "--host", host, "--port", "0"), "host", "no address of this machine", "::")
    assert not (home / "ray").exists()


def test_jobs_of_an_unknown_or_lost_cluster_are_told(pedro):
    assert one_value(pedro("jobs", "list", "--json")) == []
    one_error(pedro("jobs", "logs", "ftjob-none"))
    for command in ("stop", "cancel", "show"):
        one_error(pedro("jobs", command, "ftjob-none"))


def test_a_spec_with_mistakes_is_told_with_all_of_them(pedro, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("tenant: acme\nadapter: A.B\ndata: {train: nothere.jsonl}\ntraining: {lr: -1, epoch: 3}\n")
    err = one_error(pedro("submit", spec, "--dry-run"), "training.lr", "training.epoch", "epochs")
    assert "A.B" in err
    one_error(pedro("submit", tmp_path / "nothere.yaml"), "nothere.yaml")


# the machine


def test_doctor_prints_its_checks_and_one_json_value(pedro):
    result = pedro("doctor", "--json")
    value = one_value(result, status=result[0])
    assert {"python", "packages", "registry", "database", "cluster", "disk"} <= {c["name"] for c in value["checks"]}
    assert value["ok"] is (result[0] == 0)
    assert all(check["remedy"] for check in value["checks"] if check["status"] != "ok")


def deep_checks(result, status):
    return {check["name"]: check for check in one_value(result, status=status)["checks"]}


def test_a_deep_look_finds_everything_whole_and_leaves_nothing(pedro, home):
    checks = deep_checks(pedro("doctor", "--deep", "--json"), 0)
    assert {checks[name]["status"] for name in ("storage", "secrets", "versions", "server")} == {"ok"}
    assert checks["versions"]["found"].startswith("the files of 2 ")
    assert checks["server"]["found"] == "none runs for this home"
    assert not list((home / "storage").glob(".gone-*"))


def test_a_deep_look_names_a_version_whose_files_were_changed(pedro, home, tmp_path):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    for weights in (copy / "artifacts").rglob("adapter_model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    (copy / "secrets" / "seal.key").chmod(0o644)
    checks = deep_checks(pedro("doctor", "--deep", "--json", PEDRO_HOME=copy), 1)
    assert checks["versions"]["status"] == "fail"
    assert "acme.faq:2: the stored files are not those that were registered" in checks["versions"]["found"]
    assert checks["versions"]["remedy"]
    assert "PEDRO_SEAL_KEY_FILE" in checks["secrets"]["found"]


def test_a_deep_look_tells_of_a_server_that_does_not_answer(pedro, home, tmp_path):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    (copy / "serve.json").write_text(json.dumps({"url": "http://127.0.0.1:9"}))
    checks = deep_checks(pedro("doctor", "--deep", "--json", PEDRO_HOME=copy), 1)
    assert (checks["server"]["status"], "does not answer" in checks["server"]["found"]) == ("fail", True)


def test_doctor_tells_of_a_home_that_cannot_be_written(pedro):
    result = pedro("doctor", "--json", PEDRO_HOME="/dev/null/home")
    failed = {check["name"] for check in one_value(result, status=1)["checks"] if check["status"] == "fail"}
    assert {"home", "registry", "database"} <= failed


@pytest.mark.parametrize(
    "words", [("keys", "list"), ("adapters", "list"), ("jobs", "list"), ("serve", "--port", "0")], ids=" ".join
)
def test_a_home_that_cannot_be_written_is_told_in_one_line(pedro, words):
    err = one_error(pedro(*words, PEDRO_HOME="/dev/null/home"), "/dev/null/home", "PEDRO_HOME")
    assert err.count("\n") == 1


def _can_mount() -> bool:
    probe = ["unshare", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs the right to mount a small disk")
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_broken(tmp_path):
    """On a disk of 200 kB; grown to 50 MB, the same commands work."""
    script = (
        'mount -t tmpfs -o size=200k none "$PEDRO_HOME"; for n in 1 2; do '
        '"$0" -m pedro.cli adapters list; echo "status $?" >&2; head -c 1M /dev/zero >"$PEDRO_HOME/fill" 2>/dev/null; '
        '"$0" -m pedro.cli keys create acme >/dev/null; echo "status $?" >&2; '
        'rm "$PEDRO_HOME/fill"; mount -o remount,size=50m "$PEDRO_HOME"; done'
    )
    run = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable],
        env={**os.environ, "PEDRO_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith(("error", "status", "Traceback"))]
    assert [line for line in lines if line.startswith("status")] == ["status 1", "status 1", "status 0", "status 0"]
    assert "full" in lines[0]
    assert "full" in lines[2]
    assert len(lines) == 6


def test_a_reader_that_has_had_enough_is_no_error(home):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PEDRO_HOME": str(home)}
    run = subprocess.run([*PEDRO, "keys", "list"], stdout=writing, stderr=subprocess.PIPE, env=environment, timeout=60)
    os.close(writing)
    assert (run.returncode, run.stderr) == (1, b"")


def test_control_characters_of_others_reach_no_terminal(capsys):
    from pedro.cli.output import fail, log, printable, table
    from pedro.errors import DataError

    evil = "a\x1b]0;owned\x07\x9b2J\u202eb\ud800\r\tü 漢\n"
    assert printable(evil) == "a\\x1b]0;owned\\x07\\x9b2J\\u202eb\\ud800\\r\tü 漢\n"
    log(evil)
    table(["name"], [[evil]])
    with pytest.raises(SystemExit):
        fail(DataError(evil))
    shown = "".join(capsys.readouterr())
    assert "owned" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x9b", "\u202e", "\ud800", "\r"}
