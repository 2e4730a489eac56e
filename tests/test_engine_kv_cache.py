"""The memory of keys and values: taken as it is written, within a budget, and given back."""

import mmap

import psutil
import pytest
import torch

from pedro.engine import kv_cache
from pedro.engine.kv_budget import KVBudget, allowed_blocks, check_whole, fits
from pedro.engine.kv_cache import KVCache, PagedKVCache
from pedro.errors import ConfigError
from pedro.process import available_memory, parse_memory
from pedro.serving.config import ServeConfig

CPU = torch.device("cpu")
SHAPE = 2, 3, 2, 64, 64  # layers, slots, key-value heads, positions, width


@pytest.fixture(params=["plain", "paged"])
def cache(request, monkeypatch):
    """A cache of 5 blocks of 16 positions, for 3 slots of 4 blocks."""
    monkeypatch.setattr(kv_cache, "PAGE", 16)
    if request.param == "plain" and mmap.PAGESIZE != 4096:
        pytest.skip("of other blocks")
    made = (KVCache if request.param == "plain" else PagedKVCache)(*SHAPE, torch.float32, CPU)
    made.limit(5)
    return made


def rss() -> int:
    return psutil.Process().memory_info().rss


def written(slot, start, count):
    """Numbers [K, n, d] that tell slot and position."""
    at = torch.arange(start, start + count).float()[None, :, None]
    return (1000.0 * slot + at).expand(2, count, 64)


def use(cache, slot, length):
    cache.lengths[slot] = length
    if length > cache.room[slot]:
        cache.grow(slot)


def fill(cache, slot, count, start=0):
    use(cache, slot, start + count)
    for layer in range(2):
        cache.fill(layer, slot, written(slot, start, count), -written(slot, start, count), start)


def holds(cache, slot, count):
    """Whether the slot's positions are as `fill` wrote them, by every way to read them."""
    expected = written(slot, 0, count)
    for layer in range(2):
        for keys, values in (
            cache.read_slot(layer, slot, count),
            cache.read(layer, torch.tensor([slot]), count),
            tuple(t[slot][None] for t in cache.read(layer, 3, count)),
        ):
            assert torch.equal(keys[0], expected)
            assert torch.equal(values[0], -expected)


def test_a_cache_takes_memory_as_it_is_written_and_reads_as_zeros():
    before = rss()
    cache = KVCache(4, 8, 4, 8192, 64, torch.float32, CPU)
    assert cache.nbytes > 500_000_000
    ones = torch.ones(1, 4, 64)
    cache.append(2, torch.tensor([7]), torch.tensor([8191]), ones, ones)
    assert rss() - before < cache.nbytes / 2
    keys, _ = cache.read(2, torch.tensor([7]), 8192)
    assert keys[0, :, -1].eq(1).all()
    assert keys[0, :, :-1].eq(0).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system takes no memory back")
def test_memory_stays_within_the_budget_whatever_slots_are_used():
    cache = KVCache(2, 8, 4, 16384, 64, torch.float32, CPU)
    cache.limit(2 * cache.blocks_per_slot)
    given = torch.ones(4, 16384, 64)
    before = rss()
    for slot in (0, 1, 5, 3, 7, 2):
        use(cache, slot, 16384)
        for layer in range(2):
            cache.fill(layer, slot, given, given)
        assert rss() - before < 2 * cache.nbytes, "all that is written here is three times what there may be"
        use(cache, slot, 0)
    assert sum(cache.room) == 2 * 16384, "what was released stays for the next, as there is room"


def test_a_slot_that_was_released_gives_its_blocks_to_those_that_grow(cache):
    fill(cache, 0, 40)
    fill(cache, 1, 20)
    holds(cache, 0, 40)
    holds(cache, 1, 20)
    with pytest.raises(RuntimeError, match="all 5 blocks"):
        use(cache, 2, 1)
    use(cache, 2, 0)
    use(cache, 0, 0)
    fill(cache, 2, 33)
    holds(cache, 1, 20)
    holds(cache, 2, 33)
    use(cache, 1, 0)
    use(cache, 2, 0)
    for _ in range(5):
        for slot, count in ((0, 64), (1, 5), (2, 64)):
            fill(cache, slot, count)
            holds(cache, slot, count)
            use(cache, slot, 0)


