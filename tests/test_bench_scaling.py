"""Scaling out: the simulated fleet keeps the laws that it should; replicas in other processes answer as one here."""

from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import replace

import pytest
from serving_ingress import call, run, until

from jobs.benchmarks import scaling, scaling_page
from jobs.benchmarks.command_line import main
from jobs.benchmarks.engine_benchmarks import BENCHMARKS
from jobs.benchmarks.fleet import (
    AT_HOME,
    AT_RANDOM,
    LEAST_OF_TWO,
    ROUTER,
    Costs,
    Demand,
    Fleet,
    by_adapter,
    share_moved,
)
from jobs.benchmarks.replica_connection import SocketConnection, listening
from jobs.benchmarks.report import BenchmarkReport
from jobs.benchmarks.scaleout import SLOTS, _add_residency, _add_speeds, _Seen, _Segment
from pedro.errors import PedroError
from pedro.refs import ModelRef
from pedro.serving.protocol import ListResidents, LoadAdapter, ReplicaLost
from pedro.serving.router import ReplicaSet

COSTS = Costs(rates=(0.0, 2.0, 3.0, 3.6, 4.0), room=16, load_s=0.05, load_cpu_s=0.01)
DEMAND = Demand(replicas=20, tenants=2_000, zipf=1.0, share=0.6, warm=1_500, calls=1_500)


@pytest.fixture(scope="module")
def seen():
    """The same calls under each placement."""
    return {
        placement.name: Fleet(COSTS, DEMAND, placement).run()
        for placement in (ROUTER, LEAST_OF_TWO, AT_RANDOM, AT_HOME)
    }


def test_the_routers_placement_finds_more_adapters_resident_than_one_that_knows_none(seen):
    hits = {name: outcome.row()["hit_share"] for name, outcome in seen.items()}
    assert hits[ROUTER.name] > 1.1 * hits[AT_RANDOM.name]
    assert hits[ROUTER.name] > 1.1 * hits[LEAST_OF_TWO.name]
    assert seen[ROUTER.name].held > seen[AT_RANDOM.name].held, "one adapter in fewer places leaves room for others"


def test_a_hot_adapter_is_resident_on_several_replicas_and_none_waits_for_its_home(seen):
    waits = {name: outcome.row()["wait_p99_ms"] for name, outcome in seen.items()}
    assert seen[ROUTER.name].hot_on > 1
    assert seen[AT_HOME.name].hot_on == 1
    assert waits[ROUTER.name] < waits[AT_HOME.name]


def test_a_simulation_is_the_same_every_time(seen):
    assert Fleet(COSTS, DEMAND, ROUTER).run().row() == seen[ROUTER.name].row()


def test_every_call_that_counts_is_placed_once_and_waits_or_has_begun(seen):
    for outcome in seen.values():
        assert len(outcome.hits) == len(outcome.waits_s) == DEMAND.calls
        assert len(outcome.ends_s) <= DEMAND.calls
        assert min(outcome.waits_s) >= 0


def test_one_replica_with_one_slot_is_a_queue_in_the_order_of_arrival():
    alone = Demand(replicas=1, tenants=1, zipf=1.0, share=0.8, warm=1, calls=400, gateways=1)
    fleet = Fleet(Costs(rates=(0.0, 5.0), room=1, load_s=0.0, load_cpu_s=0.0), alone, ROUTER)
    free, waits = 0.0, []
    for arrival, size in zip(fleet._arrivals, fleet._sizes, strict=True):  # Lindley's recursion
        begin = max(arrival, free)
        waits.append(begin - arrival)
        free = begin + size / 5.0
    outcome = fleet.run()
    begun = len(outcome.ends_s)
    assert begun > 200
    assert outcome.waits_s[:begun] == pytest.approx(waits[1 : begun + 1], abs=1e-9)


def test_calls_of_replicas_that_die_are_placed_again_on_those_that_live():
    fleet = Fleet(COSTS, replace(DEMAND, share=0.4), by_adapter(1.5), die=5)
    outcome = fleet.run()
    dead = set(range(DEMAND.replicas)) - set(fleet._alive.tolist())
    assert len(dead) == 5
    assert outcome.again > 0
    assert not dead & set(fleet._at.values())
    assert fleet._own.sum() == len(fleet._at), "each unfinished call is counted where it is"
    assert len(outcome.hits) == DEMAND.calls


def test_a_replica_that_leaves_moves_about_its_share_of_the_adapters_and_no_other():
    assert 0.7 / 25 < share_moved(25, 4_000) < 1.3 / 25


