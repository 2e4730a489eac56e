"""Compiles, caches and loads `native.c` with the headers beside it. `native_model.py` packs models for it.

The first engine on a machine compiles the kernel (about two seconds) into the user's cache directory, under the hash of
source, compiler, flags and processor. Without a compiler the engine runs on PyTorch only, and logs this.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_float, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

from pedro.adapter_kinds import SITES  # in the order of native.c's enum

log = logging.getLogger(__name__)
HEADERS = ("decode_attention.h", "quantised.h", "thread_pool.h")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", *HEADERS))
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-shared", "-fPIC")


class LayerStruct(ctypes.Structure):
    """`Layer` of native.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm", "qkv", "o", "gate_up", "down")),
        *((name, c_void_p * len(SITES)) for name in ("bias", "scale", "shift")),
        *((name, c_void_p) for name in ("keys", "values", "kept_keys", "kept_values")),
        ("window", c_long),
    ]


class SpanStruct(ctypes.Structure):
    """`Span` of native.c."""

    _fields_ = [("start", c_long), ("count", c_long)]


class BorrowedStruct(ctypes.Structure):
    """`Borrowed` of native.c."""

    _fields_ = [("count", c_long), ("spans", c_long), ("span", POINTER(SpanStruct))]


class ModelStruct(ctypes.Structure):
    """`Model` of native.c."""

    _fields_ = [
        *((name, c_long) for name in ("layers", "dim", "heads", "kv_heads", "head_dim", "rotary", "ffn", "vocab")),
        *((name, c_long) for name in ("length", "slots", "threads", "activation", "weights", "head_weights")),
        *((name, c_float) for name in ("eps", "scaling", "embed_scale", "pad")),
        *((name, c_void_p) for name in ("embed", "final_norm", "head", "cos", "sin")),
        ("layer", POINTER(LayerStruct)),
        ("kept", c_long),
        ("borrowed", POINTER(BorrowedStruct)),
        ("lora", c_void_p),
        ("ranks", c_void_p),
        ("max_rank", c_long),
        ("spent", c_double),
        ("lost", c_double),
    ]


class GeneratorStruct(ctypes.Structure):
    """`Generator` of native.c."""

    _fields_ = [
        *((name, c_void_p) for name in ("down", "up", "bias", "a", "b")),
        *(
            (name, c_long)
            for name in ("rank", "width", "above", "below", "activation", "pool", "residual", "window", "sites")
        ),
        ("site", c_long * len(SITES)),
    ]


class BatchStruct(ctypes.Structure):
    """`Batch` of native.c."""

    _fields_ = [
        ("rows", c_long),
        ("lora", c_long),
        ("shared", c_long),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "mods")),
        *((name, c_void_p) for name in ("x", "qkv", "mixed", "act", "low", "packed")),
        ("prompts", c_long),
        *((name, c_void_p) for name in ("starts", "conditioned", "generators")),
        ("asked", c_long),
        ("asked_rows", c_void_p),
        ("logits", c_void_p),
        ("best", POINTER(c_int)),
        ("best_value", c_void_p),
        ("best_at", c_void_p),
    ]


class CopyStruct(ctypes.Structure):
    """`Copy` of native.c."""

    _fields_ = [
        *((name, POINTER(c_void_p)) for name in ("to", "from_")),
        *((name, c_long) for name in ("to_at", "to_stride", "from_at", "from_stride", "heads", "count", "fresh")),
    ]


@cache
def load_kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None if it cannot be built; the reason is logged once."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler was found: the engine decodes with PyTorch, at about half the speed")
        return None
    try:
        kernel = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        log.warning("the CPU kernel could not be built, so the engine decodes with PyTorch: %s", detail)
        return None
    kernel.pedro_simd_width.restype = c_long
    for name, last in {"embed": (), "generate": (c_long,), "prefill": (c_long,), "logits": (), "decode": ()}.items():
        function = getattr(kernel, f"pedro_{name}")
        function.argtypes, function.restype = (POINTER(ModelStruct), POINTER(BatchStruct), *last), None
    kernel.pedro_copy.argtypes, kernel.pedro_copy.restype = (c_long, c_long, POINTER(CopyStruct)), None
    pointers = POINTER(c_void_p)
    kernel.pedro_likeliest.argtypes = (c_long, pointers, pointers, c_long, c_long, POINTER(c_int))
    kernel.pedro_likeliest.restype = None
    return kernel


def _built(compiler: str) -> Path:
    """The shared library, compiled first if this machine has none."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = "\0".join((*(source.read_text() for source in SOURCES), compiler, version, *FLAGS, _processor()))
    target = _cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "kernel.so"
            command = [compiler, *FLAGS, "-o", str(made), str(SOURCES[0]), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            made.replace(target)
    return target


def _cache_directory() -> Path:
    """The user's own cache, else a private temporary directory, since code is loaded from it."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pedro" / "kernels"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(root, os.W_OK) and root.stat().st_uid == os.getuid():
            return root
    except (OSError, RuntimeError):  # RuntimeError: the user has no home directory
        pass
    return Path(tempfile.mkdtemp(prefix="pedro-kernels-"))


def _processor() -> str:
    """Identifies the processor model: a library compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
