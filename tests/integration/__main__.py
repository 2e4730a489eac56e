"""`make integration`: walks the guide, tells each step as it is done, and sums up. Status 1 at the first that fails.

python -m integration [--keep] [--until STEP] [--skip STEP …] [--late N] [--two]
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.steps import DEV, STEPS, walk, with_two_workers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration", description=__doc__)
    names = [step.__name__ for step in STEPS]
    parser.add_argument("--keep", action="store_true", help="leave the folder with every pod's files and log")
    parser.add_argument("--until", choices=names, default=names[-1], help="the last step")
    parser.add_argument("--skip", choices=names, nargs="*", default=[], help="steps that are left out")
    late = "begin the Job `upgrade` after engines have failed to start so often"
    parser.add_argument("--late", type=int, default=0, metavar="N", help=late)
    parser.add_argument("--two", action="store_true", help="two workers from the start (with --skip two_workers)")
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs is ended as on Ctrl-C
    folder = Path(tempfile.mkdtemp(prefix="pi-", dir="/tmp"))
    began, failed, rows = time.monotonic(), "", []
    said: list[tuple[str, str]] = []
    try:
        with walk(folder, log) as state, uninterrupted_end():
            said, state.namespace.late = state.said, wanted.late
            if wanted.two:
                state.kubectl.overlays[DEV] = with_two_workers()
            for step in STEPS[: names.index(wanted.until) + 1]:
                if step.__name__ in wanted.skip:
                    continue
                title = (step.__doc__ or "").partition("\n")[0]
                log(f"== {step.__name__}: {title}")
                start = time.monotonic()
                try:
                    step(state)
                except Exception as error:  # noqa: BLE001 (told, and the status is 1)
                    failed = f"{type(error).__name__}: {error}"
                    state_of_all = state.namespace.state()
                    log(f"   FAILED after {time.monotonic() - start:.0f} s: {failed}\n{state_of_all}")
                    rows.append((step.__name__, "failed", time.monotonic() - start))
                    break
                rows.append((step.__name__, "ok", time.monotonic() - start))
                log(f"   ok, {time.monotonic() - start:.0f} s")
    finally:
        if wanted.keep or failed:
            log(f"files and logs of all pods, and the values of their Secrets: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    log("")
    for name, how, seconds in rows:
        log(f"{name:16} {how:7} {seconds:6.0f} s")
    for what, seen in said:
        log(f"{what}: {seen}")
    log(f"{'FAILED' if failed else 'ok'}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


@contextmanager
def uninterrupted_end() -> Iterator[None]:
    """From its end on, no signal keeps this process from ending all others."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # SIG_IGN would be passed on to whatever is started
        log("== ending every process")


def log(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
