"""What an adapter directory must be to be registered: whole, finite, of known files.

Stricter than what is checked at each load (`verify_adapter`, which this includes), since what is registered is
copied, file by file, to where tenants' adapters are kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pedro.adapter_directory import CONFIGS, mapped, tensor_heads, verify_adapter
from pedro.errors import AdapterError

KNOWN = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|pedro_adapter\.json|README\.md"
    r"|config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
EXPONENT = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # no infinities; all ones is NaN
}
"""By the dtypes of safetensors: how the numbers lie in the file, and their exponent's bits."""


def check_adapter(directory: str | Path, backbone_digest: str | None = None) -> dict[str, Any]:
    """The manifest of an adapter that may be registered; of this backbone, if one is given.

    Raises AdapterError that names the file or tensor at fault.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise AdapterError(f"directory: {directory} is not a directory; give that of an adapter", param="directory")
    for path in sorted(directory.iterdir()):
        if not path.is_symlink() and not KNOWN.fullmatch(path.name):
            raise AdapterError(f"{path.name}: is not a file of an adapter; leave it out of {directory}")
    manifest = verify_adapter(directory, backbone_digest)
    if not any((directory / name).is_file() for name in CONFIGS):
        raise AdapterError(
            f"{CONFIGS[0]}: not found in {directory}, so this is not an adapter; fetch the adapter again"
        )
    for file in sorted(directory.glob("*.safetensors")):
        _refuse_infinite(file)
    return manifest


def _refuse_infinite(file: Path) -> None:
    try:
        with safe_open(file, "np"), mapped(file) as view:  # safetensors checks the file as it opens it
            for name, dtype, _, _, begin, end in tensor_heads(file):
                if dtype in EXPONENT and not _is_finite(view[begin:end], *EXPONENT[dtype]):
                    raise AdapterError(f"{file.name}: {name} contains numbers that are not finite: training diverged")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{file.name}: is damaged ({error}); fetch the adapter again") from error


def _is_finite(data: bytes, kind: str, exponent: int) -> bool:
    """Whether no number has every bit of its exponent set, as NaN and the infinities have."""
    numbers = np.frombuffer(data, kind)
    return not bool(((numbers & exponent) == exponent).any())
