"""What is no whole backup, or has no place, is refused in one line, and nothing of it is left anywhere."""

from __future__ import annotations

import errno
import gzip
import json
import os
import tarfile
import zlib
from contextlib import suppress

import pytest
from backup_homes import (
    back_up,
    files_of,
    frozen_home,
    members_of,
    plain,
    restore,
    rewritten,
    rows_of,
    settings_of,
    with_rows,
)
from cli_commands import command_runner

from pedro.backup.archive import CONTENTS, HEADER, may_be
from pedro.errors import ConfigError, ConflictError, UnavailableError
from pedro.registry import Registry
from pedro.store import Store

WHERE = ("PEDRO_HOME", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "MLFLOW_TRACKING_URI")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    settings, _ = frozen_home(folder)
    Registry.open(settings).rollback("acme.colours")
    return back_up(settings, folder / "backup.tar.gz")


@pytest.fixture
def new(tmp_path):
    """The settings of a home that is not there."""
    return settings_of(tmp_path / "new")


@pytest.fixture
def pedro(monkeypatch, capfd, tmp_path):
    for name in WHERE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "new"))
    return command_runner(monkeypatch, capfd)


def refused(settings, source, match, error=ConfigError, **options):
    """Restoring raises one line, and leaves the home as it was."""
    before = files_of(settings.home)
    with pytest.raises(error, match=match) as raised:
        restore(settings, source, **options)
    assert "\n" not in raised.value.message
    assert files_of(settings.home) == before
    assert settings.home.exists() or not before


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.999, -1])
def test_an_archive_that_was_cut_off_is_refused(archive, new, tmp_path, kept):
    whole = archive.read_bytes()
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(whole[: int(kept * len(whole)) if kept >= 0 else -1])
    refused(new, cut, "is damaged or was changed|is no backup of pedro")
    assert not new.home.exists()
    with pytest.raises(ConfigError):
        restore(new, cut, dry_run=True)


def unpacked(packed):
    with suppress(OSError, EOFError, zlib.error):
        return gzip.decompress(packed)
    return None


def test_a_byte_that_was_changed_anywhere_is_noticed(archive, new, tmp_path):
    whole = bytearray(archive.read_bytes())
    for part in range(1, 12):
        at = len(whole) * part // 12
        whole[at] ^= 0x10
        (tmp_path / "flipped.tar.gz").write_bytes(whole)
        if unpacked(whole) == unpacked(archive.read_bytes()):
            whole[at] ^= 0x10
            continue  # one of the bits before a stored block, which nobody reads
        refused(new, tmp_path / "flipped.tar.gz", "is damaged or was changed")
        whole[at] ^= 0x10


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b" + bytes(100)])
def test_a_file_that_is_no_archive_is_called_so(new, tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    refused(new, tmp_path / "foreign", "is no backup of pedro")
    refused(new, tmp_path / "missing", "is not there")
    refused(new, tmp_path, "is a directory")


def test_a_tar_of_somebody_else_is_called_so_before_it_is_unpacked(new, tmp_path):
    with tarfile.open(tmp_path / "foreign.tar.gz", "w:gz") as tar:
        tar.add(__file__, "artifacts/a")
    refused(new, tmp_path / "foreign.tar.gz", "is no backup of pedro")


OUTSIDE = (
    "../outside",
    "artifacts/../../outside",
    "/tmp/outside",
    "artifacts//outside",
    "artifacts/./outside",
    "artifacts/a\\..\\outside",
    "artifacts/a\nb",
    "artifacts",
    "secrets/key",
    "pedro.db",
    "store.jsonl/x",
)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_home_is_refused(archive, new, tmp_path, name):
    assert not may_be(name)

    def change(members):
        end = members.pop(CONTENTS)
        members["evil"] = plain(name, b"evil")
        members[CONTENTS] = end

    refused(new, rewritten(archive, tmp_path / "evil.tar.gz", change), "has no place in a home")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_devices_and_folders_are_refused(archive, new, tmp_path, kind):
    def change(members):
        end = members.pop(CONTENTS)
        members["evil"] = plain("artifacts/evil", b"", type=kind, linkname="/etc/passwd")
        members[CONTENTS] = end

    refused(new, rewritten(archive, tmp_path / "evil.tar.gz", change), "is no plain file")


def test_members_that_are_others_missing_doubled_or_too_many_are_noticed(archive, new, tmp_path):
    name = next(name for name in members_of(archive) if name.endswith("adapter_model.safetensors"))

    def other(members):
        members[name] = (members[name][0], members[name][1][:-1] + b"\x00\x01")

    def added(members):
        end = members.pop(CONTENTS)
        members["more"] = plain("artifacts/more", b"more")
        members[CONTENTS] = end

    def doubled(members):
        end = members.pop(CONTENTS)
        members["twice"] = plain(name, members[name][1])
        members[CONTENTS] = end

    def behind(members):
        members["more"] = plain("artifacts/more", b"more")

    for change, match in (
        (other, "is not what was written"),
        (lambda members: members.pop(name) and None, "is not what was written"),
        (added, "artifacts/more is not what was written"),
        (doubled, "comes twice"),
        (behind, "something follows its end"),
        (lambda members: members.pop(CONTENTS) and None, "its end is missing"),
        (lambda members: members.pop("store.jsonl") and None, "store.jsonl is not what was written"),
    ):
        refused(new, rewritten(archive, tmp_path / "changed.tar.gz", change), match)
    assert not new.home.exists()


def test_an_archive_of_a_newer_release_is_refused_before_it_is_unpacked(archive, new, tmp_path):
    def header(**fields):
        def change(members):
            found = json.loads(members[HEADER][1]) | fields
            members[HEADER] = (members[HEADER][0], json.dumps(found).encode())

        return rewritten(archive, tmp_path / "newer.tar.gz", change)

    refused(new, header(schema="0999"), r"schema 0999 of a newer release.*restore it with that release")
    refused(new, header(format=2, release="9.0"), r"was written by pedro 9\.0.*restore it with that release")
    refused(new, header(surprise=1), "is no backup of pedro")
    for wrong in ({"bytes": "x"}, {"backbones": []}, {"schema": 3}):
        refused(new, header(**wrong), "is no backup of pedro")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: rows.replace('"pedro_jobs"', '"pedro_else"'), "'pedro_else' is no table"),
        (lambda rows: rows.replace('"hint"', '"hunt"'), "pedro_keys has other columns"),
        (lambda rows: rows + rows.splitlines()[-1] + "\n", "does not take them"),
        (lambda rows: rows + "text\n", "is no row"),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_leave_no_database(archive, new, tmp_path, change, match):
    refused(new, with_rows(archive, tmp_path / "rows.tar.gz", change), match)
    assert not new.home.exists()


