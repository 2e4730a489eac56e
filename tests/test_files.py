"""Uploaded files as wholes: there with row and bytes, or not at all, whatever the storage does."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pedro.errors import NotFoundError, PedroError, UnavailableError
from pedro.files import FileLimits, Files, check_content, check_expiry, check_filename, check_purpose
from pedro.store import Store

ROW = b'{"prompt": "a", "completion": "b"}\n'


class FailingStorage(MemoryFileSystem):
    """A storage in memory whose disk is full, or whose files stay, where a test says so."""

    protocol = "failing"
    store: dict = {}  # noqa: RUF012 - as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    failing: set[str] = set()  # noqa: RUF012

    def _open(self, path, mode="rb", **kwargs):
        stream = super()._open(path, mode, **kwargs)
        if "write" in self.failing and mode == "wb":
            stream.write = self._refuse
        return stream

    def rm_file(self, path):
        if "remove" in self.failing:
            self._refuse()
        super().rm_file(path)

    def _refuse(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")


fsspec.register_implementation("failing", FailingStorage, clobber=True)


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/pedro.db")
    yield store
    store.close()


@pytest.fixture(params=["folder", "file", "memory"])
def storage(request, tmp_path):
    return {
        "folder": f"{tmp_path}/storage",
        "file": f"file://{tmp_path}/storage",
        "memory": f"memory://{uuid.uuid4().hex}",
    }[request.param]


@pytest.fixture
def failing():
    FailingStorage.failing = set()
    FailingStorage.store.clear()
    yield FailingStorage.failing
    FailingStorage.failing = set()


def upload(files: Files, data: bytes = ROW, name: str = "train.jsonl", purpose: str = "fine-tune", **how):
    growing = files.begin("acme")
    try:
        for start in range(0, len(data), 1000):
            growing.write(data[start : start + 1000])
        return files.finish(growing, name, purpose, **how)
    finally:
        growing.abandon()


def stored(storage: str) -> list[str]:
    """Every file in the storage."""
    system, root = fsspec.core.url_to_fs(storage)
    return sorted(path.removeprefix(root).lstrip("/") for path in system.find(root))


def test_a_file_comes_back_as_it_was_sent(store, storage):
    files = Files(store, storage)
    data = ROW * 5000
    record = upload(files, data, "a b.csv.gz" if storage.startswith("file") else "train.jsonl")
    assert record.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert record.bytes == len(data)
    with files.open(files.get(record.id, "acme")) as stream:
        assert stream.read() == data
    assert stored(storage) == [record.location]
    files.delete(record)
    assert stored(storage) == []
    with pytest.raises(NotFoundError):
        files.get(record.id, "acme")


def test_equal_contents_of_two_tenants_share_nothing(store, tmp_path):
    files = Files(store, str(tmp_path))
    places = set()
    for tenant in ("acme", "globex"):
        growing = files.begin(tenant)
        growing.write(ROW)
        places.add(Path(files.contents.url(files.finish(growing, "train.jsonl", "fine-tune").location)))
    assert len({place.stat().st_ino for place in places}) == 2
    assert {place.parent.name for place in places} == {"acme", "globex"}


@pytest.mark.parametrize(
    ("data", "name", "purpose", "said"),
    [
        (b"", "a.jsonl", "fine-tune", "empty"),
        (b"PK\x03\x04rest", "a.xlsx", "fine-tune", "zip"),
        (b"\xff\xfe{\0", "a.jsonl", "fine-tune", "UTF-16"),
        (b"\x89PNG\r\n\x1a\n", "a.png", "fine-tune", "UTF-8"),
        (b"a\0b", "a.jsonl", "fine-tune", "zero bytes"),
        (gzip.compress(ROW, mtime=0), "a.jsonl.gz", "batch", "packed"),
        (ROW, "", "fine-tune", "characters"),
        (ROW, "..", "fine-tune", "characters"),
        (ROW, "x" * 256, "fine-tune", "characters"),
        (ROW, "../a.jsonl", "fine-tune", "path"),
        (ROW, "a\\b.jsonl", "fine-tune", "path"),
        (ROW, "a\nb.jsonl", "fine-tune", "control"),
        (ROW, "a\u202eb.jsonl", "fine-tune", "control"),
        (ROW, "a.jsonl", "vision", "not supported"),
        (ROW, "a.jsonl", "nonsense", "expected"),
    ],
)
def test_what_is_not_taken_is_named_and_leaves_nothing(store, tmp_path, data, name, purpose, said):
    files = Files(store, f"{tmp_path}/storage")
    with pytest.raises(PedroError, match=said) as error:
        upload(files, data, name, purpose)
    assert error.value.status == 400
    assert error.value.param in ("file", "purpose")
    assert stored(f"{tmp_path}/storage") == []
    assert files.list_files(None) == []


@pytest.mark.parametrize(
    "data", [ROW, b"\xef\xbb\xbf" + ROW, gzip.compress(ROW, mtime=0), b"PAR1 and more", b"no json at all"]
)
def test_what_may_be_data_is_taken_as_it_is(data):
    check_content(data, "fine-tune")


def test_a_character_cut_by_the_end_of_the_first_bytes_is_none_to_blame():
    text = ("x" * (2**16 - 1) + "é").encode()
    check_content(text[: 2**16], "fine-tune")
    with pytest.raises(PedroError, match="UTF-8"):
        check_content(text[: 2**16][1:], "fine-tune")  # here the file ends so


def test_names_purposes_and_times_that_are_taken():
    assert check_filename("Größe 1 (neu).jsonl") == "Größe 1 (neu).jsonl"
    assert check_purpose("batch") == "batch"
    assert check_expiry(None, None) is None
    assert check_expiry("created_at", "3600") == 3600
    for anchor, seconds in [("created_at", "3599"), ("created_at", "2592001"), ("last_used", "3600"), (None, "3600")]:
        with pytest.raises(PedroError, match="expires_after"):
            check_expiry(anchor, seconds)
    for seconds in (None, "", "1e4", "²", "-5"):
        with pytest.raises(PedroError, match=r"expires_after\[seconds\]"):
            check_expiry("created_at", seconds)


def test_a_batchs_file_ends_after_30_days_and_any_other_is_kept(store, tmp_path):
    files = Files(store, str(tmp_path))
    batch, kept = upload(files, purpose="batch"), upload(files)
    asked = upload(files, expires_after_s=7200)
    assert batch.expires == int(batch.created) + 30 * 24 * 3600
    assert kept.expires is None
    assert asked.expires == int(asked.created) + 7200


def test_a_file_that_is_too_large_is_refused_at_the_piece_that_makes_it_so(store, tmp_path):
    files = Files(store, f"{tmp_path}/storage", FileLimits(file_bytes=1500))
    growing = files.begin("acme")
    growing.write(b"x" * 1000)
    with pytest.raises(PedroError, match="1,500") as error:
        growing.write(b"x" * 1000)
    growing.abandon()
    assert error.value.status == 413
    assert stored(f"{tmp_path}/storage") == []


def test_a_tenant_without_room_is_refused_before_and_after_the_bytes(store, tmp_path):
    files = Files(store, f"{tmp_path}/storage", FileLimits(tenant_bytes=50))
    files.check_room("acme", 50)
    kept = upload(files)
    with pytest.raises(PedroError, match="delete some"):
        files.check_room("acme", 50)
    with pytest.raises(PedroError) as error:
        upload(files)
    assert error.value.code == "file_quota_exceeded"
    assert stored(f"{tmp_path}/storage") == [kept.location]
    files.check_room("globex", 50)


def test_a_full_disk_is_told_without_a_word_of_the_host_and_leaves_nothing(store, failing):
    files = Files(store, "failing://bucket")
    kept = upload(files)
    failing.add("write")
    with pytest.raises(UnavailableError) as error:
        upload(files)
    assert (error.value.status, error.value.code) == (503, "storage")
    assert "secret" not in str(error.value.body())
    assert stored("failing://bucket") == [kept.location]
    assert [one.id for one in files.list_files("acme")] == [kept.id]


def test_a_file_whose_bytes_cannot_be_removed_is_not_said_to_be_deleted(store, failing):
    files = Files(store, "failing://bucket")
    kept = upload(files)
    failing.add("remove")
    with pytest.raises(UnavailableError):
        files.delete(kept)
    assert files.get(kept.id, "acme") == kept
    failing.clear()
    files.delete(kept)
    assert stored("failing://bucket") == []


UPLOADING = """
import sys, time
from pedro.files import Files
from pedro.store import Store

