"""A dry run over HTTP says what `pedro submit --dry-run` says, or what the job would fail with, and leaves no job."""

from __future__ import annotations

import asyncio
import io
import json
import sys

import openai
import pytest
from gateway_backend import BACKBONE
from gateway_server import serve

from pedro.config import Settings
from pedro.errors import DeadlineError, PedroError, RateLimitError, UnavailableError
from pedro.gateway.app import GatewaySettings
from pedro.gateway.dry_runs import DryRuns
from pedro.training.dry_run_process import answer
from pedro.training.estimate import dry_run
from pedro.training.spec import FineTuneSpec

ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}).encode()
    + b"\n"
    for n in range(20)
)
PROGRAM = (sys.executable, "-m", "pedro.training.dry_run_process")
METHOD = {"type": "supervised", "pedro": {"method": {"name": "lora", "r": 2}, "training": {"max_steps": 30}}}


@pytest.fixture
def gateway(tmp_path):
    home = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    settings = GatewaySettings(
        backbones={BACKBONE: "stories260K"}, storage=home.storage, dry_run_command=PROGRAM, dry_run_env=home.env()
    )
    with serve(tmp_path, settings=settings) as gateway:
        yield gateway


def test_a_dry_run_agrees_with_that_of_the_command_line_and_makes_no_job(gateway, tmp_path):
    client = gateway.client(gateway.key("acme", ("train",)))
    file = client.files.create(file=("train.jsonl", io.BytesIO(ROWS)), purpose="fine-tune").id
    body = {"model": BACKBONE, "training_file": file, "suffix": "voice", "method": METHOD}
    told = client.post("/fine_tuning/jobs?dry_run=true", body=body, cast_to=dict)
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    fields = {"tenant": "acme", "adapter": "voice", "data": {"train": str(tmp_path / "train.jsonl")}}
    section = METHOD["pedro"]
    spec = FineTuneSpec.model_validate({**fields, **section, "training": {**section["training"], "lr": 3e-3}})
    expected = dry_run(spec, calibrated=False).to_dict()
    expected.pop("spec")
    assert told == {"object": "fine_tuning.job.dry_run", "model": BACKBONE, **json.loads(json.dumps(expected))}
    assert list(client.fine_tuning.jobs.list()) == []
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/fine_tuning/jobs?dry_run=yes", body=body, cast_to=dict)
    assert refused.value.param == "dry_run"
    with pytest.raises(openai.BadRequestError, match="no file"):
        client.post("/fine_tuning/jobs?dry_run=true", body={**body, "training_file": "file-x"}, cast_to=dict)


def test_what_the_job_would_fail_with_is_told_without_places_of_the_host(gateway, tmp_path):
    client = gateway.client(gateway.key("acme", ("train",)))
    bad = client.files.create(file=("train.jsonl", io.BytesIO(ROWS + b'{"prompt": 1}\n')), purpose="fine-tune").id
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    fields = {"tenant": "acme", "adapter": "voice", "data": {"train": bad}, "backbone": "stories260K"}
    told = answer(fields, settings)["error"]
    assert (told["param"], told["code"]) == ("training_file", "invalid_data")
    assert "line 21" in told["message"]
    assert str(tmp_path) not in told["message"]
    assert "lrr: unknown key" in answer({**fields, "training": {"lrr": 1}}, settings)["error"]["message"]
    for tenant, file in (("globex", bad), ("acme", "file-" + "0" * 24)):
        other = answer({**fields, "tenant": tenant, "data": {"train": file}}, settings)["error"]
        assert other["message"].replace(file, "ID") == "No such File object: ID"


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, sys, time; spec = json.load(sys.stdin); {text}")


def test_dry_runs_go_one_after_the_other_and_a_tenant_has_one(tmp_path):
    note = f"open({str(tmp_path / 'log')!r}, 'a').write(spec['name'])"
    runs = DryRuns(program(f"{note}; time.sleep(0.2); {note}; print(json.dumps({{'report': spec}}))"), {})

    async def ask():
        asked = [asyncio.create_task(runs.ask(tenant, {"name": tenant})) for tenant in ("a", "b")]
        await asyncio.sleep(0)
        with pytest.raises(RateLimitError, match="in progress"):
            await runs.ask("a", {"name": "a"})
        return await asyncio.gather(*asked)

    assert asyncio.run(ask()) == [{"name": "a"}, {"name": "b"}]
    assert (tmp_path / "log").read_text() == "aabb"


def test_a_dry_run_that_errs_takes_too_long_breaks_or_is_not_there_is_told_apart():
    told = "print(json.dumps({'error': {'message': 'no', 'param': 'x', 'code': 'y'}}))"
    for runs, error, match in (
        (DryRuns(program(told), {}), PedroError, "no"),
        (DryRuns(program("time.sleep(600)"), {}, timeout_s=0.1), DeadlineError, "longer than 0.1 s"),
        (DryRuns(program("sys.exit(3)"), {}), RuntimeError, "a dry run failed"),
        (DryRuns((), {}), UnavailableError, "does not support dry runs"),
    ):
        with pytest.raises(error, match=match):
            asyncio.run(runs.ask("acme", {}))
        assert not runs._asking


def test_a_program_that_reads_nothing_may_answer_and_one_that_reads_gets_all():
    quick = DryRuns([sys.executable, "-c", 'print(\'{"report": {"rows": 0}}\')'], {})
    size = DryRuns([sys.executable, "-c", 'import sys; print(\'{"report": {"n": %d}}\' % len(sys.stdin.read()))'], {})
    large = {"text": "x" * 1_000_000}
    assert asyncio.run(quick.ask("acme", large)) == {"rows": 0}
    assert asyncio.run(size.ask("acme", large)) == {"n": len(json.dumps(large))}
