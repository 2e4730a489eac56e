"""A backbone that is split over ranks answers as it does whole, with every kind of adapter; without a rank it ends."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_models import DIGEST, Letters, drain, make_adapter, make_engine, prompt, random_backbone, request, run
from safetensors.torch import load_file, save_file

from pedro.adapter_kinds import Adapter
from pedro.backbone import Backbone, load_config
from pedro.engine import Engine, EngineConfig, EngineThread
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.engine.tensor_parallel import TensorParallel, check_devices, check_split
from pedro.engine.tensor_parallel.collectives import Group
from pedro.engine.tensor_parallel.loading import join, load_shard, whole_architecture
from pedro.engine.tensor_parallel.messages import KeptRows, Parts, load
from pedro.engine.tensor_parallel.peers import environment
from pedro.engine.tensor_parallel.runner import ShardRunner, read_part
from pedro.engine.tensor_parallel.shards import Shard
from pedro.errors import BackboneError, ConfigError, PedroError
from pedro.methods.servable import read_adapter
from pedro.serving.config import ServeConfig

KINDS = {
    "pedro": ("pedro", {"targets": ["q", "k", "v", "gate", "up"]}),
    "grouped": ("pedro", {"group_size": "head", "pool": "mean", "window": 3}),
    "ia3": ("ia3", {}),
    "red": ("red", {}),  # scales and shifts
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {"r": 4}),  # on all projections
    "adalora": ("adalora", {"r": 6, "target_r": 3}),
    "lora-dash": ("lora-dash", {"r": 4, "directions": 3}),
    "loreft": ("loreft", {"positions": "f2+l1"}),  # edits hidden states, which every rank has whole
}
CASES = {
    "llama": (2, {"attention_bias": True, "mlp_bias": True}),  # also of o and down, which are summed
    "mistral": (2, {"tie_word_embeddings": True, "vocab_size": 97}),
    "qwen2": (2, {}),
    "qwen3": (2, {}),
    "phi3": (2, {}),  # fused projections
    "llama-3": (3, {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 36, "vocab_size": 100}),
}


def save(model, folder) -> Backbone:
    """A backbone as files."""
    model.save_pretrained(folder)
    return Backbone("test", folder, DIGEST, "")


def exercise(runner, adapters) -> list[torch.Tensor]:
    """The logits of a batch of a prompt under each adapter and a bare one, read in pieces, and of four steps."""
    rows = [PrefillRow(slot, prompt(5 + slot, slot), 5 + slot, adapter) for slot, adapter in enumerate(adapters)]
    runner.begin(rows)
    for until in (1, 9, 20, None):
        runner.advance(until)
    made = [runner.end()[0].values.clone()]
    for step in range(4):
        tokens = [(11 * row.slot + 5 * step) % 90 + 2 for row in rows]
        steps = [DecodeRow(row.slot, token, len(row.token_ids) + step) for row, token in zip(rows, tokens, strict=True)]
        made.append(runner.decode(steps).values.clone())
    return made


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_have_a_part_of_everything_compute_what_one_computes(case, tmp_path):
    size, changes = CASES[case]
    model = random_backbone(case.removesuffix("-3"), **changes)
    backbone = save(model, tmp_path / "backbone")
    names = list(KINDS)
    for seed, name in enumerate(names):
        make_adapter(model, tmp_path / name, seed, KINDS[name][0], **KINDS[name][1])
    whole = Runner(model, 10, 64, kernel="torch")
    cpu = torch.device("cpu")
    adapters = [read_adapter(tmp_path / name, whole.architecture, DIGEST, cpu) for name in names]
    expected = exercise(whole, [*adapters, None])
    bytes_of = whole.stats()["weight_bytes"]

    shards = [Shard(rank, size) for rank in range(size)]
    parts = [load_shard(backbone, "float32", "cpu", shard) for shard in shards]
    architecture = whole_architecture(backbone)

    def go(rank):
        group = Group(shards[rank], cpu, str(tmp_path / "meeting"), 60)
        join(parts[rank], group)
        runner = ShardRunner(parts[rank], group, 10, 64)
        own = [read_part(tmp_path / name, architecture, DIGEST, cpu, shards[rank]) for name in names]
        return exercise(runner, [*own, None]), runner.stats()["weight_bytes"], sum(adapter.nbytes for adapter in own)

    with ThreadPoolExecutor(size) as pool:
        made = list(pool.map(go, range(size)))
    for logits, weight_bytes, adapter_bytes in made:
        for got, wanted in zip(logits, expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert weight_bytes < (1 / size + 0.05) * bytes_of, "norms alone are on every rank"
        assert adapter_bytes < sum(adapter.nbytes for adapter in adapters)
    assert sum(row[1] for row in made) >= bytes_of


# an engine over two processes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A backbone, its files, and the folder of its adapters."""
    folder = tmp_path_factory.mktemp("ranks")
    model = random_backbone("llama")
    for seed, name in enumerate(KINDS):
        make_adapter(model, folder / name, seed, KINDS[name][0], **KINDS[name][1])
    make_adapter(model, folder / "foreign", 1, digest="sha256:another")
    return model, save(model, folder / "backbone"), folder


