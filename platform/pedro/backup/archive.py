"""The file of a backup: a tar in gzip with a header in front and the digest of each member at its end.

Reading trusts nothing: members must be plain files at known paths, each once, and a single wrong byte is reported
before any of it becomes visible. What the members mean is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pedro.errors import ConfigError, UnavailableError

FORMAT = 1
HEADER, CONTENTS = "pedro_backup.json", "contents.json"  # the first member and the last
STORE, REGISTRY = "store.jsonl", "mlflow.db"
FOLDERS = ("artifacts", "storage", "backbones", "comparisons")
PIECE = 1 << 20
SMALL = 64 << 20  # bytes that are read at once, so that a file that is written anew meanwhile does no harm
MAX_HEADER, MAX_CONTENTS = 1 << 20, 1 << 30
_PART = r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f\x7f\ud800-\udfff]+"
_NAME = re.compile(rf"{re.escape(STORE)}|{re.escape(REGISTRY)}|(?:{'|'.join(FOLDERS)})(?:/{_PART})+")


@dataclass(frozen=True)
class Header:
    """What an archive says of itself in front."""

    created: str
    release: str
    schema: str
    """Of the store's rows."""
    registry: str
    """`sqlite` where MLflow's database and artifacts are in the archive, else the address of its server."""
    storage: str
    """`folder` where it is in the archive, else its URL."""
    told: bool
    """Whether store and registry are of one moment."""
    bytes: int
    """About how much the members hold."""
    backbones: dict[str, Any] = field(default_factory=dict)
    """Of the home, each with its origin, also where their files are left out."""
    format: int = FORMAT


@dataclass(frozen=True)
class MemberDigest:
    bytes: int
    sha256: str


Sink = Callable[[str], AbstractContextManager[IO[bytes]]]


def may_be(name: str) -> bool:
    """Whether an archive may have a member of this name."""
    return _NAME.fullmatch(name) is not None


class ArchiveWriter:
    """Writes an archive into a stream. Whole once `close` has returned."""

    def __init__(self, stream: IO[bytes], header: Header) -> None:
        self.entries: dict[str, MemberDigest] = {}
        self._gzip = gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=1)
        self._tar = tarfile.open(fileobj=self._gzip, mode="w|")  # noqa: SIM115 (see `close`)
        self._put(HEADER, io.BytesIO(_json(asdict(header))), None)

    def add(self, name: str, path: Path) -> MemberDigest:
        """Add a file. Raises FileNotFoundError, and has added nothing, where it is gone."""
        assert may_be(name), f"{name} has no place in an archive"
        with path.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            if size > SMALL:
                return self._put(name, stream, size)
            return self._put(name, io.BytesIO(stream.read()), None)

    def close(self) -> None:
        """Write the digests and the end."""
        contents = {name: [entry.bytes, entry.sha256] for name, entry in self.entries.items()}
        self._put(CONTENTS, io.BytesIO(_json(contents)), None)
        self._tar.close()
        self._gzip.close()

    def _put(self, name: str, stream: IO[bytes], size: int | None) -> MemberDigest:
        info = tarfile.TarInfo(name)
        info.size = len(stream.getbuffer()) if isinstance(stream, io.BytesIO) else int(size or 0)
        info.mode = 0o600
        hashed = Hashing(stream)
        try:
            self._tar.addfile(info, hashed)
        except OSError as error:
            if error.errno is None:  # of tarfile: it is shorter now
                raise UnavailableError(f"{name} became shorter while it was read; take the backup again") from error
            raise
        entry = MemberDigest(info.size, hashed.hexdigest())
        if name not in (HEADER, CONTENTS):
            self.entries[name] = entry
        return entry


def read_archive(path: Path, begin: Callable[[Header], Sink], sha256: str | None = None) -> dict[str, MemberDigest]:
    """Read an archive from end to end; what each member holds is written to what the sink gives for its name.

    `begin` hears the header first and gives the sink; it may raise. Raises ConfigError where the file is no archive of
    ours, was cut off or is not, to the byte, what was written; or another than the one with digest `sha256`.
    """
    headed: list[Header] = []

    def began(header: Header) -> Sink:
        headed.append(header)
        return begin(header)

    try:
        with path.open("rb") as raw:
            whole = Hashing(raw)
            with gzip.GzipFile(fileobj=whole, mode="rb") as unpacked:  # type: ignore[call-overload]  # it only reads
                entries = _members(path, unpacked, began)
                while unpacked.read(PIECE):  # its checksum comes last
                    pass
    except FileNotFoundError as error:
        raise ConfigError(f"file: {path} is not there; name a file that `pedro backup` wrote", param="file") from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"file: {path} is a directory; name a file that `pedro backup` wrote", param="file"
        ) from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        if not headed:
            raise _foreign(path) from error
        raise _damaged(path, str(error) or type(error).__name__) from error
    if sha256 is not None and whole.hexdigest() != sha256.removeprefix("sha256:"):
        raise ConfigError(f"file: {path} is sha256:{whole.hexdigest()}, not {sha256}", param="file")
    return entries