def test_the_scaling_benchmark_simulates_placements_bounds_and_a_death_from_what_was_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    speeds = [
        {"case": "speed", "replicas": 1, "callers": 1, "tok_s": 10.0, "replicas_cpu": 0.5},
        {"case": "speed", "replicas": 1, "callers": 4, "tok_s": 16.0, "replicas_cpu": 0.4},
    ]
    load = {"case": "load", "load_ms": 6.0, "load_cpu_ms": 4.0}
    fetches = [{"case": "fetch", "median_ms": 33.0}, {"case": "fetch again", "median_ms": 3.0}, {"case": "end to end"}]
    for name, rows in (("scaleout", [*speeds, load]), ("registry", fetches)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows, "settings": {"new": 10}}))
    monkeypatch.setattr(scaling, "RESULTS", tmp_path)
    costs = scaling.measured_costs(tmp_path)
    assert costs.rates == pytest.approx((0.0, 2.0, 2 + 2 / 3, 3 + 1 / 3, 4.0))
    assert (costs.load_s, costs.load_cpu_s) == pytest.approx((0.036, 0.034))
    assert main(BENCHMARKS, tmp_path, ["scaling", "--quick"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    cases = [row["case"] for row in result["rows"]]
    assert cases == [*["placement"] * 8, *["bound"] * (1 + len(scaling.BOUNDS)), "death"]
    assert all(target["met"] for target in result["targets"] if "hits" in target["name"])
    saved = json.loads((tmp_path / "bench" / "results" / "scaling-quick.json").read_text())
    scaling_page.figure(saved, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    page = scaling_page.written("# A\n<!-- measured: placements -->\nold\n<!-- end -->\nB\n", {}, saved)
    assert page.startswith("# A\n<!-- measured: placements -->\n| Zipf | placed |")
    assert page.endswith("(scaling.png)\n<!-- end -->\nB\n")
    assert "old" not in page
    unmade = scaling_page.written("<!-- measured: placed -->\n\n<!-- end -->", {}, saved)
    assert "Not run yet: `python -m jobs.bench scaleout`." in unmade


def test_a_replica_behind_a_socket_answers_as_one_here_and_its_loss_is_told(shared_replica, tmp_path):
    async def go():
        ref = shared_replica.registry.get("acme.faq", 1).model_ref
        answers = []
        async with listening(shared_replica.replica, tmp_path / "r0"):
            replicas = ReplicaSet(lambda name: SocketConnection(tmp_path / name))
            replicas.update(["r0"])
            async with aclosing(replicas.generate(call(), ref)) as batches:
                answers += [delta async for batch in batches for delta in batch]
            residents = await replicas.ask(ListResidents())
            with pytest.raises(PedroError, match="gone"):
                await SocketConnection(tmp_path / "r0").ask(LoadAdapter(ModelRef.parse("acme.none:1#sha256:0")))
            (client,) = replicas._clients.values()
            left = replicas.generate(call(), ref)
            await anext(left)
            await left.aclose()
            await until(lambda: not shared_replica.replica.stats()["running"])
            await client.close()
            await replicas.close()
        with pytest.raises(ReplicaLost):
            await SocketConnection(tmp_path / "gone").ask(ListResidents())
        return answers, residents

    answers, residents = run(go())
    assert sum(len(delta.token_ids) for delta in answers) == 40
    assert answers[-1].finish_reason == "length"
    assert "acme.faq" in {one.name for one in residents}


def test_several_replicas_stand_beside_as_many_times_one_and_more_than_the_cores_are_no_target(monkeypatch):
    monkeypatch.setattr("jobs.benchmarks.scaleout.granted_cores", lambda: 2)
    report = BenchmarkReport("scaleout", {})
    _add_speeds(
        report,
        {
            (count, callers): _Seen([_Segment(2.0, tokens, 4, {"router_s": 0.002, "replicas_s": 3.0})])
            for count, callers, tokens in ((1, 1, 50), (1, SLOTS, 200), (2, 2 * SLOTS, 380), (4, 4 * SLOTS, 400))
        },
    )
    assert [(row["replicas"], row["callers"], row.get("ratio")) for row in report.rows] == [
        *((1, 1, None), (1, SLOTS, None)),
        *((2, 2 * SLOTS, 0.95), (4, 4 * SLOTS, 0.5)),
    ]
    assert report.rows[-1]["of_cores"] == 1.0
    assert report.rows[0]["router_us"] == 500
    assert [target.name for target in report.targets] == ["2 replicas / 2 × one: throughput"]


def test_residency_is_the_share_of_calls_that_needed_no_load():
    def segments(loads: float) -> _Seen:
        return _Seen([_Segment(1.0, 100, 20, {"router_s": 0.0, "loads": loads})])

    report = BenchmarkReport("scaleout", {})
    placed = {
        (draw, name): segments(5 if name == "by adapter" else 10)
        for draw in ("uniform", "zipf")
        for name in ("by adapter", "at random")
    }
    _add_residency(report, placed, {case: [90.0] for case in placed})
    assert [row["hit_share"] for row in report.rows] == [0.75, 0.5, 0.75, 0.5]
    assert [(target.measured.value, target.met) for target in report.targets] == [(1.5, True)] * 2


@pytest.mark.slow
def test_replicas_in_processes_of_their_own_are_measured_behind_the_router(tmp_path, monkeypatch, capsys):
    from jobs.benchmarks.server_benchmarks import SERVER_BENCHMARKS

    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    assert main(SERVER_BENCHMARKS, tmp_path / "results", ["scaleout", "--quick", "--models", "tiny"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows].count("speed") == 4
    assert all(row["tok_s"] > 0 for row in rows if row["case"] != "load")
    assert {row["placement"] for row in rows if row["case"] == "residency"} == {"by adapter", "at random"}
    assert rows[-1]["load_ms"] > 0