def split_engine(home, **config) -> tuple[Engine, TensorParallel]:
    _, backbone, folder = home
    split = TensorParallel(backbone, 2)
    options = EngineConfig(**{"max_batch": 6, **config})
    return Engine(split.model, Letters(), options, lambda ref: folder / ref, DIGEST, split), split


@pytest.fixture(scope="module")
def engine(home):
    """Two processes with a prefix cache. Started once: their imports take seconds."""
    engine, _ = split_engine(home, prefix_bytes=1 << 24)
    yield engine
    engine.close()


def one_rank(home, **config) -> Engine:
    model, _, folder = home
    options = {"max_batch": 6, "kernel": "torch", **config}
    return make_engine(model, load=lambda ref: folder / ref, **options)


def mixed(salt: str = "") -> list:
    """Requests of every kind, bare ones, several answers, beams, drawn tokens and log-probabilities of the prompt."""
    rows = [
        request(f"{name}", prompt(40, seed=7), 6, adapter=name, logprobs=3, cache_salt=salt)
        for name in ("pedro", "ia3")
    ]
    rows += [
        request(name, prompt(30 + i, seed=i), 6, adapter=name, cache_salt=salt)
        for i, name in enumerate(KINDS, 1)
        if name not in ("pedro", "ia3")
    ]
    return [
        *rows,
        request("bare", prompt(40, seed=7), 8, cache_salt=salt),
        request("several", prompt(9), 5, n=2, temperature=0.8, seed=3, adapter="pedro", cache_salt=salt),
        request("beams", prompt(11), 5, num_beams=3, adapter="lora", cache_salt=salt),
        request("read", prompt(12), 3, prompt_logprobs=2, adapter="ia3", cache_salt=salt),
    ]


def check_same(made, expected) -> None:
    assert {key: a.token_ids for key, a in made.items()} == {key: a.token_ids for key, a in expected.items()}
    for key in ("pedro", "ia3"):
        for ours, theirs in zip(made[key].logprobs, expected[key].logprobs, strict=True):
            for (token, our), (other, their) in zip(ours.top, theirs.top, strict=True):
                assert token == other
                assert our == pytest.approx(their, abs=1e-4)


def test_an_engine_of_two_ranks_answers_a_mixed_batch_as_one_rank_does(engine, home):
    check_same(run(engine, *mixed()), run(one_rank(home), *mixed()))
    assert engine.stats()["tensor_parallel_size"] == 2


def test_what_ranks_kept_of_prompts_is_found_again_by_all_of_them(engine, home):
    expected = run(one_rank(home), *mixed())
    for again in (False, True):
        made = run(engine, *mixed("kept"))
        check_same(made, expected)
        cached = {name: made[name].last.cached_tokens for name in ("pedro", "ia3", "lora", "bare")}
        assert all(bool(count) == again for count in cached.values()), cached


