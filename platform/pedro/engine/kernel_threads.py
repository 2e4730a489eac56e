"""How many threads the CPU kernel uses: what the machine grants, and fewer while others keep them from running.

A thread that the operating system preempts while it holds a tile makes all others wait. The kernel measures what a call
lost to that; where it is too much, fewer threads are faster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

WINDOW_S = 0.02  # of the kernel's time, by which it is judged
LOST = 0.35  # of a window: more, and one thread is faster than two, even where memory sets the pace
HOLD_S, LONGEST_HOLD_S = 0.04, 1.0  # until more threads are tried again; doubled where that was in vain, else halved


def granted_threads() -> int:
    """As many as PyTorch uses, or fewer where affinity or a cgroup's quota allow the process less."""
    return max(1, min(torch.get_num_threads(), granted_cores()))


def granted_cores() -> int:
    """Whole cores that this process may use at once."""
    cores = (
        len({_siblings(number) for number in os.sched_getaffinity(0)})
        if sys.platform == "linux"
        else os.cpu_count() or 1
    )
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the process' cgroup (v2 or v1) and those above it grant; None where none is set."""
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
    """What the logical processors of one core have in common."""
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
    except (OSError, ValueError):  # "max", or none here
        return None


class KernelThreads:
    """`count` is how many threads to use next, at most `limit`; `note` records what each call took and lost."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = self.count = limit
        self._clock = clock
        self._spent = self._lost = 0.0
        self._hold = HOLD_S
        self._changed = self._retry = clock()

    def note(self, spent: float, lost: float) -> None:
        """A call took `spent` seconds, of which `lost` went by without all its threads."""
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
