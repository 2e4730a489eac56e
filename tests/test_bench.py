"""Benchmarks: figures are computed as documented, missing peers are named, nothing stays running."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from jobs.benchmarks import contention, dry_run, engine_process, fairness, http_costs, peers, prefill_stall, task_score
from jobs.benchmarks.bench_engine import BenchEngine
from jobs.benchmarks.command_line import main
from jobs.benchmarks.efficiency import copy_limit_tok_s
from jobs.benchmarks.engine_benchmarks import BENCHMARKS
from jobs.benchmarks.engine_process import EnginePool, EngineProcess, EngineProcessError
from jobs.benchmarks.gateway_cost import own_code
from jobs.benchmarks.gguf_model import saved_gguf, saved_lora_gguf
from jobs.benchmarks.model_sizes import MODEL_SIZES, make_model, prompts
from jobs.benchmarks.prefix import OFF
from jobs.benchmarks.random_adapters import OPTIONS, adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import Ratio, paired_ratio, percentile, percentile_ratio
from jobs.benchmarks.timeline import Timeline
from jobs.benchmarks.training import Load, setup_of
from jobs.benchmarks.workers.__main__ import KINDS
from jobs.benchmarks.workers.prefix import Prefix
from jobs.benchmarks.workers.train_quantised import QuantisedTrainer

RESULTS = Path(__file__).parents[1] / "jobs" / "results"
ROW_KEYS = {"engine", "adapters", "model", "batch", "tenants", "tok_s", "decode_tok_s", "ttft_ms"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[BenchmarkReport, list[str]]:
    """A whole comparison on a tiny backbone, with a vLLM that is not there, and what was said meanwhile."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEDRO_HOME", str(tmp_path_factory.mktemp("home")))
        engines, pythons = ("generate", "ours", "vllm"), {"vllm": "/nowhere/python"}
        plan = peers.PeerComparison(
            {"tiny": (2,)}, rounds=2, prompt=12, new=4, threads=1, peers=pythons, engines=engines, roofline=False
        )
        return peers.measure(plan, said.append), said


def test_a_run_gives_a_row_for_every_engine_that_is_installed(quick):
    report, _ = quick
    assert {(row["engine"], row["adapters"]) for row in report.rows} >= {
        ("generate", "none"),
        ("ours", "pedro"),
        ("ours", "none"),
    }
    assert all(row.keys() >= ROW_KEYS and row["tok_s"] > 0 and row["decode_tok_s"] > 0 for row in report.rows)
    assert {row["tenants"] for row in report.rows if row["adapters"] != "none"} == {2}


def test_ratios_refer_to_generate_on_the_bare_model(quick):
    report, _ = quick
    base = next(row for row in report.rows if row["engine"] == "generate")
    assert base["ratio"] == base["decode_ratio"] == 1.0
    for row in report.rows:
        low, high = row["ratio_interval"]
        assert low <= row["ratio"] <= high


def test_a_peer_that_is_not_installed_is_skipped_by_name(quick):
    report, said = quick
    assert "/nowhere/python" in report.skipped["vllm"]
    assert "/nowhere/python" in report.skipped["vllm+lora"]
    assert any("skipped vllm" in line for line in said)


