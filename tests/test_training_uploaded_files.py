"""A spec names uploaded files by their ids: its own tenant's alone, and the job keeps a copy."""

from __future__ import annotations

import json
import uuid

import fsspec
import pytest
from typer.testing import CliRunner

from pedro.cli import app
from pedro.config import Settings
from pedro.errors import ConfigError, NotFoundError
from pedro.files import Files
from pedro.store import Store
from pedro.training import submit
from pedro.training.spec import FineTuneSpec, load_finetune_spec
from pedro.training.uploaded_files import with_uploaded_files

ROW = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(params=["folder", "memory"])
def settings(request, tmp_path):
    env = {"PEDRO_HOME": str(tmp_path / "home")}
    return Settings.from_env(
        env if request.param == "folder" else {**env, "PEDRO_STORAGE": f"memory://{uuid.uuid4().hex}"}
    )


@pytest.fixture
def files(settings):
    store = Store(settings.database_url)
    yield Files(store, settings.storage)
    store.close()


def upload(files: Files, tenant: str = "acme", data: bytes = ROW, name: str = "train.jsonl", purpose="fine-tune"):
    growing = files.begin(tenant)
    growing.write(data)
    return files.finish(growing, name, purpose)


def spec_of(**data) -> FineTuneSpec:
    return FineTuneSpec(tenant="acme", adapter="support", data=data)


def test_a_job_has_a_copy_that_outlives_the_file(settings, files, monkeypatch):
    monkeypatch.setattr(submit, "hand_over", lambda *_: None)  # no controller starts it
    train, test = upload(files), upload(files, data=b"prompt,completion\na,b\n", name="test.csv")
    store = Store(settings.database_url)
    job_id = submit.submit(spec_of(train=train.id, test=test.id), settings, store)
    assert store.get_job(job_id).spec["data"]["train"] == train.id
    store.close()
    for record in (train, test):
        files.delete(record)
    with fsspec.open(f"{settings.storage}/jobs/{job_id}/spec.json") as written:
        data = json.load(written)["data"]
    assert data["test"].endswith(".csv")
    for location, content in ((data["train"], ROW), (data["test"], b"prompt,completion\na,b\n")):
        assert location.startswith(f"{settings.storage}/datasets/")
        with fsspec.open(location) as copy:
            assert copy.read() == content


def test_only_the_tenants_own_files_are_known(settings, files):
    foreign, unknown = upload(files, "globex").id, "file-" + "0" * 24
    said = []
    for file_id in (foreign, unknown):
        with pytest.raises(NotFoundError) as error:
            with_uploaded_files(spec_of(train=file_id), settings)
        said.append(error.value.message.replace(file_id, "ID"))
    assert said[0] == said[1]


def test_a_file_of_another_purpose_is_refused_by_its_role(settings, files):
    batch = upload(files, purpose="batch").id
    with pytest.raises(ConfigError, match=r"data\.validation: .* uploaded for .batch"):
        with_uploaded_files(spec_of(train=upload(files).id, validation=batch), settings)


def test_a_spec_without_ids_stays_as_it_is(settings):
    spec = spec_of(train="/data/train.jsonl")
    assert with_uploaded_files(spec, settings) is spec


def test_ids_in_a_spec_and_in_overrides_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    first, second = "file-" + "a" * 24, "file-" + "b" * 24
    path = tmp_path / "spec.yaml"
    path.write_text(f"tenant: acme\nadapter: support\ndata: {{train: {first}}}\n")
    spec = load_finetune_spec(path, [f"data.test={second}"])
    assert spec.data.files() == {"train": first, "test": second}


@pytest.mark.parametrize("storage", [None, "s3://bucket/storage"])
def test_where_uploads_lie_cannot_be_named_by_path(tmp_path, monkeypatch, storage):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    if storage:
        monkeypatch.setenv("PEDRO_STORAGE", storage)
    place = f"{storage or tmp_path / 'home' / 'storage'}/datasets/../files/globex/file-{'a' * 24}"
    path = tmp_path / "spec.yaml"
    path.write_text(f"tenant: acme\nadapter: support\ndata: {{train: {place}}}\n")
    with pytest.raises(ConfigError, match="by its id"):
        load_finetune_spec(path)


def test_operators_handle_files_at_the_command_line(tmp_path):
    env = {"PEDRO_HOME": str(tmp_path / "home")}
    (tmp_path / "train.jsonl").write_bytes(ROW)

    def pedro(*words: object):
        return CliRunner().invoke(app, ["files", *map(str, words)], env=env)

    made = json.loads(pedro("upload", tmp_path / "train.jsonl", "--tenant", "acme", "--json").stdout)
    assert made["id"] in pedro("list").stdout
    assert made["id"] not in pedro("list", "globex").stdout
    assert made["digest"] in pedro("show", made["id"]).stdout
    assert pedro("download", made["id"]).stdout_bytes == ROW
    copy = tmp_path / "copy.jsonl"
    assert pedro("download", made["id"], copy).exit_code == 0
    assert copy.read_bytes() == ROW
    assert pedro("download", made["id"], copy).exit_code != 0
    assert isinstance(pedro("show", made["id"], "--tenant", "globex").exception, NotFoundError)
    assert pedro("delete", made["id"]).exit_code != 0  # nobody to ask
    assert pedro("delete", made["id"], "--yes").exit_code == 0
    assert isinstance(pedro("show", made["id"]).exception, NotFoundError)
    refused = pedro("upload", tmp_path / "train.jsonl", "--tenant", "acme", "--expires-after", 5)
    assert "3600" in str(refused.exception)
