"""How many threads the CPU kernel uses: all available cores, or fewer while other processes compete for them.

If the operating system preempts a thread that works on a tile, all others wait for it. The kernel measures how much
time a call lost to this; beyond a limit, fewer threads are faster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

WINDOW_S = 0.02  # kernel time over which the loss is averaged
LOST = 0.35  # share of a window above which one thread is faster than two, even if memory-bound
HOLD_S, LONGEST_HOLD_S = 0.04, 1.0  # until more threads are tried; doubled if that failed, else halved


def granted_threads() -> int:
    """As many as PyTorch uses, or fewer if affinity or a cgroup's quota allow less."""
    return max(1, min(torch.get_num_threads(), granted_cores()))


def granted_cores() -> int:
    """Whole cores that this process may use."""
    cores = (
        len({_siblings(number) for number in os.sched_getaffinity(0)})
        if sys.platform == "linux"
        else os.cpu_count() or 1
    )
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> float | None:
    """The CPU quota of the process's cgroup (v2 or v1) and its ancestors, in cores; None if none is set."""
    try:
        lines = of.read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root,) if not controllers else (root / "cpu", root / controllers):
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                quotas.append(_quota_of(folder))
                if folder == base:
                    break
    return min((quota for quota in quotas if quota is not None), default=None)


def _siblings(number: int) -> str:
    """An id shared by the logical processors of one core."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max", or no such file
        return None


class KernelThreads:
    """`count` is how many threads to use next, at most `limit`; `note` records how long each call took and how much it
    lost."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = self.count = limit
        self._clock = clock
        self._spent = self._lost = 0.0
        self._hold = HOLD_S
        self._changed = self._retry = clock()

    def note(self, spent: float, lost: float) -> None:
        """A call took `spent` seconds, of which `lost` passed without all its threads running."""
        if self.limit == 1:
            return
        self._spent += spent
        self._lost += lost
        if self._spent < WINDOW_S:
            return
        share = self._lost / self._spent
        self._spent = self._lost = 0.0
        now = self._clock()
        if self.count > 1 and share > LOST:
            did_well = now - self._changed > self._hold
            self._hold = max(self._hold / 2, HOLD_S) if did_well else min(2 * self._hold, LONGEST_HOLD_S)
            self.count -= (self.count + 7) // 8
            self._changed, self._retry = now, now + self._hold
        elif self.count < self.limit and now >= self._retry:
            self.count += 1
            self._changed = now
