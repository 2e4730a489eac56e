"""Reports lost workers in the job's log, since Ray Train replaces them silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback


class TellLosses(UserCallback):
    """Runs in Ray Train's controller; `pedro jobs logs` shows its lines that begin with `worker `."""

    def __init__(self, max_failures: int) -> None:
        self._max, self._count = max_failures, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train."""
        self.tell(worker_exceptions)

    def tell(self, lost: Mapping[int, Exception]) -> None:
        """One line per loss, of one or several workers."""
        self._count += 1
        ranks = ", ".join(str(rank) for rank in sorted(lost))
        what = f"worker {ranks} was lost" if len(lost) == 1 else f"worker processes {ranks} were lost"
        why = reason(next(iter(lost.values())))
        then = "no more are replaced"
        if self._count <= self._max:
            then = f"replaced, {self._count} of at most {self._max} times; training resumes from the last checkpoint"
        print(f"{what} ({why}); {then}", flush=True)


def reason(error: BaseException) -> str:
    """The last line of the root cause of a Ray error."""
    bottom = getattr(error, "health_check_failure", None) or getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(bottom).splitlines() if line.strip()]
    died = next((line for line in lines if "died" in line), None)
    return (died or (lines[-1] if lines else type(bottom).__name__))[:200].rstrip(".")