growing = Files(Store(sys.argv[1]), sys.argv[2]).begin("acme")
growing.write(b"x" * 100_000)
print("growing", flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_left_is_removed_once_it_is_old_and_what_grows_is_not(store, tmp_path):
    storage = f"{tmp_path}/storage"
    files = Files(store, storage)
    arguments = [sys.executable, "-c", UPLOADING, f"sqlite:///{tmp_path}/pedro.db", storage]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "growing\n"
        process.send_signal(signal.SIGKILL)
    (left,) = stored(storage)
    growing = files.begin("acme")
    growing.write(ROW)
    os.utime(f"{storage}/{left}", (0, 0))
    assert files.sweep() == 1
    record = files.finish(growing, "train.jsonl", "fine-tune")
    assert stored(storage) == [record.location]


def test_an_upload_abandoned_while_a_thread_writes_it_leaves_nothing(store, tmp_path):
    files = Files(store, f"{tmp_path}/storage")
    growing = files.begin("acme")
    started, ended = threading.Event(), []

    def write() -> None:
        try:
            while True:
                growing.write(b"x" * 1000)
                started.set()
        except AssertionError:
            ended.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    assert started.wait(60)
    growing.abandon()
    thread.join(60)
    assert ended
    assert stored(f"{tmp_path}/storage") == []
