"""Backbones of one host's home as jobs and servers on another host find them: through the storage."""

import shutil

import pytest

from pedro.backbone import EMBEDDED, kept_backbones, load_model, resolve_backbone
from pedro.backbones.kept import remove_kept
from pedro.backbones.pull import add
from pedro.backbones.sharing import obtain_backbone, offer_backbone, withdraw_backbone
from pedro.config import Settings
from pedro.errors import BackboneError, UnavailableError
from pedro.serving.config import ServeConfig
from pedro.serving.server import ReplicaServer


def _silent(_line):
    pass


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Be on a host; its settings, with a storage that both hosts see."""

    def at(name, storage=None):
        monkeypatch.setenv("PEDRO_HOME", str(tmp_path / name))
        monkeypatch.setenv("PEDRO_STORAGE", storage or f"file://{tmp_path}/storage")
        return Settings.from_env()

    for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return at


def test_a_worker_on_another_host_takes_the_backbone_from_the_storage(host):
    here = host("one")
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    lines = []
    offer_backbone(here, "mine", lines.append)
    offer_backbone(here, "mine", lines.append)
    assert lines == ["copying mine to the storage, for workers on other hosts"]
    there = host("two")
    assert kept_backbones() == []
    obtain_backbone(there, "mine")
    obtain_backbone(there, "mine")
    assert resolve_backbone("mine").directory == there.home / "backbones" / "mine"
    assert resolve_backbone("mine").digest == resolve_backbone("stories260K").digest
    load_model(resolve_backbone("mine"))


def test_a_replica_on_another_host_serves_it(host, tmp_path):
    here = host("one", str(tmp_path / "storage"))
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    offer_backbone(here, "mine")
    there = host("two", str(tmp_path / "storage"))
    server = ReplicaServer(ServeConfig(backbone="mine", max_batch=1), there)
    assert server.stats()["kernel"] in ("native", "torch")
    server.close()


def test_another_backbone_of_that_name_on_the_worker_is_refused(host):
    here = host("one")
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    offer_backbone(here, "mine")
    there = host("two")
    add(there.home, EMBEDDED / "pedro-nano", _silent, "mine")
    with pytest.raises(BackboneError, match=r"'mine' on this host differs from the job's; `pedro backbones remove"):
        obtain_backbone(there, "mine")
    offer_backbone(there, "mine")  # the one who offered last is right
    obtain_backbone(there, "mine")


def test_a_damaged_copy_is_not_kept(host, tmp_path):
    here = host("one")
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    offer_backbone(here, "mine")
    weights = next((tmp_path / "storage" / "backbones" / "mine").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(BackboneError, match="the copy of 'mine' in the storage is damaged"):
        obtain_backbone(host("two"), "mine")
    assert kept_backbones() == []


def test_what_needs_no_copy_is_not_copied(host, tmp_path):
    home = tmp_path / "one"
    here = host("one", str(home / "storage"))
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    for name in ("mine", "pedro-nano", "owner/name", str(EMBEDDED / "pedro-nano")):
        offer_backbone(here, name)
        obtain_backbone(here, name)
    assert not (home / "storage" / "backbones").exists()
    outside = host("one")
    for name in ("pedro-nano", "owner/name", "nothing"):
        offer_backbone(outside, name)
        obtain_backbone(outside, name)
    assert not (tmp_path / "storage" / "backbones").exists()


def test_a_removed_backbone_leaves_the_storage_too(host, tmp_path):
    here = host("one")
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    offer_backbone(here, "mine")
    remove_kept(here.home, "mine", _silent)
    withdraw_backbone(here, "mine")
    assert list((tmp_path / "storage" / "backbones").iterdir()) == []
    obtain_backbone(host("two"), "mine")
    assert kept_backbones() == []


def test_a_storage_that_cannot_be_written_is_told_in_one_line(host, tmp_path):
    (tmp_path / "storage").write_text("a file")
    here = host("one")
    add(here.home, EMBEDDED / "stories260K", _silent, "mine")
    with pytest.raises(
        UnavailableError, match=r"PEDRO_STORAGE: 'mine' could not be copied between this host and file:/"
    ) as told:
        offer_backbone(here, "mine")
    assert "\n" not in told.value.message
    shutil.rmtree(here.home)