def test_a_home_with_anything_in_it_stays_as_it_is(archive, new, tmp_path):
    restore(new, archive)
    rows = rows_of(new.database_url)
    refused(new, archive, r"has rows.*set PEDRO_HOME to a new folder", ConflictError)
    assert rows_of(new.database_url) == rows
    elsewhere = settings_of(new.home, f"sqlite:///{tmp_path}/other.db")
    refused(elsewhere, archive, r"mlflow\.db already exists.*set PEDRO_HOME to a new folder", ConflictError)
    (new.home / "mlflow.db").unlink()
    refused(elsewhere, archive, "artifacts already exists", ConflictError)
    assert not (tmp_path / "other.db").exists()


def test_a_database_with_rows_is_refused_whatever_kind(archive, url, tmp_path):
    store = Store(url)
    store.create_key("acme")
    refused(settings_of(tmp_path / "new", url), archive, "pedro_keys has rows|pedro_audit has rows", ConflictError)
    assert len(store.list_keys()) == 1
    store.close()
    assert not (tmp_path / "new").exists()


def test_settings_that_have_no_place_for_a_part_are_told_which(archive, tmp_path):
    home = tmp_path / "new"
    on_server = settings_of(home, MLFLOW_TRACKING_URI="http://user:word@127.0.0.1:9/")
    refused(on_server, archive, r"MLFLOW_TRACKING_URI: .*made beside MLflow on sqlite.*unset MLFLOW_TRACKING_URI")
    refused(settings_of(home, PEDRO_STORAGE="memory://x"), archive, r"PEDRO_STORAGE: .*set it to a folder")
    assert not home.exists()


def test_a_backup_beside_services_says_what_is_not_in_it_and_is_restored_beside_them(tmp_path):
    services = {"MLFLOW_TRACKING_URI": "http://user:word@127.0.0.1:9", "PEDRO_STORAGE": "memory://bucket"}
    settings = settings_of(tmp_path / "home", **services)
    store = Store(settings.database_url)
    store.create_key("acme")
    store.close()
    made = back_up(settings, tmp_path / "backup.tar.gz")
    assert set(members_of(made)) == {HEADER, "store.jsonl", CONTENTS}
    assert b"word" not in members_of(made)[HEADER][1]
    refused(
        settings_of(tmp_path / "new"), made, r"made beside MLflow on http://…@127\.0\.0\.1:9.*set MLFLOW_TRACKING_URI"
    )
    restored = restore(settings_of(tmp_path / "new", **services), made)
    assert restored.unseen == ["http://…@127.0.0.1:9", "memory://bucket"]
    assert rows_of(f"sqlite:///{tmp_path}/new/pedro.db") == rows_of(settings.database_url)