def test_adapters_leave_and_return_on_all_ranks_and_one_that_is_refused_costs_nobody(engine, home):
    ask = [request(f"r{name}", prompt(8), 5, adapter=name, cache_salt="leave") for name in ("pedro", "lora")]
    before = run(engine, *ask)
    for name in ("pedro", "lora"):
        assert engine.adapters.evict(name)
    assert not engine.adapters.residents().keys() & {"pedro", "lora"}
    after = run(engine, *ask)
    assert {key: a.token_ids for key, a in after.items()} == {key: a.token_ids for key, a in before.items()}
    for wrong in ("foreign", "missing"):
        engine.add(request(wrong, prompt(8), 5, adapter=wrong))
        engine.add(request("beside", prompt(8), 5))
        answers = drain(engine)
        assert answers[wrong].last.error is not None
        assert answers["beside"].last.error is None
    assert engine.lost is None


def test_an_adapter_that_a_rank_is_late_with_is_forgotten_on_both_sides(engine, home, monkeypatch):
    peers, folder = engine._runner._peers, home[2]
    monkeypatch.setattr("pedro.engine.tensor_parallel.peers.READ_TIMEOUT_S", 0.2)
    os.kill(peers.pids[0], signal.SIGSTOP)
    try:
        with pytest.raises(PedroError, match="a rank has not read the adapter in time"):
            engine._runner.read_adapter(folder / "ia3", DIGEST)
        assert len(peers._abandoned) == 1
    finally:
        os.kill(peers.pids[0], signal.SIGCONT)
    monkeypatch.undo()
    assert run(engine, request("after", prompt(8), 5, adapter="red"))["after"].last.error is None
    until = time.monotonic() + 20
    while peers._abandoned and time.monotonic() < until:
        time.sleep(0.01)
    assert not peers._abandoned
    assert not peers._answers


def test_ranks_have_as_many_blocks_as_the_one_with_the_least_memory(home, tmp_path, monkeypatch):
    _, backbone, _ = home
    shards = [Shard(rank, 2) for rank in range(2)]
    # One after the other: transformers sets torch.nn.init aside meanwhile, and puts back what it found.
    parts = [load_shard(backbone, "float32", "cpu", shard) for shard in shards]
    free = threading.local()
    monkeypatch.setattr("pedro.engine.kv_budget.available_memory", lambda: free.bytes)

    def go(rank):
        group = Group(shards[rank], torch.device("cpu"), str(tmp_path / "meeting"), 60)
        join(parts[rank], group)
        free.bytes = (2 - rank) * 400_000
        cache = ShardRunner(parts[rank], group, 100, 64).cache
        return cache.blocks, int(0.5 * 400_000 / 2) // cache.block_bytes

    with ThreadPoolExecutor(2) as pool:
        (first, _), (second, expected) = pool.map(go, range(2))
    assert first == second == expected > 0


def test_ranks_get_no_secrets():
    given = {
        "PATH": "/bin",
        "PEDRO_HOME": "/home",
        "PEDRO_DATABASE_URL": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "HF_TOKEN": "x",
    }
    assert environment(given) == {"PATH": "/bin", "PEDRO_HOME": "/home"}


def test_vectors_that_each_rank_kept_of_a_preempted_prompt_stand_in_for_its_adapter(home, engine):
    runner = engine._runner
    adapter = runner.read_adapter(home[2] / "pedro", DIGEST)
    ids = prompt(10)
    runner.begin([PrefillRow(0, ids, len(ids), adapter)])
    runner.advance()
    expected = runner.end()[0].values.clone()
    state = runner.save_state(0)
    runner.release(0)
    runner.begin([PrefillRow(1, ids, len(ids), preempted_state=state)])
    runner.advance()
    torch.testing.assert_close(runner.end()[0].values, expected, atol=1e-5, rtol=1e-5)
    runner.release(1)