def test_the_last_line_is_one_json_object_and_the_file_carries_provenance(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    report, _ = quick
    entry = BENCHMARKS["serving"]
    stand_in = type(entry)(entry.about, lambda options, say: report, entry.columns)
    assert main({"serving": stand_in}, tmp_path, ["serving"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    saved = json.loads((tmp_path / "serving.json").read_text())
    assert last["rows"] == saved["rows"] == report.rows
    assert saved.keys() >= {"commit", "hardware", "versions", "settings", "targets"}


def test_longer_prompts_are_read_by_every_pooler_beside_no_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    assert main(BENCHMARKS, tmp_path / "results", ["context", "--quick", "--models", "tiny", "--threads", "1"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    lengths = {row["tokens"] for row in rows}
    cases = {row["adapters"] for row in rows}
    assert len(lengths) == 2
    assert len(rows) == 2 * len(cases)
    assert cases >= {"none", "PEDRO last", "PEDRO mean", "PEDRO max"}
    assert all(row["ttft_ms"] > 0 and (row["adapters"] != "none" or row["ratio"] == 1) for row in rows)


def test_what_is_read_again_is_told_by_what_an_adapter_depends_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    words = ["conditioning", "--quick", "--threads", "1", "--rounds", "1"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    reused = {
        row["adapters"]: tuple(row[f"{name}_cached"] > 0 for name in ("next_turn", "same_system_prompt"))
        for row in rows
    }
    assert reused.pop("PEDRO, whole prompt") == (False, False), "its vectors are of the whole prompt"
    assert set(reused.values()) == {(True, True)}
    others = {row["adapters"] for row in rows if row["another_adapter_cached"]}
    answer_side = {"PEDRO, answer, tail 1", "PEDRO, answer, tail 9", "activated LoRA"}
    assert others == {"none", *answer_side}, "what the bare backbone reads is anybody's"


def test_quantised_weights_stand_beside_float32_by_speed_memory_perplexity_and_score(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    monkeypatch.setitem(task_score.LOADS, "pedro-nano", Load(8, 2, 1, 4))
    words = [
        "weights",
        "--quick",
        "--threads",
        "1",
        "--models",
        "tiny",
        "--batches",
        "2",
        "--backbones",
        "pedro-nano,gone",
    ]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["skipped"]) == {"gone", "llama.cpp"}
    speed = [row for row in result["rows"] if row["model"] == "tiny"]
    quality = [row for row in result["rows"] if row["model"] == "pedro-nano"]
    assert [row["weights"] for row in speed] == [row["weights"] for row in quality] == ["float32", "int8", "int4"]
    assert speed[0]["weight_mb"] > 2 * speed[1]["weight_mb"] > 2 * speed[2]["weight_mb"]
    assert speed[0]["decode_ratio"] == quality[0]["perplexity_ratio"] == 1
    assert 0.99 < quality[1]["perplexity_ratio"] < 1.01, "int8 changes next to nothing"
    assert [(row["asked"], row["score_minus"] == row["score"] - quality[0]["score"]) for row in quality] == [
        (4, True)
    ] * 3


class Here(EngineProcess):
    """An engine in this process, where it takes no seconds to start; `quick` has them as they are."""

    def __init__(self, name, kind, python, environment):
        self._kind, self._engine, self._answer = kind, None, None

    def send(self, order):
        order = json.loads(json.dumps(order))
        if self._engine is None:
            module, name = KINDS[self._kind]
            self._engine, self._answer = getattr(importlib.import_module(module), name)(order), {"ready": True}
        else:
            self._answer = json.loads(json.dumps(self._engine.run(order)))

    def receive(self, timeout_s):
        return self._answer

    def end(self):
        self._engine = None


def test_chats_shared_and_cold_prompts_are_measured_with_the_prefix_cache_and_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    monkeypatch.setattr(engine_process, "EngineProcess", Here)
    words = ["prefix", "--quick", "--threads", "1", "--rounds", "1", "--peer", "llamacpp=/nowhere/python"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["skipped"]) == {"llamacpp", "vllm"}, "those that are not there, by name"
    (saved,) = tmp_path.rglob("prefix-quick.json")
    assert json.loads(saved.read_text())["settings"]["tiny"]["rounds"] == 1, "sizes are told for each model"
    chats = [(row["engine"], row["adapters"]) for row in result["rows"] if row["case"] == "chat"]
    kinds = ["none", "LoRA", "(IA)³", "PEDRO on the system prompt", "PEDRO, asked again"]
    assert chats == [*(("ours", kind) for kind in kinds), (OFF, "none")]
    assert all(row["ratio"] > 0 for row in result["rows"])
    shared = {row["engine"]: row for row in result["rows"] if row["case"] == "shared prompt" and row["tok_s"] > 0}
    assert shared[OFF]["ratio"] == 1
    assert {row["adapters"] for row in result["rows"] if row["case"].startswith("cold")} == {"none", "LoRA", "PEDRO"}
    assert len(result["targets"]) == len(kinds) + 2 * 3


def test_answers_held_to_a_schema_are_measured_beside_free_ones_of_equal_length(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    words = ["structured", "--quick", "--threads", "1", "--rounds", "1"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    free, held = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (free["case"], held["case"]) == ("free", "schema")
    assert held["ratio"] == pytest.approx(held["decode_tok_s"] / free["decode_tok_s"], rel=0.01)


def test_longer_stalls_are_measured_beside_shorter_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    words = ["stall", "--quick", "--models", "tiny", "--threads", "1"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["prefill_stall"] for row in rows] == list(prefill_stall.STALLS)
    for row in rows:
        assert row["ratio"] == pytest.approx(row["tok_s"] / row["static_tok_s"], rel=0.01)
        assert row["stream_p99_ms"] >= row["stream_ms"] > 0
        assert row["long_ttft_ms"] > 0


def test_answers_with_drafts_are_measured_beside_the_same_ones_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    words = ["speculation", "--quick", "--models", "tiny", "--threads", "1", "--rounds", "1"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    spans, free, misleading = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["case"] for row in (spans, free, misleading)] == ["spans", "free", "misleading"]
    assert spans["accepted_tokens"] > 0
    assert free["draft_tokens"] == misleading["accepted_tokens"] == 0
    assert spans["ratio"] == pytest.approx(spans["ngram_tok_s"] / spans["off_tok_s"], rel=0.01)


def test_the_prefix_benchmarks_engine_goes_on_from_what_it_read_and_answers_alike_without(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    size = MODEL_SIZES["tiny"]
    setup = {"size": "tiny", "device": "cpu", "threads": 1, "max_batch": 2, "length": 200}
    setup["adapters"] = {"pedro": str(adapter_directories(size, "pedro", 1)[0])}
    on, off = (Prefix({**setup, "prefix_mb": kept_mb}) for kept_mb in (16, 0))
    for kind in (None, "pedro"):
        chat = prompts(size, 1, 100, seed=3)[0]
        for turn in range(2):
            order = {"prompts": [chat], "new": 20, "adapter": kind, "conditioning_length": 100 if kind else None}
            done, plain = on.run(order), off.run(order)
            assert done["answers"] == plain["answers"]
            assert (done["cached"], plain["cached"]) == ([112 if turn else 0], [0])
            assert 0 < done["first_ms"][0] < 1000 * done["wall_s"]
            chat = [*chat, *done["answers"][0], 5]


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_is_given_the_same_model(tied, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    size = replace(MODEL_SIZES["tiny"], name="odd", kv_heads=2, layers=2, tied=tied)
    file = saved_gguf(size)
    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.tensor(prompts(size, 1, 12, seed=1))
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, make_model(size)(ids).logits, atol=1e-4, rtol=1e-4)


def test_llama_cpp_is_given_the_same_lora(tmp_path, monkeypatch):
    """Products of the file's factors are what PEFT adds to the weights, in the order of the backbone's file."""
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    size = replace(MODEL_SIZES["tiny"], name="odd", kv_heads=2, layers=2)
    (directory,) = adapter_directories(size, "lora", 1)
    read = gguf.GGUFReader(saved_lora_gguf(directory, size))
    factors = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
    scale = read.fields["adapter.lora.alpha"].contents() / OPTIONS["lora"]["r"]
    bare = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(saved_gguf(size)).tensors}
    merged = PeftModel.from_pretrained(make_model(size), str(directory)).merge_and_unload()
    monkeypatch.setattr("jobs.benchmarks.gguf_model.make_model", lambda _size: merged)
    (tmp_path / "merged").mkdir()
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "merged"))
    for tensor in gguf.GGUFReader(saved_gguf(size)).tensors:
        if f"{tensor.name}.lora_a" in factors:
            product = scale * factors.pop(f"{tensor.name}.lora_b") @ factors.pop(f"{tensor.name}.lora_a")
            torch.testing.assert_close(torch.tensor(tensor.data) - bare[tensor.name], product, atol=1e-5, rtol=1e-3)
    assert not factors, "each factor belongs to a weight"


@pytest.mark.parametrize(
    "words", [["--rounds", "-1"], ["--rounds", "0"], ["--threads", "0"], ["--device", "tpu"], ["--out", "."]]
)
def test_a_wrong_option_is_told_before_anything_is_measured(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(BENCHMARKS, tmp_path, ["context", *words])
    assert f"argument {words[0]}: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_engine_is_measured_beside_neighbours_which_are_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    monkeypatch.setattr(contention, "SETTLE_S", 0.1)
    before = {process.pid for process in psutil.Process().children()}
    words = ["contention", "--quick", "--models", "tiny", "--rounds", "1", "--batches", "2", "--threads", "2"]
    assert main(BENCHMARKS, tmp_path / "results", words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    seen = {(row["phase"], row["neighbours"], row["threads"]) for row in rows}
    assert len(rows) == len(seen) == 2 * 3 * 3
    assert all(row["tok_s"] > 0 and (row["threads"] != "1" or row["ratio"] == 1) for row in rows)
    left = [process for process in psutil.Process().children() if process.pid not in before]
    left = [process for process in left if "resource_tracker" not in " ".join(process.cmdline())]  # Python's own
    assert not psutil.wait_procs(left, timeout=60)[1]


def test_ratios_are_taken_within_a_round():
    drifting = paired_ratio([20.0, 40.0, 80.0], [10.0, 20.0, 40.0])
    assert (drifting.value, drifting.low, drifting.high) == (2.0, 2.0, 2.0)
    uneven = paired_ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0])
    assert uneven.value == 2.0
    assert uneven.low <= 2.0 <= uneven.high


def test_a_target_is_met_by_the_value_and_unclear_while_the_interval_holds_it():
    assert [
        (t.met, t.unclear) for t in (Target("fast", 1.0, Ratio(1.02, 1.01, 1.03)), Target("fast", 1.0, exactly(1.0)))
    ] == [
        (True, False),
        (True, False),
    ]
    assert [(t.met, t.unclear) for t in (Target("fast", 1.0, Ratio(0.97, 0.9, 1.01)),)] == [(False, True)]
    short = [Target("short", 3.0, r, at_most=True) for r in (exactly(2.9), Ratio(2.9, 2.8, 3.6), Ratio(3.2, 2.8, 3.6))]
    assert [(t.met, t.unclear) for t in (*short, Target("short", 3.0, exactly(3.1), at_most=True))] == [
        (True, False),
        (True, True),
        (False, True),
        (False, False),
    ]


def test_committed_verdicts_follow_from_the_values():
    for path in RESULTS.glob("*.json"):
        for target in json.loads(path.read_text()).get("targets", []):
            sign, limit = target["target"].split()
            keeps = target["value"] <= float(limit) if sign == "<=" else target["value"] >= float(limit)
            assert target["met"] == keeps, (path.name, target)


def test_decoding_counts_from_when_every_request_has_its_first_token():
    timeline = Timeline(started=0.0)
    for moment in (1.0, 2.0, 3.0, 4.0):
        timeline.take("a", moment=moment)
    for moment in (2.0, 3.0, 4.0):
        timeline.take("b", moment=moment)
    figures = timeline.figures()
    assert figures["tok_s"] == 7 / 4
    assert figures["decode_tok_s"] == 4 / 2
    assert figures["ttft_ms"] == 1500.0
    assert sorted(timeline.gaps_ms()) == [1000.0] * 5
    assert timeline.tails() == {"ttft_p99_ms": 2000.0, "token_ms": 1000.0, "token_p99_ms": 1000.0}


def test_the_client_counts_every_token_of_a_slice_and_raises_what_the_server_reports():
    from jobs.benchmarks.workers.http_client import _take

    timeline = Timeline()
    _take({"choices": [{"text": "w7 w8"}, {"text": ""}]}, "a", timeline)
    _take({"choices": [{"text": " w9"}]}, "a", timeline)
    _take({"choices": []}, "a", timeline)
    assert len(timeline.moments["a"]) == 3
    with pytest.raises(RuntimeError, match="engine_error"):
        _take({"error": {"code": "engine_error"}}, "a", timeline)


def test_what_a_request_takes_is_split_into_what_is_fixed_and_what_its_tokens_add():
    figures = {"tok_s": 1.0, "ttft_ms": 1.0, "ttft_p99_ms": 1.0, "token_ms": 1.0, "token_p99_ms": 1.0}
    spent = []
    for tokens in (10, 110):  # 500 us a request and 20 a token in the gateway, half as much in the proxy
        run = http_costs.Spent(4, tokens)
        used = 4 * (500 + 20 * tokens) / 1e6
        seconds = {"proxy": used / 2, "gateway": used, "engine": 0.0, "ray": 0.0}
        for _ in range(2):
            run.add({**figures, "events": 4 * tokens / 5, "cpu_s": 0.0, "seconds": seconds})
        spent.append(run)
    row = spent[0].row("tiny")
    assert (row["batch"], row["answer_tokens"], row["events"]) == (4, 10, 2.0)
    assert (row["gateway_us"], row["proxy_us"], row["engine_us"], row["request_us"]) == (70.0, 35.0, 0.0, 1050)
    proxy, gateway, *_ = http_costs.split_rows("tiny", spent)
    assert gateway == {"case": "a request's gateway", "model": "tiny", "batch": 4} | {
        "fixed_us": 500, "token_us": 20.0, "event_us": 100
    }  # fmt: skip
    assert (proxy["fixed_us"], proxy["token_us"]) == (250, 10.0)


def test_the_gateways_own_code_is_measured_without_a_server(tmp_path):
    own = own_code(tmp_path, requests=32, events=33)
    assert own.keys() == {"fixed_us", "event_us"}
    assert own["event_us"] > 0


def test_a_flood_goes_on_while_a_quiet_tenant_asks_and_both_stand_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    monkeypatch.setattr(fairness, "THINK_S", 0.01)
    ref = str(adapter_directories(MODEL_SIZES["tiny"], "pedro", 1)[0])
    engine = BenchEngine(MODEL_SIZES["tiny"], max_batch=4, max_length=400)
    flood = fairness.Flood("a flood", streams=4, prompt=20, new=40, n=3)
    lone = {"a flood": fairness._segment(engine, ref, flood, None, 0, 0.02)}
    cases = (("alone", None), ("a flood", flood))
    seen = {name: fairness._segment(engine, ref, case, ref, 3, 0.02) for name, case in cases}
    assert not engine.engine.has_work(), "nothing of a segment is left for the next"
    engine.close()
    report = BenchmarkReport("fairness", {})
    fairness.add_rows(report, "engine", seen, lone, 1.2)
    alone, beside = report.rows
    assert (alone["requests"], beside["requests"], "ratio" in alone) == (3, 3, False)
    assert beside["ratio"] == pytest.approx(beside["ttft_p95_ms"] / alone["ttft_p95_ms"], rel=0.05)
    assert beside["flood_tok_s"] > 0
    assert [target.name for target in report.targets] == [
        "engine, a flood: first token p95 / alone",
        "engine, a flood: the flood's tokens/s / by itself",
    ]


def test_the_ratio_of_two_percentiles_has_the_interval_of_resampled_ones():
    ratio = percentile_ratio([float(i) for i in range(2, 202, 2)], [float(i) for i in range(1, 101)], 0.95)
    assert ratio.value == 2.0
    assert 1.8 < ratio.low <= 2.0 <= ratio.high < 2.2


def test_percentiles_are_values_that_occurred():
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([5.0], 0.99) == 5.0


def test_the_shapes_have_the_sizes_they_are_named_after():
    sizes = {
        name: sum(p.numel() for p in make_model(MODEL_SIZES[name], "meta").parameters())
        for name in ("S", "M", "SmolLM2", "7B")
    }
    assert sizes == {"S": 15_191_712, "M": 124_668_672, "SmolLM2": 134_515_008, "7B": 6_738_415_616}
    assert MODEL_SIZES["M"].read_parameters < sizes["M"] - 32_000 * 768 + 1
    assert copy_limit_tok_s(MODEL_SIZES["7B"], copy_gb_s=600.0, value_bytes=2) == pytest.approx(
        600e9 / 13.5e9, rel=0.03
    )


def test_prompts_differ_from_each_other_and_are_the_same_for_every_engine():
    asked = prompts(MODEL_SIZES["S"], 4, 16, seed=1)
    assert len({tuple(ids) for ids in asked}) == 4
    assert asked == prompts(MODEL_SIZES["S"], 4, 16, seed=1) != prompts(MODEL_SIZES["S"], 4, 16, seed=2)


@pytest.mark.parametrize("kind", ["pedro", "ia3", "lora"])
def test_every_tenants_adapter_is_whole_and_its_own(kind, tmp_path, monkeypatch):
    from pedro.adapter_directory import verify_adapter

    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    size = MODEL_SIZES["tiny"]
    directories = adapter_directories(size, kind, 3)
    digests = {verify_adapter(directory, size.digest)["digest"] for directory in directories}
    assert len(digests) == 3
    assert adapter_directories(size, kind, 3) == directories


def test_engines_that_were_started_end_whatever_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    children = psutil.Process().children
    # Another test's process (a template renderer lives as long as its parent) may be there already.
    before = children()

    def interrupted() -> None:
        with EnginePool(print) as pool:
            pool.start("one", "generate", {"size": "tiny"})
            assert len([child for child in children() if child not in before]) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [child for child in children() if child not in before]


def test_an_engine_that_cannot_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    with EnginePool(print) as pool:
        pool.start("strange", "http", {})
        assert pool.wait() == {}
        assert "KeyError" in pool.skipped["strange"]


def test_an_order_that_fails_leaves_the_engine_running(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    with EnginePool(print) as pool:
        pool.start("client", "http", {"size": "tiny", "url": "http://127.0.0.1:9", "key": "k", "model": "m"})
        pool.wait()
        with pytest.raises(EngineProcessError, match="KeyError"):
            pool.run("client", {"batch": 1})
        with pytest.raises(EngineProcessError, match="ConnectError"):
            pool.run("client", {"batch": 1, "prompt": 4, "new": 2, "seed": 0})


def test_help_teaches_without_importing_torch():
    code = "import sys, jobs.bench as b\ntry: b.main(b.BENCHMARKS, None, ['--help'])\nexcept SystemExit: pass\n"
    out = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert out.returncode == 0, out.stderr.decode()
    assert b"--peer vllm=/path/to/python" in out.stdout


def test_promises_of_a_dry_run_stand_beside_what_the_job_took():
    report, said = BenchmarkReport("dryrun", {}), []
    promise = {
        "seconds": 100.0,
        "seconds_by_part": {"to start": 45.0, "of steps": 40.0, "of validation": 5.0, "of scoring": 10.0},
        "memory_bytes": {"backbone": 100 * 2**20, "activations": 50 * 2**20},
        "process_bytes": 750 * 2**20,
        "time_from": "timed on this machine",
    }
    measured = {"job s": 110.0, "training s": 90.0, "memory MB": 1000.0}
    dry_run._compare(report, "pedro-nano", "pedro", promise, measured, said.append)
    assert [(row["what"], row["promised"], row["measured"], row["off"]) for row in report.rows] == [
        ("job s", 100.0, 110.0, -0.091),
        ("training s", 45.0, 90.0, -0.5),
        ("memory MB", 900.0, 1000.0, -0.1),
    ]
    assert [target.met for target in report.targets] == [True, False, True]
    assert any("promised 900.0, measured 1,000.0 (-10%)" in line for line in said)
    assert dry_run._spec("pedro", "stories260K", 20).training.eval_every == 5


def test_a_backbone_in_4_bit_is_trained_over_and_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    load = Load(4, 2, 1, 4)
    setup = {**setup_of("stories260K", load), "threads": 1, "batch": load.batch, "steps": load.steps, "method": "pedro"}
    whole, held = (
        QuantisedTrainer({**setup, "training": training}).run({}) for training in ({}, {"backbone_dtype": "nf4"})
    )
    assert whole["weights"] == 4 * 260_032
    assert held["weights"] < 0.4 * whole["weights"]
    assert held["loss"] == pytest.approx(whole["loss"], rel=0.2)
    assert held["loss"] != whole["loss"]
