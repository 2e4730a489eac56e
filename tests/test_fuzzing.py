"""What long searches of the gateway counted is added up, for one state of the code."""

from __future__ import annotations

import json

from fuzzing import keep

CODE = {"commit": "a", "code": "sha256:1"}


def row(requests, **statuses):
    counted = {status.strip("_"): count for status, count in statuses.items()}
    return {"requests": requests, "statuses": counted, "slowest_s": 0.5, "routes": {"GET /a": requests, "GET /b": 1}}


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
