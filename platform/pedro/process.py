"""What pedro changes of the process that it runs in: PyTorch's threads, the interpreter's switching, the environment.
And what the process takes of memory, as Linux tells it.

Serving and training own their processes and do so on purpose; whoever embeds them in a process of their own finds here
all that changes. Standard library, and torch where it is used.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROLLUP = Path("/proc/self/smaps_rollup")
M_MMAP_THRESHOLD = -3  # malloc.h
MEMORY_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip
SWITCH_S = 0.0005  # how long an event loop may keep the interpreter from the engine's thread


def configure_serving_process(threads: int) -> None:
    """For an engine beside an event loop: at most `threads` of PyTorch, quick turns between Python's threads, and less
    patience with an MLflow that does not answer, for which loaders of adapters wait."""
    set_torch_threads(threads)
    sys.setswitchinterval(SWITCH_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")  # s; 120 by default, which uploads of trainers may need


def freeze_heap() -> None:
    """Spare the garbage collector what a server made while starting, which lives as long as the process.

    A full collection stops every thread: 0.2 s for the 400,000 objects of an engine, PyTorch's and transformers' among
    them, in which no tenant gets a token. What is made from now on is collected as before.
    """
    import gc

    gc.collect()
    gc.freeze()


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


def return_freed_memory_at_once(least: int = 2**16) -> None:
    """Have blocks of at least so many bytes given back as soon as they are freed (glibc; else nothing).

    By itself glibc keeps more and more for its own, the larger the blocks are that it sees freed; what is smaller lies
    between blocks that are in use, and stays the process's.
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


def mapped_memory() -> int:
    """Bytes of files that are resident in this process's mappings, which others that map them share."""
    return _status("RssFile") or 0


def proportional_memory() -> int:
    """Bytes resident, shared ones divided by those who share them (Linux: Pss, proc(5)); 0 where that is not told."""
    return _status("Pss", ROLLUP) or 0


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a process may still take of this machine or of its container; None where neither tells."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used, parts, files in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most = int((cgroup / limit).read_text())
            taken = int((cgroup / used).read_text())
            stat = dict(line.split() for line in (cgroup / parts).read_text().splitlines())
        except (OSError, ValueError):  # there is no such group, or no limit ("max")
            continue
        free = min(free, max(0, most - taken + int(stat.get(files, 0))))  # files that were read give way
    return free


def parse_memory(text: str) -> int | float:
    """`4GiB`, `500 MB` or a number of bytes; `0.4`, up to 1.0, is a share. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) *([kmgt]?i?)b?", text.strip().lower())
    if found is not None and found[2] in MEMORY_UNITS:
        number, unit = float(found[1]), MEMORY_UNITS[found[2]]
        if "." in found[1] and not found[2]:
            if 0 < number <= 1:
                return number
        elif number * unit >= 1:
            return int(number * unit)
    raise ValueError(f"expected a size like 4GiB, or a share of free memory like 0.4, got {text!r}")


def _status(name: str, file: Path = STATUS) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
