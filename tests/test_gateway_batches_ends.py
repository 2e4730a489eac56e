"""Batches that are cut off, held up or ended: each row is answered once, and what was answered is kept."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from gateway_backend import BACKBONE
from gateway_batches import (
    COMPLETIONS,
    EVEN,
    LONG,
    ODD,
    SCOPES,
    answers,
    begin,
    counts,
    ended,
    half_answered,
    row,
    until,
    upload,
)
from gateway_server import serve

from pedro.gateway import batch_runner, batch_work
from pedro.gateway.app import GatewaySettings

QUICK = GatewaySettings(batch_lease_s=1.0)  # so that a killed gateway's batches need not be waited for
WIDE = GatewaySettings(batch_lease_s=1.0, rows_of_batch=20, batch_rows=40)  # asks all rows at once
DAY_S = 24 * 3600.0


@pytest.fixture(autouse=True)
def _brisk(monkeypatch):
    monkeypatch.setattr(batch_work, "LONGEST_WAIT_S", 0.05)


@pytest.fixture
def wide(tmp_path):
    with serve(tmp_path, settings=WIDE) as running:
        yield running


def test_a_batch_that_is_cancelled_in_the_middle_keeps_what_was_answered(wide):
    client = wide.client(wide.key("acme", SCOPES))
    made = half_answered(wide, client)
    until(lambda: wide.backend.running == 10)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    done = ended(client, made)
    assert (done.status, counts(done)) == ("cancelled", (20, 10, 0))
    assert done.cancelling_at <= done.cancelled_at
    assert list(answers(client, done.output_file_id)) == ODD
    unasked = answers(client, done.error_file_id)
    assert list(unasked) == EVEN
    assert {(line["response"], line["error"]["code"]) for line in unasked.values()} == {(None, "batch_cancelled")}
    until(lambda: wide.backend.running == 0)
    assert client.batches.cancel(made.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(ended(client, begin(client, [row("a")])).id)


def test_a_batch_ends_with_its_window(wide):
    client = wide.client(wide.key("acme", SCOPES))
    made = half_answered(wide, client)
    waiting = begin(client, [row("late")])
    wide.app.state.batches.clock = lambda: made.created_at + DAY_S - 1.0
    time.sleep(1.0)
    assert client.batches.retrieve(made.id).status == "in_progress"
    wide.app.state.batches.clock = lambda: made.created_at + DAY_S + 60.0
    done = ended(client, made)
    assert (done.status, counts(done)) == ("expired", (20, 10, 0))
    assert done.expired_at >= done.expires_at
    assert list(answers(client, done.output_file_id)) == ODD
    unasked = answers(client, done.error_file_id)
    assert (list(unasked), {line["error"]["code"] for line in unasked.values()}) == (EVEN, {"batch_expired"})
    assert ended(client, waiting).status == "expired"  # one that had to wait for the other


def test_a_batch_goes_on_after_a_restart_and_answers_each_row_once(tmp_path):
    settings = replace(WIDE, batch_lease_s=3600.0)  # given up at the end, and so not waited for
    with serve(tmp_path, settings=settings) as gateway:
        key = gateway.key("acme", SCOPES)
        made = half_answered(gateway, gateway.client(key))
    assert gateway.backend.running == 0
    with serve(tmp_path, settings=settings) as gateway:
        client = gateway.client(key)
        done = ended(client, made)
        assert (done.status, counts(done)) == ("completed", (20, 20, 0))
        assert list(answers(client, done.output_file_id)) == [f"r{number}" for number in range(20)]
        assert sorted(call.prompt for call in gateway.backend.calls) == sorted(EVEN)


KILLED = """
import sys, threading
from dataclasses import replace
from pathlib import Path
from gateway_server import serve
from pedro.gateway.app import GatewaySettings
with serve(Path(sys.argv[1]), settings=GatewaySettings(batch_lease_s=1.0, rows_of_batch=20, batch_rows=40)) as gateway:
    gateway.backend.allowed = 2
    print(gateway.url, gateway.key("acme", ("infer", "train")), flush=True)
    threading.Event().wait()