class Hashing:
    """Reads a stream on and knows the sha256 of what it has read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._hash.update(piece)
        return piece

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _members(path: Path, unpacked: IO[bytes], begin: Callable[[Header], Sink]) -> dict[str, MemberDigest]:
    found: dict[str, MemberDigest] = {}
    with tarfile.open(fileobj=unpacked, mode="r|") as tar:
        members = iter(tar)
        sink = begin(_header(path, tar, next(members, None)))
        for member in members:
            if member.name == CONTENTS and member.isreg():
                told = _contents(path, _content(path, tar, member, MAX_CONTENTS))
                break
            _check(path, member, found)
            with sink(member.name) as target:
                found[member.name] = _copy(tar, member, target)
        else:
            raise _damaged(path, "its end is missing")
        if next(members, None) is not None:
            raise _damaged(path, "something follows its end")
    for name in sorted(told.keys() | found.keys()):
        if told.get(name) != found.get(name):
            raise _damaged(path, f"{name} is not what was written")
    if STORE not in found:
        raise _damaged(path, f"it has no {STORE}")
    return found


def _check(path: Path, member: tarfile.TarInfo, found: dict[str, MemberDigest]) -> None:
    """Refuse a member that is no plain file, has no place in a home, or comes twice."""
    if not member.isreg() or member.issparse():
        raise _damaged(path, f"{member.name!r} is no plain file")
    if not may_be(member.name):
        raise _damaged(path, f"{member.name!r} has no place in a home")
    if member.name in found:
        raise _damaged(path, f"{member.name!r} comes twice")
    with contextlib.suppress(AttributeError):  # Python has filters from 3.11.4 on; what is checked above suffices
        tarfile.data_filter(member, "/nowhere")


def _header(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Header:
    if member is None or member.name != HEADER or not member.isreg():
        raise _foreign(path)
    try:
        fields = json.loads(_content(path, tar, member, MAX_HEADER))
        if fields["format"] != FORMAT:
            raise ConfigError(
                f"file: {path} was written by pedro {fields['release']}, in a format of its own; restore it with that "
                "release",
                param="file",
            )
        header = Header(**fields)
        texts = (header.created, header.release, header.schema, header.registry, header.storage)
        whole = all(text is None or isinstance(text, str) for text in texts) and isinstance(header.bytes, int)
        if not whole or not isinstance(header.backbones, dict):
            raise TypeError("a field of another type")
        return header
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign(path) from error


def _content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    stream = tar.extractfile(member)
    if stream is None or member.size > most:
        raise _damaged(path, f"{member.name} is too large")
    return stream.read()


def _contents(path: Path, text: bytes) -> dict[str, MemberDigest]:
    try:
        return {str(name): MemberDigest(int(size), str(digest)) for name, (size, digest) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its {CONTENTS} cannot be read") from error


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, target: IO[bytes]) -> MemberDigest:
    stream = tar.extractfile(member)
    assert stream is not None, f"{member.name} is a file"
    hashed, size = Hashing(stream), 0
    while piece := hashed.read(PIECE):
        target.write(piece)
        size += len(piece)
    return MemberDigest(size, hashed.hexdigest())


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(f"file: {path} is damaged or was changed ({why}); restore another backup", param="file")


def _foreign(path: Path) -> ConfigError:
    return ConfigError(f"file: {path} is no backup of pedro; name a file that `pedro backup` wrote", param="file")


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


@contextlib.contextmanager
def nowhere(_name: str) -> Iterator[IO[bytes]]:
    """A sink that keeps nothing: for looking whether an archive is whole."""
    yield _Nowhere()


class _Nowhere(io.BytesIO):
    def write(self, data: Any) -> int:
        return len(data)
