"""What the CPU kernel reads all the time lies in huge pages, and what they would fill in vain does not."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from engine_models import random_backbone

from pedro.engine.huge_pages import CHUNK, HUGE, HugeMemory
from pedro.engine.kv_cache import HUGE_BYTES, KVCache
from pedro.engine.runner import Runner

asked = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this system has no huge pages"
)


def advice(address):
    """What the system was told of the memory at this address: "hg", "nh" or nothing."""
    for region in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(end, 16) for end in re.match(r"(\w+)-(\w+)", region).groups())
        if first <= address < last:
            return {"hg", "nh"} & set(re.search(r"VmFlags:(.*)", region).group(1).split())
    raise AssertionError("no such memory")


def small_cache(slots=4, length=64):
    return KVCache(2, slots, 2, length, 64, torch.float32, torch.device("cpu"))


def test_tensors_lie_one_behind_the_other_and_keep_their_numbers():
    memory = HugeMemory()
    first = torch.randn(33, 7)
    copies = [memory.copy(first), memory.copy(torch.arange(5, dtype=torch.uint8)), memory.copy(first.T)]
    large = memory.empty(CHUNK // 4 + 1)
    large.fill_(3.0)
    after = memory.copy(first)
    assert torch.equal(copies[0], first)
    assert copies[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(copies[2], first.T)
    assert copies[2].is_contiguous()
    assert torch.equal(after, first)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (*copies, large, after))
    assert copies[1].data_ptr() - copies[0].data_ptr() == 960, "33 · 7 numbers, up to the next line"
    assert large.data_ptr() % HUGE == 0 or not hasattr(mmap, "MADV_HUGEPAGE")


@asked
def test_weights_of_the_kernel_are_in_huge_pages():
    runner = Runner(random_backbone("llama"), slots=2, length=32, kernel="native")
    struct = runner._executor.struct
    assert advice(struct.layer[0].qkv) == advice(struct.layer[2].down) == advice(struct.head) == {"hg"}


@asked
def test_a_small_cache_is_in_huge_pages_unless_its_slots_cannot_all_be_full():
    cache = small_cache()
    cache.limit(cache.blocks)
    assert advice(cache.keys[0].data_ptr()) == advice(cache.values[1].data_ptr()) == {"hg"}
    cache = small_cache()
    cache.limit(cache.blocks - 1)
    assert advice(cache.keys[0].data_ptr()) == {"nh"}, "a huge page would take memory of several slots"
    cache = small_cache(slots=1, length=HUGE_BYTES // (2 * 2 * 2 * 64 * 4) + 64)
    cache.limit(cache.blocks)
    assert advice(cache.keys[0].data_ptr()) == set(), "most of it is only reserved"
