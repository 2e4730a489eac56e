"""Finds the processes of one home, so that a benchmark can end one as a failing machine would."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

GONE_S = 60.0


def of_home(home: Path, title: str) -> list[psutil.Process]:
    """Those whose command line holds `title`; another home's are never among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if title in " ".join(process.cmdline()) and process.environ().get("PEDRO_HOME") == str(home):
                found.append(process)
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    assert processes, "there is nothing to kill"
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=GONE_S)
