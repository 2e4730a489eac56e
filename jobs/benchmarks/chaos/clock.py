"""Has the wall clock of processes jump: a library that they are started with, and the file that says by how much."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clock:
    """A clock for whatever is started with `env`; it is right until `set`."""

    def __init__(self, folder: Path, library: Path) -> None:
        self._offset = folder / "clock"
        self._offset.write_bytes(bytes(8))
        self.env = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._offset)}

    def set(self, seconds: float) -> None:
        """So far from the true time from now on."""
        with self._offset.open("r+b") as file:  # processes have this very file mapped
            file.write(struct.pack("=q", int(seconds * 1e9)))


def make_clock(folder: Path) -> Clock | None:
    """A clock whose files are in `folder`; None where there is no compiler, or another system than Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "clock.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return Clock(folder, library)
