"""The memory of keys and values."""

import psutil
import torch

from pedro.engine.kv_cache import KVCache


def test_a_cache_takes_memory_as_it_is_written_and_reads_as_zeros():
    process = psutil.Process()
    before = process.memory_info().rss
    cache = KVCache(4, 8, 4, 8192, 64, torch.float32, torch.device("cpu"))
    assert cache.nbytes > 500_000_000
    ones = torch.ones(1, 4, 64)
    cache.append(2, torch.tensor([7]), torch.tensor([8191]), ones, ones)
    assert process.memory_info().rss - before < 50_000_000
    keys, _ = cache.read(2, torch.tensor([7]), 8192)
    assert keys[0, :, -1].eq(1).all()
    assert keys[0, :, :-1].eq(0).all()