@pytest.mark.slow  # it starts two processes and kills one
def test_a_rank_that_is_killed_ends_the_engine_and_tells_why(home):
    engine, split = split_engine(home)
    check_same(run(engine, *mixed()), run(one_rank(home), *mixed()))  # without a prefix cache
    ends, told = [], []
    began = threading.Event()

    def take(output):
        began.set()
        if output.finish_reason is not None:
            ends.append(output)

    with EngineThread(engine, on_lost=told.append) as thread:
        thread.submit(request("long", prompt(4), 100), take)
        assert began.wait(60)
        os.kill(split.pids[0], signal.SIGKILL)
        until = time.monotonic() + 60
        while thread.alive and time.monotonic() < until:
            time.sleep(0.01)
        assert not thread.alive
        assert "rank 1" in told[0].message
        assert "signal 9" in told[0].message
        assert [output.error for output in ends] == told
        with pytest.raises(PedroError, match="shutting down"):
            thread.submit(request("late", prompt(4), 4), take)


# what is refused, by name and with the numbers


def test_sizes_that_divide_no_heads_are_refused_with_what_would(home):
    config = load_config(home[1])
    with pytest.raises(
        BackboneError, match=r"3 does not divide the 4 attention heads and the 2 key-value heads .* 1 or 2"
    ):
        check_split(config, 3, "test")
    with pytest.raises(BackboneError, match="4 does not divide the 2 key-value heads"):
        check_split(config, 4, "test")
    with pytest.raises(BackboneError, match="gpt2, and only llama"):
        check_split(random_backbone("gpt2").config, 2, "test")
    if torch.cuda.device_count() < 64:
        with pytest.raises(ConfigError, match="64 ranks need a GPU each"):
            check_devices("cuda", 64)


def test_what_only_one_rank_can_do_is_refused(home):
    shard = Shard(0, 2)
    model = load_shard(home[1], "float32", "cpu", shard)
    for options, message in (({"kernel": "native"}, "native is for"), ({"weights": "int8"}, "int8 is for the native")):
        with pytest.raises(BackboneError, match=message):
            ShardRunner(model, None, 2, 16, **options)
    with pytest.raises(ValueError, match="does not support ranks"):
        ServeConfig(tensor_parallel_size=2, weights="int8")
    with pytest.raises(ValueError, match="num_gpus: expected tensor_parallel_size = 2"):
        ServeConfig(tensor_parallel_size=2, device="cuda", num_gpus=1)
    assert ServeConfig(tensor_parallel_size=2, device="cuda", num_gpus=2).tensor_parallel_size == 2


def test_files_that_no_rank_can_read_its_part_of_are_refused(home, tmp_path):
    model, _, _ = home
    backbone = save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 40] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_shard(backbone, "float32", "cpu", Shard(0, 2))  # the other rank's number
    with pytest.raises(BackboneError, match=rf"{name} that are not finite"):
        load_shard(backbone, "float32", "cpu", Shard(1, 2))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="save the model again"):
        load_shard(backbone, "float32", "cpu", Shard(0, 2))


def test_a_part_travels_as_a_number_and_is_let_go_with_what_it_stands_for():
    parts, adapter, rows = Parts(), Adapter(), KeptRows({("scale", 0, "q"): torch.ones(2)})
    for thing in (adapter, rows):
        parts.name(thing, parts.reserve())
    message = parts.dump(("begin", [PrefillRow(0, [1], 1, adapter), rows]))
    there = {0: Adapter(), 1: KeptRows()}
    name, (row, kept) = load(message, there)
    assert (name, row.adapter, kept) == ("begin", there[0], there[1])
    assert parts.take_gone() == []
    del adapter, row, rows, thing
    assert sorted(parts.take_gone()) == [0, 1]
    assert parts.take_gone() == []