"""


def test_a_batch_of_a_gateway_that_was_killed_is_gone_on_with_by_the_next(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    )
    try:
        url, key = process.stdout.readline().split()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        made = begin(client, [row(f"r{number}", 1 if number % 2 else LONG) for number in range(20)])
        until(lambda: counts(client.batches.retrieve(made.id))[1] == 10)
    finally:
        process.kill()
        process.wait()
    with serve(tmp_path, settings=QUICK) as gateway:
        client = gateway.client(key)
        done = ended(client, made)
        assert (done.status, counts(done)) == ("completed", (20, 20, 0))
        assert list(answers(client, done.output_file_id)) == [f"r{number}" for number in range(20)]
        assert sorted(call.prompt for call in gateway.backend.calls) == sorted(EVEN)


def test_a_batch_whose_file_is_gone_after_a_restart_fails_with_what_was_answered(tmp_path):
    with serve(tmp_path, settings=WIDE) as gateway:
        key = gateway.key("acme", SCOPES)
        made = half_answered(gateway, gateway.client(key))
        gateway.client(key).files.delete(made.input_file_id)
    with serve(tmp_path, settings=WIDE) as gateway:
        client = gateway.client(key)
        done = ended(client, made)
        assert (done.status, done.errors.data[0].code) == ("failed", "input_file_gone")
        assert list(answers(client, done.output_file_id)) == ODD


def test_a_batch_ends_with_its_key(wide):
    record, secret = wide.store.create_key("acme", SCOPES)
    made = half_answered(wide, wide.client(secret))
    wide.store.revoke_key(record.id)
    client = wide.client(wide.key("acme", SCOPES))
    done = ended(client, made)
    assert (done.status, done.errors.data[0].code) == ("cancelled", "invalid_api_key")
    assert list(answers(client, done.output_file_id)) == ODD


def test_rows_wait_for_a_quota_and_count_as_requests_of_it(wide):
    gateway = wide
    client = gateway.client(gateway.key("acme", SCOPES))
    watcher = gateway.client(gateway.key("acme", SCOPES))
    file_id = upload(client, [row(f"r{number}") for number in range(6)])
    gateway.store.set_quota(key_id=gateway.store.list_keys("acme")[0].id, requests_per_day=4)
    made = client.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
    until(lambda: counts(watcher.batches.retrieve(made.id))[1] == 3)  # the upload was before; its making was the first
    with pytest.raises(openai.RateLimitError):
        client.batches.retrieve(made.id)
    assert len(gateway.backend.calls) == 3
    gateway.store.set_quota(key_id=gateway.store.list_keys("acme")[0].id, requests_per_day=100)
    assert counts(ended(watcher, made)) == (6, 6, 0)
    assert len(gateway.backend.calls) == 6


def test_batches_that_wait_for_a_budget_keep_no_other_from_beginning(wide, monkeypatch):
    monkeypatch.setattr(batch_runner, "MOST", 1)
    monkeypatch.setattr(batch_work, "LONGEST_WAIT_S", 3600.0)
    poor, other = wide.client(wide.key("acme", SCOPES)), wide.client(wide.key("globex", SCOPES))
    watcher = wide.client(wide.key("acme", SCOPES))
    wide.store.set_quota(key_id=wide.store.list_keys("acme")[0].id, requests_per_day=4)
    made = begin(poor, [row(f"r{number}") for number in range(20)])
    until(lambda: any(active.work.only_waits for active in wide.app.state.batches._active.values()))
    done = ended(other, begin(other, [row("a")]))
    assert (done.status, counts(done)) == ("completed", (1, 1, 0))
    assert watcher.batches.retrieve(made.id).status == "in_progress"


def test_a_batch_whose_answers_are_too_large_for_the_database_fails_with_those_that_are_not(wide, monkeypatch):
    monkeypatch.setattr(batch_work, "MOST_ANSWERED", 2000)
    client = wide.client(wide.key("acme", SCOPES))
    done = ended(client, begin(client, [row(f"r{number}") for number in range(20)]))
    assert (done.status, done.errors.data[0].code) == ("failed", "answers_too_large")
    kept, unasked = answers(client, done.output_file_id), answers(client, done.error_file_id)
    assert 0 < len(kept) < 20
    assert sorted([*kept, *unasked]) == sorted(f"r{number}" for number in range(20))


def test_rows_stand_aside_while_other_requests_are_open(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(batch_lease_s=1.0, rows_of_batch=5)) as gateway:
        client = gateway.client(gateway.key("acme", SCOPES))
        gateway.backend.allowed = 2
        file_id = upload(client, [row(f"r{number}", LONG) for number in range(20)])
        stream = gateway.client(gateway.key("globex")).completions.create(
            model=BACKBONE, prompt="other", max_tokens=LONG, stream=True
        )
        next(stream)
        made = client.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
        until(lambda: gateway.backend.running == 2)
        time.sleep(0.5)  # the others would have come by now
        assert gateway.backend.running == 2
        stream.close()
        until(lambda: gateway.backend.running == 5)
        gateway.backend.allowed = 100
        assert counts(ended(client, made)) == (20, 20, 0)


def test_two_gateways_on_one_database_ask_each_row_once(tmp_path):
    settings = replace(WIDE, batch_lease_s=600.0)  # however slow the machine is, none is taken from the other
    with serve(tmp_path, settings=settings) as one, serve(tmp_path, settings=settings) as other:
        pairs = [(f"t{number}", gateway) for number in range(4) for gateway in (one, other)]
        clients = [gateway.client(gateway.key(tenant, SCOPES)) for tenant, gateway in pairs]
        made = [begin(client, [row(f"{client.api_key}{number}") for number in range(10)]) for client in clients]
        for client, batch in zip(clients, made, strict=True):
            assert counts(ended(client, batch)) == (10, 10, 0)
        asked = [call.prompt for gateway in (one, other) for call in gateway.backend.calls]
    assert len(asked) == len(set(asked)) == 80


def test_a_tenants_batches_come_one_after_another_and_hold_nobody_elses_up(wide):
    client, other = (wide.client(wide.key(tenant, SCOPES)) for tenant in ("acme", "globex"))
    first = half_answered(wide, client)
    second = begin(client, [row("second")])
    assert ended(other, begin(other, [row("a")])).status == "completed"
    assert client.batches.retrieve(second.id).status == "validating"
    wide.backend.allowed = 100
    assert [ended(client, one).status for one in (first, second)] == ["completed"] * 2


def test_work_that_meets_a_storage_that_is_away_goes_on_when_it_is_back(wide, monkeypatch):
    monkeypatch.setattr("pedro.gateway.batch_runner.RETRY_S", 0.1)
    client, files = wide.client(wide.key("acme", SCOPES)), wide.storage / "files"
    away = files.with_name("away")
    made = half_answered(wide, client)
    files.rename(away)
    files.write_text("in its place")  # nothing can be written there
    wide.backend.allowed = 100
    until(lambda: client.batches.retrieve(made.id).status == "finalizing")
    files.unlink()
    away.rename(files)
    assert counts(ended(client, made)) == (20, 20, 0)