def test_a_shorter_sequence_than_the_last_in_its_slot_leaves_the_rest_to_others(cache):
    fill(cache, 0, 64)
    use(cache, 0, 0)
    fill(cache, 0, 10)
    fill(cache, 1, 64)
    holds(cache, 0, 10)
    holds(cache, 1, 64)
    fill(cache, 0, 6, start=10)
    holds(cache, 0, 16)
    holds(cache, 1, 64)


def test_a_slot_grows_from_what_the_last_sequence_left_in_it(cache):
    fill(cache, 0, 30)
    use(cache, 0, 0)
    fill(cache, 1, 48)
    fill(cache, 0, 25)
    with pytest.raises(RuntimeError, match="all 5 blocks"):
        use(cache, 0, 33)
    use(cache, 0, 25)
    use(cache, 1, 0)
    fill(cache, 0, 39, start=25)
    holds(cache, 0, 64)


def test_slots_are_copied_exchanged_wiped_and_written_one_position_at_a_time(cache):
    fill(cache, 0, 20)
    use(cache, 1, 20)
    cache.spread(0, [1], 18)
    keys, values = cache.read_slot(1, 1, 18)
    assert torch.equal(keys[0], written(0, 0, 18))
    assert torch.equal(values[0], -written(0, 0, 18))
    fill(cache, 1, 20)
    cache.move([0, 1], [1, 0], 3, 19)
    keys, _ = cache.read(0, torch.tensor([1, 0]), 20)
    for row, (own, other) in enumerate(((1, 0), (0, 1))):
        assert torch.equal(keys[row, :, :3], written(own, 0, 3))
        assert torch.equal(keys[row, :, 3:19], written(other, 3, 16))
        assert torch.equal(keys[row, :, 19:], written(own, 19, 1))
    rows = torch.stack([written(0, 17, 1)[:, 0], written(1, 5, 1)[:, 0]])
    cache.append(1, torch.tensor([0, 1]), torch.tensor([17, 5]), rows, -rows)
    keys, values = cache.read(1, torch.tensor([0, 1]), 20)
    assert torch.equal(keys[[0, 1], :, [17, 5]], rows)
    assert torch.equal(values[[0, 1], :, [17, 5]], -rows)
    cache.wipe(0, 18, start=2)
    keys, _ = cache.read_slot(1, 0, 20)
    assert keys[:, :, 2:18].eq(0).all()
    assert keys[:, :, :2].ne(0).any()
    assert keys[:, :, 18:].ne(0).all()
    cache.wipe(1)
    assert all(t.eq(0).all() for t in cache.read_slot(0, 1, 20))


def test_a_budget_is_bytes_or_a_share_of_what_is_free(monkeypatch):
    cache = KVCache(*SHAPE, torch.float32, CPU)
    monkeypatch.setattr("pedro.engine.kv_budget.available_memory", lambda: 40 * cache.block_bytes)
    reserved = 20 * cache.block_bytes
    found = {
        memory: allowed_blocks(cache, KVBudget(memory, reserved)) for memory in (7 * cache.block_bytes + 1, 0.25, None)
    }
    assert list(found.values()) == [7, 5, 10]
    assert allowed_blocks(cache, KVBudget(0.25, 50 * cache.block_bytes)) == 1
    with pytest.raises(ConfigError, match=f"one block of {cache.block} tokens takes"):
        allowed_blocks(cache, KVBudget(1000))
    cache.limit(10**9)
    assert cache.blocks == 3 * cache.blocks_per_slot, "more than all slots could use is no use"


