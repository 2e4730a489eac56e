"""What long searches of the gateway counted is added up, for one state of the code."""

from __future__ import annotations

import json

import httpx
import pytest
from fuzzed_gateway import DRY_RUNS, FUZZED, excused
from fuzzing import keep

CODE = {"commit": "a", "code": "sha256:1"}


def row(requests, **statuses):
    counted = {status.strip("_"): count for status, count in statuses.items()}
    unexpected = {"unexpected_5xx": counted.get("500", 0)}
    routes = {"GET /a": requests, "GET /b": 1}
    return {"requests": requests, "statuses": counted, **unexpected, "slowest_s": 0.5, "routes": routes}


def test_counts_of_searches_are_added_up_and_those_of_other_code_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("FUZZ_OUT", str(tmp_path / "fuzz.json"))
    for code, counted in (
        (CODE, row(5, _200=5)),
        (CODE, row(7, _200=4, _503=1, _504=1, _500=1)),
        ({**CODE, "code": "sha256:2"}, row(2)),
    ):
        keep(counted, code)
        told = json.loads((tmp_path / "fuzz.json").read_text())
        if counted["requests"] == 7:
            assert (told["requests"], told["routes"], told["fewest_of_a_route"]) == (12, 2, 2)
            assert [(target["value"], target["met"]) for target in told["targets"]] == [
                (12, False), (1, False), (0.5, True),
            ]  # fmt: skip
    assert told["requests"] == 2


def test_nothing_is_kept_where_nobody_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("FUZZ_OUT", raising=False)
    keep(row(1), CODE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "code", "more", "right"),
    [
        (504, "deadline_exceeded", {"given": "0.2", "seconds": 0.3}, True),
        (504, "deadline_exceeded", {"given": "30", "seconds": 1.1}, True),
        (504, "deadline_exceeded", {"given": "0.2", "seconds": 0.1}, False),
        (504, "deadline_exceeded", {"given": "nan", "seconds": 9}, False),
        (504, "deadline_exceeded", {"seconds": 9}, False),
        (503, "overloaded", {}, True),
        (503, "environment", {"route": DRY_RUNS, "query": "?dry_run=true"}, True),
        (503, "environment", {"route": DRY_RUNS}, False),
        (503, "environment", {}, False),
        (503, "engine_error", {}, False),
        (503, "database", {}, False),
        (500, "adapter_unusable", {}, True),
        (500, "adapter_unusable", {"shared": False}, False),
        (500, "adapter_unusable", {"said": f"{FUZZED} is damaged"}, False),
        (500, "internal_error", {"said": 'a model called "adapter_unusable"'}, False),
    ],
)
def test_only_what_a_request_brought_about_itself_is_excused(status, code, more, right):
    headers = {"x-request-timeout": more["given"]} if "given" in more else {}
    request = httpx.Request("POST", f"http://here/{more.get('query', '')}", headers=headers)
    body = {"error": {"message": more.get("said", ""), "code": code}}
    reply = httpx.Response(status, json=body, request=request)
    route, shared = more.get("route", "POST /v1/completions"), more.get("shared", True)
    assert excused(reply, route, more.get("seconds", 0.1), shared=shared) is right


def test_an_answer_that_is_no_error_of_ours_is_not_excused():
    request = httpx.Request("GET", "http://here/")
    assert not excused(httpx.Response(503, text="away", request=request), "GET /", 0.1, shared=True)
