"""What pedro changes of the process that it runs in: PyTorch's threads, the interpreter's switching, the environment.

Serving and training own their processes and do so on purpose; whoever embeds them in a process of their own finds here
all that changes. Standard library, and torch where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

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