def test_a_disk_that_gets_full_leaves_nothing(archive, new, tmp_path, monkeypatch):
    class Full:
        """A disk that takes so many files."""

        def __init__(self, room: int) -> None:
            self.room = room

        def open(self, path, flags, *arguments, **options):
            self.room -= bool(flags & os.O_CREAT)
            if self.room < 0 and flags & os.O_CREAT:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return opened(path, flags, *arguments, **options)

    opened = os.open
    for room in (0, 1, 3, 8):
        with monkeypatch.context() as patched:
            patched.setattr("pedro.backup.staging.os.open", Full(room).open)
            refused(new, archive, "No space left on device", UnavailableError)
        assert not new.home.exists()
    restore(new, archive)
    with monkeypatch.context() as patched:
        patched.setattr("pedro.backup.make.os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(UnavailableError, match="nothing was kept"):
            back_up(new, tmp_path / "more.tar.gz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_what_cannot_be_committed_is_hidden_again(archive, new, monkeypatch):
    from pedro.backup.staging import Staging

    publish = Staging.publish

    def broken(self):
        publish(self)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "publish", broken)
        refused(new, archive, "Input/output error", UnavailableError)
    assert not new.home.exists()
    restore(new, archive)


def test_a_place_that_cannot_be_written_is_told(archive, new, tmp_path):
    restore(new, archive)
    (tmp_path / "file").touch()
    for target, match in (
        (archive, "exists already"),
        (tmp_path / "no" / "where.tar.gz", "is not a folder; create it first"),
        (tmp_path / "file" / "below.tar.gz", "is not a folder"),
        (new.home / "storage" / "backup.tar.gz", "which is backed up"),
    ):
        with pytest.raises(ConfigError, match=match):
            back_up(new, target)
    with pytest.raises(ConfigError, match="holds nothing of the platform yet"):
        back_up(settings_of(tmp_path / "empty"), tmp_path / "backup.tar.gz")
    assert not (tmp_path / "empty").exists()
    refused(settings_of(tmp_path / "file" / "home"), archive, "Not a directory", UnavailableError)


def test_the_commands_back_up_look_and_restore(archive, pedro, tmp_path):
    code, out, _ = pedro("restore", archive, "--dry-run")
    assert code == 0
    assert "is whole" in out
    assert not (tmp_path / "new").exists()
    assert pedro("restore", archive)[0] == 0
    code, out, err = pedro("backup", tmp_path / "again.tar.gz", "--json")
    made = json.loads(out)
    assert code == 0
    assert made["missing"] == []
    assert "store: " in err, "progress"
    code, _, err = pedro("restore", tmp_path / "again.tar.gz", "--sha256", "0" * 64, "--dry-run")
    assert code == 1
    assert err.splitlines()[-1].endswith(f"is sha256:{made['sha256']}, not {'0' * 64}")
    assert pedro("restore", tmp_path / "again.tar.gz", "--sha256", made["sha256"], "--dry-run")[0] == 0
    code, _, err = pedro("restore", archive)
    assert code == 1
    assert "has rows" in err


def test_backbones_that_are_left_out_are_told_with_what_brings_them_back(archive, pedro, tmp_path):
    assert pedro("restore", archive)[0] == 0
    for name, origin in (("pulled", {"source": "smollm2-135m", "kind": "recipe"}), ("unknown", None)):
        folder = tmp_path / "new" / "backbones" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if origin:
            (folder / "pedro_backbone.json").write_text(json.dumps(origin))
    pedro("backup", tmp_path / "small.tar.gz", "--without-backbones")
    assert not [name for name in members_of(tmp_path / "small.tar.gz") if name.startswith("backbones/")]
    code, out, _ = pedro("restore", tmp_path / "small.tar.gz", PEDRO_HOME=tmp_path / "newer")
    assert code == 0
    assert "not in it: the backbone pulled; `pedro backbones pull smollm2-135m --name pulled`" in out
    assert "not in it: the backbone unknown; add it again" in out
