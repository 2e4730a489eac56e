"""What pedro changes of the process that it runs in: PyTorch's threads, the interpreter's switching, the environment.
And what the process takes of memory, as Linux tells it.

Serving and training own their processes and do so on purpose; whoever embeds them in a process of their own finds here
all that changes. Standard library, and torch where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD = -3  # malloc.h
SWITCH_S = 0.0005  # how long an event loop may keep the interpreter from the engine's thread


def configure_serving_process(threads: int) -> None:
    """For an engine beside an event loop: at most `threads` of PyTorch, and quick turns between Python's threads."""
    set_torch_threads(threads)
    sys.setswitchinterval(SWITCH_S)


def set_torch_threads(threads: int) -> None:
    """How many threads PyTorch's kernels use in this process."""
    import torch

    torch.set_num_threads(threads)


def update_environment(values: Mapping[str, str]) -> None:
    """Set environment variables, for libraries that read theirs once and for the processes that start from here."""
    os.environ.update(values)


def reset_peak_memory() -> bool:
    """Forget this process's peak so far; whether the system could (Linux: VmHWM starts anew, proc(5))."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def release_freed_memory() -> None:
    """Give freed memory back to the system, so that what is taken next is seen to be taken (glibc; else nothing)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_freed_memory_at_once(least: int = 2**20) -> None:
    """Have blocks of at least so many bytes given back as soon as they are freed (glibc; else nothing).

    By itself glibc keeps more and more for its own, the larger the blocks are that it sees freed.
    """
    import ctypes

    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(M_MMAP_THRESHOLD, least)


def peak_memory() -> int:
    """The most bytes that this process had resident, since its start or the last reset."""
    found = _status("VmHWM")
    if found is None:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def resident_memory() -> int:
    """Bytes that this process has resident; 0 where the system does not tell."""
    return _status("VmRSS") or 0


def available_memory() -> int | None:
    """Bytes that a process may still take of this machine or of its container; None where neither tells."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
