"""The adapter directory as files: its manifest, its digests, what is refused. Imports neither torch nor PEFT.

A directory is a standard PEFT checkpoint (for full fine-tuning a transformers one) plus `pedro_adapter.json`. Weights
are safetensors only. Only fixed file names inside the directory are ever read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pedro.errors import AdapterError

MANIFEST = "pedro_adapter.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONFIGS = (CONFIG, "config.json")  # what says how the weights are read: an adapter's, a whole model's
FORMAT_VERSION = 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".npy", ".npz")
REQUIRED = ("format_version", "digest", "backbone", "method")
TYPES: dict[str, type] = {
    "digest": str,
    "config_digest": str,
    "manifest_digest": str,
    "backbone": dict,
    "backbone.id": str,
    "backbone.digest": str,
    "method": dict,
    "method.name": str,
    "method.options": dict,
    "prompt_format": dict,
    "metrics": dict,
    "trainable_parameters": int,
}
MAY_LACK = ("config_digest", "manifest_digest", "method.options", "prompt_format", "metrics", "trainable_parameters")
SPOKEN = {str: "text", dict: "an object", int: "a whole number"}
TensorHead = tuple[str, str, list[int], Path, int, int]  # as `tensor_heads` says
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors format
READ_BYTES = 1 << 20  # of weights at a time
MAX_JSON_BYTES = 16_000_000
SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size")  # what PEFT allocates by


def write_manifest(directory: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest of the weights and the config that lie in `directory`; returns the digest of the weights.

    format_version and the three digests are filled in, whatever `manifest` says they are.
    """
    digest = weights_digest(directory)
    known = {"format_version": FORMAT_VERSION, "digest": digest, "config_digest": config_digest(directory)}
    sealed = json.loads(json.dumps(manifest | known, allow_nan=False))  # as a reader will find it
    sealed["manifest_digest"] = manifest_digest(sealed)
    _write(directory / MANIFEST, json.dumps(sealed, indent=2, sort_keys=True) + "\n")
    return digest


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an adapter directory.

    Raises AdapterError if it is missing, unreadable, of another format, holds something of another type or was changed
    since it was written. Manifests of earlier releases lack a digest of themselves, which is not checked then.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest = _read_json(path)
    except FileNotFoundError:
        raise AdapterError(
            f"{MANIFEST}: not found in {directory}: adapters that PEFT saved lack it; train it with `pedro submit`, or "
            "write it: pedro.adapter_directory.write_manifest(directory, {'backbone': {'id': …, 'digest': …}, "
            "'method': {'name': 'lora', 'options': {}}, 'prompt_format': {'id': …, 'template': …}})"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{MANIFEST}: {directory} holds one that cannot be read; save the adapter again") from error
    if not isinstance(manifest, dict) or any(key not in manifest for key in REQUIRED):
        raise AdapterError(f"{MANIFEST}: expected an object with {', '.join(REQUIRED)}; save the adapter again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise AdapterError(
            f"{MANIFEST}: format_version {manifest['format_version']!r} is not {FORMAT_VERSION}; "
            "use the release of pedro that wrote it"
        )
    for field, kind in TYPES.items():
        _expect(manifest, field, kind)
    if manifest.get("manifest_digest"):
        _expect_digest(manifest, "manifest_digest", "manifest is", manifest_digest(manifest))
    return manifest


def weights_digest(directory: str | Path) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of the weights; the same however the file orders them.

    Raises AdapterError where there are no weights or a file is no safetensors.
    """
    return _Weights(Path(directory)).digest()


def config_digest(directory: str | Path) -> str:
    """sha256 over the names and bytes of the configs that say how the weights are read."""
    total = hashlib.sha256()
    for name in CONFIGS:
        if (Path(directory) / name).is_file():
            text = (Path(directory) / name).read_bytes()
            total.update(f"{name}:{hashlib.sha256(text).hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 over everything that a manifest says, the prompt's template too, but for this digest itself."""
    said = {key: value for key, value in manifest.items() if key != "manifest_digest"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def verify_adapter(
    directory: str | Path, backbone_digest: str | None, tokenizer_digests: Collection[str] = ()
) -> dict[str, Any]:
    """Check that an adapter directory is whole, holds no pickle and belongs to this backbone; return its manifest.

    `tokenizer_digests` are those of the backbone's tokenizer, by this release's formula and earlier ones; none: not
    checked, as with None for the backbone. Raises AdapterError, with both digests where backbone, tokenizer, weights
    or config are not the expected ones. Manifests of earlier releases have no digest of the config, which is not
    checked then.
    """
    directory = Path(directory)
    weights = _Weights(directory)
    _refuse_foreign_files(directory, weights)
    manifest = read_manifest(directory)
    expected = manifest["backbone"]["digest"]
    if backbone_digest is not None and expected != backbone_digest:
        raise AdapterError(
            f"backbone: the adapter was trained on {expected}, but the backbone here is {backbone_digest}; "
            "use the adapter's own backbone or train the adapter again",
            param="backbone",
        )
    if tokenizer_digests:
        check_tokenizer(manifest, tokenizer_digests)
    _expect_digest(manifest, "digest", "weights are", weights.digest())
    if manifest.get("config_digest"):
        _expect_digest(manifest, "config_digest", "config is", config_digest(directory))
    return manifest


def check_tokenizer(manifest: dict[str, Any], digests: Collection[str]) -> None:
    """Raise AdapterError where the adapter was trained with another tokenizer; old manifests may not say."""
    trained = manifest["backbone"].get("tokenizer_digest")
    if trained is not None and trained not in digests:
        raise AdapterError(
            f"backbone: the adapter was trained with the tokenizer {trained}, but the backbone here has "
            f"{next(iter(digests))}; restore the tokenizer's files, or train the adapter again",
            param="backbone",
        )


def _read_json(path: Path) -> Any:
    """What a small JSON file holds. Raises ValueError, RecursionError or OSError, whatever the file is."""
    about = path.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    if about.st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has {about.st_size:,} bytes, more than {MAX_JSON_BYTES:,}")
    return json.loads(path.read_text(encoding="utf-8"))


def _expect(manifest: dict[str, Any], field: str, kind: type[Any]) -> None:
    """Raise AdapterError unless a field of the manifest, `a` or `a.b`, is of this type; some may be missing."""
    *parents, name = field.split(".")
    value = (manifest[parents[0]] if parents else manifest).get(name)
    if not isinstance(value, kind) and not (value is None and field in MAY_LACK):
        raise AdapterError(
            f"{MANIFEST}: {field}: expected {SPOKEN[kind]}, got {value!r}; fetch the adapter again", param=field
        )


def _expect_digest(manifest: dict[str, Any], field: str, what: str, actual: str) -> None:
    if actual != manifest[field]:
        raise AdapterError(
            f"{field}: the {what} {actual}, but the manifest says {manifest[field]}; "
            "the adapter is damaged or was changed, fetch it again",
            param=field,
        )


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def mapped(file: Path) -> Iterator[mmap.mmap]:
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


class _Weights:
    """An adapter's weights by their headers, which are read once, when they are first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def files(self) -> list[Path]:
        """Every weight file that a loader might read: one of an adapter, one or more shards of a whole model."""
        files = [self._directory / name for name in _names(self._directory) if name.endswith(".safetensors")]
        if not files or ((self._directory / CONFIG).is_file() and self._directory / WEIGHTS not in files):
            raise AdapterError(f"{WEIGHTS}: not found in {self._directory}; fetch the adapter again")
        return files

    @cached_property
    def heads(self) -> list[TensorHead]:
        """What `tensor_heads` gives of all files, by name."""
        return sorted((head for file in self.files for head in tensor_heads(file)), key=lambda head: head[0])

    @property
    def largest(self) -> int:
        """The numbers of the largest tensor."""
        return max((math.prod(shape) for _, _, shape, *_ in self.heads), default=0)

    def digest(self) -> str:
        """See `weights_digest`."""
        total, room = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        with ExitStack() as stack:  # read, not mapped: a page that is looked at once costs more than its copy
            files = {file: stack.enter_context(file.open("rb", buffering=0)) for file in {h[3] for h in self.heads}}
            for name, dtype, shape, file, begin, end in self.heads:
                total.update(json.dumps([name, dtype, shape]).encode())
                files[file].seek(begin)
                while begin < end and (count := files[file].readinto(room[: end - begin])):
                    total.update(room[:count])
                    begin += count
        return f"sha256:{total.hexdigest()}"


def _names(directory: Path) -> list[str]:
    """What a directory holds, sorted; nothing where it is none. Raises OSError where it cannot be read now."""
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _entries(directory: Path) -> Iterator[os.DirEntry[str]]:
    """All that lies below a directory, however deep; links are not followed.

    Raises OSError where a folder cannot be read now: what nobody looked at is not taken.
    """
    folders: list[Path | str] = [directory]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield from entries
        folders += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _refuse_foreign_files(directory: Path, weights: _Weights) -> None:
    """Refuse pickles, links, what is no file, JSON beyond bounds, and an index that names other files than its own."""
    for entry in _entries(directory):
        if entry.name.lower().endswith(PICKLES):
            raise AdapterError(
                f"{entry.name}: may contain code (pickle) and is refused; save the adapter as safetensors"
            )
        if entry.is_symlink():
            raise AdapterError(f"{entry.name}: is a link, which may lead out of the adapter; copy the file instead")
        if not entry.is_file() and not entry.is_dir():
            raise AdapterError(f"{entry.name}: is neither a file nor a directory; fetch the adapter again")
    names = _names(directory)
    for name in CONFIGS:
        if (directory / name).is_file():
            _refuse_sizes(directory, name, weights)
    for index in (name for name in names if name.endswith(".index.json")):
        try:
            named = {str(name) for name in _read_json(directory / index)["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{index}: cannot be read; fetch the adapter again") from error
        if foreign := sorted(named - {name for name in names if name.endswith(".safetensors")}):
            raise AdapterError(f"{index}: names {foreign[0]!r}, which is no file of the adapter; fetch it again")


def _refuse_sizes(directory: Path, name: str, weights: _Weights) -> None:
    """Refuse a config that cannot be read, or by which more would be allocated than its weights can fill."""
    try:
        config = _read_json(directory / name)
        given = (
            {field: config[field] for field in SIZES if isinstance(config.get(field), int)} if name == CONFIG else {}
        )
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise AdapterError(f"{name}: cannot be read ({type(error).__name__}); fetch the adapter again") from error
    for field, size in given.items():
        if size > max(weights.largest, 1024):  # an adapter without tensors is small in any case
            raise AdapterError(
                f"{name}: {field} is {size:,}, but its largest tensor has {weights.largest:,} numbers; "
                "fetch the adapter again"
            )


def tensor_heads(file: Path) -> Iterator[TensorHead]:
    """(name, dtype, shape, file, first byte, byte after the last) of each tensor, from the header alone."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MAX_HEADER_BYTES, file.stat().st_size):
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start, size = 8 + length, file.stat().st_size
        for name, entry in header.items():
            numbers = (*entry["shape"], *entry["data_offsets"])
            if not isinstance(entry["dtype"], str) or any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError(f"{name} has a head of other types")
            begin, end = (start + offset for offset in entry["data_offsets"])
            if not start <= begin <= end <= size:
                raise ValueError(f"{name} lies outside the file")
            yield name, entry["dtype"], entry["shape"], file, begin, end
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise AdapterError(f"{file.name}: is damaged or not a safetensors file; fetch the adapter again") from error
