"""How many threads the kernel uses: what the machine grants, fewer beside busy neighbours; and no thread matters."""

import copy

import pytest
import torch
from engine_models import DIGEST, make_adapter, prompt, random_backbone

from pedro.engine import kernel_threads, native
from pedro.engine.config import EngineConfig
from pedro.engine.kernel_threads import LONGEST_HOLD_S, WINDOW_S, KernelThreads, cpu_quota, granted_threads
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.errors import ConfigError
from pedro.methods.servable import read_adapter

SIZES = {"hidden_size": 96, "intermediate_size": 200, "vocab_size": 300, "head_dim": 24}


@pytest.fixture
def odd_schedules(monkeypatch):
    """A kernel whose threads are preempted at random whenever they have taken a tile, and whose tiles are tiny."""
    native.load_kernel.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DPEDRO_ODD_SCHEDULES", "-DTILE=65536"))
    monkeypatch.setattr(kernel_threads, "LOST", float("inf"))
    yield
    native.load_kernel.cache_clear()


def answers(model, count, tmp_path):
    """Logits of prefills of few and of many rows, cut in places, and of decoding them, by `count` threads."""
    runner = Runner(copy.deepcopy(model), slots=8, length=192, kernel="native", threads=count)
    adapters = [
        None
        if name is None
        else read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width)
        for name in ("a", None, "b")
    ]
    lengths = (120, 3, 41, 17, 64, 1, 30, 9)
    made = []
    for slots in ((0, 1, 2, 3), (4, 5, 6, 7)):
        rows = [PrefillRow(slot, prompt(lengths[slot], slot), lengths[slot], adapters[slot % 3]) for slot in slots]
        runner.begin(rows)
        for until in (1, 100, None):
            runner.advance(until)
        made.append(runner.end()[0].values.clone())
    for step in range(4):
        rows = [DecodeRow(slot, 3 + slot + step, lengths[slot] + step) for slot in range(8)]
        logits = runner.decode(rows)
        assert logits.best == logits.values.argmax(-1).tolist()
        made.append(logits.values.clone())
    return made


def test_whoever_computes_a_tile_the_numbers_are_the_same_to_the_bit(odd_schedules, tmp_path):
    model = random_backbone("llama", **SIZES)
    make_adapter(model, tmp_path / "a", seed=1)
    make_adapter(model, tmp_path / "b", seed=2, r=5, orders=(4, 3))
    alone = answers(model, 1, tmp_path)
    for count in (2, 3):
        for left, right in zip(alone, answers(model, count, tmp_path), strict=True):
            assert torch.equal(left, right)


def test_of_equal_logits_the_first_is_the_likeliest_whoever_finds_it(odd_schedules):
    model = random_backbone("llama", **SIZES)
    with torch.no_grad():
        model.get_output_embeddings().weight[1:] = model.get_output_embeddings().weight[1].clone()
    runner = Runner(model, slots=1, length=64, kernel="native", threads=3)
    for step in range(20):
        runner.begin([PrefillRow(0, prompt(5, step), 5)])
        runner.advance()
        logits = runner.end()[0]
        assert logits.best == logits.values.argmax(-1).tolist()


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def spend(counts, clock, seconds, lost):
    """Calls of 5 ms; `lost` gives the share that is lost by the number of threads. How long each number was used."""
    used = {}
    for _ in range(round(seconds / 0.005)):
        used[counts.count] = used.get(counts.count, 0) + 0.005
        clock.now += 0.005
        counts.note(0.005, 0.005 * lost(counts.count))
    return used


def test_fewer_threads_while_some_do_not_run_and_all_again_once_they_do():
    clock = Clock()
    counts = KernelThreads(2, clock)
    spend(counts, clock, 1, lambda count: 0.05)
    assert counts.count == 2, "what a quiet machine loses is no reason"
    used = spend(counts, clock, 20, lambda count: 0.5 if count > 1 else 0)
    assert used[2] < 0.05 * 20, "trying again costs little"
    spend(counts, clock, LONGEST_HOLD_S + 2 * WINDOW_S, lambda count: 0.05)
    assert counts.count == 2, "the neighbour is gone"
    used = spend(counts, clock, 10, lambda count: 0.05)
    assert used == {2: pytest.approx(10)}


def test_a_moment_without_a_core_costs_no_more_than_a_moment():
    clock = Clock()
    counts = KernelThreads(2, clock)
    for _ in range(20):
        spend(counts, clock, WINDOW_S, lambda count: 0.5)
        used = spend(counts, clock, 0.5, lambda count: 0.05 if count > 1 else 0)
        assert used[2] > 0.4


def test_many_threads_become_as_many_as_run():
    clock = Clock()
    counts = KernelThreads(16, clock)
    spend(counts, clock, 5, lambda count: 0.5 if count > 12 else 0.05)
    assert 11 <= counts.count <= 13


def test_a_cgroups_quota_bounds_the_threads(tmp_path, monkeypatch):
    of, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "pod" / "box").mkdir(parents=True)
    of.write_text("0::/pod/box\n")
    assert cpu_quota(root, of) is None
    (root / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    (root / "pod" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(root, of) == 1.5
    (root / "cpu" / "box").mkdir(parents=True)
    of.write_text("9:name=systemd:/\n4:cpu,cpuacct:/box\n")
    (root / "cpu" / "box" / "cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu" / "box" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(root, of) is None
    (root / "cpu" / "box" / "cpu.cfs_quota_us").write_text("50000\n")
    assert cpu_quota(root, of) == 0.5
    assert cpu_quota(root, tmp_path / "none") is None
    monkeypatch.setattr(kernel_threads, "cpu_quota", lambda: 0.5)
    assert granted_threads() == 1


def test_a_number_of_threads_below_one_is_refused():
    with pytest.raises(ConfigError, match="threads: expected > 0"):
        EngineConfig(threads=0)