def test_where_memory_is_short_there_is_one_whole_context_and_a_warning(monkeypatch, caplog):
    cache = KVCache(*SHAPE, torch.float32, CPU)
    context = cache.blocks_per_slot
    free = 4 * context * cache.block_bytes
    monkeypatch.setattr("pedro.engine.kv_budget.available_memory", lambda: free)
    assert allowed_blocks(cache, KVBudget(sharers=2)) == context
    assert not caplog.messages
    for short in (KVBudget(sharers=3), KVBudget(reserved=3 * free // 4), KVBudget(reserved=2 * free)):
        caplog.clear()
        assert allowed_blocks(cache, short) == context
        assert "memory is short" in caplog.text
    free = context * cache.block_bytes
    few = allowed_blocks(cache, KVBudget())
    assert 0 < few < context, "not more than there is"
    check_whole(cache, few, KVBudget())
    for memory, param in ((None, "max_length"), (0.5, "kv_memory")):
        with pytest.raises(ConfigError, match=f"{param}: one context of {cache.length} tokens needs") as refused:
            check_whole(cache, few, KVBudget(memory, whole=True))
        assert refused.value.param == param


def test_a_gpu_keeps_what_is_taken_at_the_start_beside_one_context(monkeypatch):
    cache = KVCache(*SHAPE, torch.float32, CPU)
    cache.device = torch.device("cuda")
    whole = cache.blocks_per_slot * cache.block_bytes
    monkeypatch.setattr("pedro.engine.kv_budget._free_memory", lambda device: 2 * whole)
    assert allowed_blocks(cache, KVBudget()) == int(0.8 * 2 * whole) // cache.block_bytes
    assert allowed_blocks(cache, KVBudget(reserved=whole)) == int(0.9 * whole) // cache.block_bytes
    assert allowed_blocks(cache, KVBudget(reserved=3 * whole)) == 1


def test_a_system_without_huge_pages_has_a_cache_too(monkeypatch):
    class Pages:
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    cache = KVCache(*SHAPE, torch.float32, CPU)
    cache._maps = [Pages()]
    cache.limit(1)
    assert cache.blocks == 1


@pytest.mark.parametrize(
    ("blocks", "slots", "longest", "said"),
    [
        (800, 32, 2048, "6.2 GiB at most, 12,800 tokens: 32 sequences of 400 tokens, or 6 of the full 2,048"),
        (4096, 32, 2048, "32.0 GiB at most, 65,536 tokens: 32 sequences of the full 2,048"),
        (20, 32, 320, "160.0 MiB at most, 320 tokens: 20 sequences of 16 tokens, or 1 of the full 320; the context of "
         "2,048 is reduced to that: raise --kv-memory"),
    ],
)  # fmt: skip
def test_a_line_says_what_fits(blocks, slots, longest, said):
    stats = {"kv_block_tokens": 16, "kv_blocks": blocks, "slots": slots, "max_length": longest, "context": 2048}
    assert fits({**stats, "kv_cache_bytes": blocks << 23}) == f"KV cache: {said}"


def test_sizes_are_written_as_people_write_them():
    texts = ["4GiB", "500 MB", "1.5g", "8192", "0.4", "1.0", ".25", "3ki"]
    assert [parse_memory(text) for text in texts] == [4 << 30, 500_000_000, 1_500_000_000, 8192, 0.4, 1.0, 0.25, 3072]
    for wrong in ("", "4 apples", "-1", "1.5", "0.0", "0", "50%", "i"):
        with pytest.raises(ValueError, match="expected a size like 4GiB, or a share of free memory like 0\\.4, got"):
            parse_memory(wrong)
    for given in ("4GiB", 0.4, 1 << 30, None):
        assert ServeConfig(kv_memory=given).kv_memory == given
    with pytest.raises(ValueError, match="like 4GiB"):
        ServeConfig(kv_memory="much")


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_that_is_free_is_that_of_the_container(tmp_path, version):
    prefix, limit, used, files = (
        (tmp_path, "memory.max", "memory.current", "inactive_file")
        if version == 2
        else (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    machine = available_memory(tmp_path)
    assert machine > 1 << 20
    prefix.mkdir(exist_ok=True)
    (prefix / limit).write_text("1000000\n")
    (prefix / used).write_text("700000\n")
    (prefix / "memory.stat").write_text(f"anon 1\n{files} 50000\n")
    assert available_memory(tmp_path) == 350_000
    (prefix / limit).write_text("max\n" if version == 2 else f"{1 << 62}\n")
    assert available_memory(tmp_path) > 1 << 20
