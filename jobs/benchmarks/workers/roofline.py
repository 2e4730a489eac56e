"""The machine's roofline, which no engine exceeds: how fast it reads, copies and multiplies."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

READ_BYTES, SIDE, TIMES = 512 << 20, 2048, 5


class Roofline:
    """Set-up: device, dtype, threads. A run gives read_gb_s, copy_gb_s (bytes read and written) and gemm_gflops."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        self._device, self._dtype = setup["device"], getattr(torch, setup["dtype"])

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """The best of five of each."""
        data = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=self._device)
        target = torch.empty_like(data)
        side = SIDE if self._device == "cpu" else 4 * SIDE
        left = torch.randn(side, side, dtype=self._dtype, device=self._device)
        return {
            "device": platform.machine() if self._device == "cpu" else torch.cuda.get_device_name(),
            "read_gb_s": READ_BYTES / self._best(lambda: data.sum()) / 1e9,
            "copy_gb_s": 2 * READ_BYTES / self._best(lambda: target.copy_(data)) / 1e9,
            "gemm_gflops": 2 * side**3 / self._best(lambda: left @ left) / 1e9,
        }

    def _best(self, work: Callable[[], object]) -> float:
        """The shortest time of `work` in seconds."""
        times = []
        for _ in range(TIMES + 1):
            self._settle()
            began = time.perf_counter()
            work()
            self._settle()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def _settle(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()
