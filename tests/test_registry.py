"""The adapter registry on a real sqlite MLflow store."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file
from serving_adapters import settings_at, stub_adapter

from pedro.adapter_directory import read_manifest, weights_digest, write_manifest
from pedro.config import Settings
from pedro.errors import AdapterError, ConflictError, NotFoundError, PedroError, UnavailableError
from pedro.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return Registry.open(settings_at(home))


def adapter_directory(path, mark):
    return stub_adapter(
        path,
        mark,
        "sha256:bb",
        metrics={"accuracy": 0.5},
        spec={"tenant": "acme"},
        trainable_parameters=7,
    )


@pytest.fixture
def register(registry, tmp_path):
    def make(tenant, adapter, mark):
        run = registry.start_run(experiment=tenant, name="job", params={"lr": 1e-3}, tags={})
        registry.log_metrics(run, 1, {"loss": 2.0})
        registry.log_metrics(run, 2, {"loss": 1.0})
        return registry.register(run, adapter_directory(tmp_path / mark, mark), tenant, adapter)

    return make


def test_a_version_carries_what_was_registered_and_its_curve(registry, register, tmp_path):
    version = register("acme", "one", "11")
    assert (version.ref, version.digest, version.method) == (
        "acme.one:1",
        read_manifest(tmp_path / "11")["digest"],
        "pedro",
    )
    assert version.metrics == {"accuracy": 0.5}
    assert version.trainable_parameters == 7
    assert registry.metric_history(version.run_id, "loss") == [(1, 2.0), (2, 1.0)]


def test_the_bare_name_means_champion_and_is_not_found_without_one(registry, register):
    version = register("acme", "two", "sha256:21")
    with pytest.raises(NotFoundError):
        registry.get("acme.two")
    registry.promote("acme.two", version.version)
    assert registry.get("acme.two").version == 1


def test_a_version_says_when_it_last_became_champion(registry, register):
    version = register("acme", "dated", "sha256:d1")
    assert version.promoted == ""
    promoted = registry.promote("acme.dated", 1).promoted
    assert promoted >= version.created
    assert registry.versions("acme.dated")[0].promoted == promoted


def test_promote_sets_previous_and_rollback_swaps_the_two(registry, register):
    register("acme", "three", "sha256:31")
    register("acme", "three", "sha256:32")
    registry.promote("acme.three", 1)
    with pytest.raises(ConflictError, match="no previous"):
        registry.rollback("acme.three")
    registry.promote("acme.three", 2)
    assert registry.get("acme.three", "previous").version == 1
    assert registry.rollback("acme.three").version == 1
    assert registry.get("acme.three", "previous").version == 2


def test_promoting_the_candidate_ends_its_candidacy(registry, register):
    register("acme", "four", "sha256:41")
    registry.set_alias("acme.four", "candidate", 1)
    assert registry.promote("acme.four", 1).aliases == ("champion",)


def test_the_champion_cannot_be_deleted_alone(registry, register):
    register("acme", "five", "sha256:51")
    register("acme", "five", "sha256:52")
    registry.promote("acme.five", 2)
    with pytest.raises(ConflictError, match="champion"):
        registry.delete("acme.five", 2)
    registry.delete("acme.five", 1)
    assert [version.version for version in registry.versions("acme.five")] == [2]
    registry.delete("acme.five")
    assert "acme.five" not in registry.models()


def test_models_of_one_tenant_only(registry, register):
    register("globex", "six", "sha256:61")
    assert registry.models("globex") == ["globex.six"]
    assert registry.catalog()["globex.six"].aliases == {}


def test_download_gives_the_registered_files_and_keeps_them(registry, register):
    version = register("acme", "seven", "sha256:71")
    directory = registry.download(version)
    assert read_manifest(directory)["digest"] == weights_digest(directory) == version.digest
    assert registry.download(version) == directory


@pytest.mark.parametrize("field", ["digest", "manifest_digest"])
def test_files_that_changed_in_the_store_are_refused(registry, register, field):
    version = register("acme", "eight", f"sha256:81{field}")
    stored = next(
        path for path in registry.cache_dir.parent.glob(f"artifacts/**/{version.run_id}/**/pedro_adapter.json")
    )
    stored.write_text(json.dumps({**json.loads(stored.read_text()), field: "sha256:99"}))
    with pytest.raises(AdapterError, match="not those that were registered"):
        registry.download(version)
    assert not list((registry.cache_dir / "adapters").glob(".loading-*"))


def test_a_store_that_is_away_is_no_store_without_the_files(registry, register, monkeypatch):
    version = register("acme", "kept", "sha256:72")

    def away(*arguments):
        raise ConnectionError("[Errno 111] Connection refused")

    with monkeypatch.context() as patch:
        for call in ("download_artifacts", "list_artifacts"):
            patch.setattr(registry.client, call, away)
        with pytest.raises(UnavailableError, match="could not be copied"):
            registry.download(version)
        with pytest.raises(UnavailableError, match="does not answer"):
            registry.download(version)
        assert registry._probe.acquire(), "another thread finds out whether it is there again"
        with pytest.raises(UnavailableError, match="does not answer"):
            registry.download(version)
        registry._probe.release()
    assert registry.download(version).is_dir()
    shutil.rmtree(registry.cached(version.digest, version.run_id))
    shutil.rmtree(next(path for path in registry.cache_dir.parent.glob(f"artifacts/**/{version.run_id}/artifacts")))
    with pytest.raises(AdapterError, match="are gone"):
        registry.download(version)


def test_what_mlflow_answers_cannot_make_the_store_take_other_weights(registry, register, monkeypatch):
    """Its answer to a registration counts for the number alone; so does one that others wrote into it."""
    asked = registry.client.create_model_version

    def forged(*arguments, **fields):
        entity = asked(*arguments, **fields)
        entity._tags.update({"pedro.digest": "sha256:evil", "pedro.manifest_digest": "sha256:evil"})
        entity._run_id, entity._name = "evil", "globex.victim"
        return entity

    monkeypatch.setattr(registry.client, "create_model_version", forged)
    version = register("acme", "answered", "sha256:95")
    assert (version.ref, version.run_id != "evil") == ("acme.answered:1", True)
    assert "evil" not in version.digest + version.manifest_digest
    assert "globex.victim" not in registry.models()
    assert registry.download(version).is_dir()


def test_a_number_that_the_store_has_already_is_passed_over(registry, register):
    """As where MLflow was restored from an earlier backup than the store."""
    register("acme", "behind", "sha256:96")
    second = register("acme", "behind", "sha256:97")
    registry.client.delete_registered_model("acme.behind")
    assert register("acme", "behind", "sha256:98").version == 3
    assert registry.get("acme.behind", 2) == second


@pytest.mark.parametrize("name", ["acme", "acme.o'ne", "a.b.c", "../x.y"])
def test_a_hostile_name_never_reaches_the_store(registry, name):
    with pytest.raises(PedroError, match=r"not an adapter name|not a valid name"):
        registry.versions(name)


def _damage(directory, how):
    """Make the directory a bad one, with a manifest whose digests fit where that is possible."""
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    if how == "link":
        (directory / "README.md").symlink_to("/etc/passwd")
    elif how == "unknown file":
        (directory / "notes.txt").write_text("x")
    elif how == "folder":
        (directory / "more").mkdir()
    elif how == "no file":
        os.mkfifo(directory / "README.md")
    elif how == "not finite":
        save_file({"w": torch.tensor([1.0, float("nan")])}, weights)
        write_manifest(directory, read_manifest(directory))
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "other weights":
        save_file({"w": torch.ones(3)}, weights)
    elif how == "huge":
        config.write_text('{"peft_type": "LORA", "r": 1000000000}')
        write_manifest(directory, read_manifest(directory))
    elif how == "no config":
        config.unlink()
        write_manifest(directory, read_manifest(directory))
    elif how == "deep config":
        config.write_text(deep)
    elif how == "deep manifest":
        (directory / "pedro_adapter.json").write_text(deep)
    elif how == "deep header":
        weights.write_bytes(struct.pack("<Q", len(deep)) + deep.encode())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("link", r"README\.md: is a link"),
        ("unknown file", r"notes\.txt: is not a file of an adapter"),
        ("folder", "more: is not a file of an adapter"),
        ("no file", r"README\.md: is neither"),
        ("not finite", "w contains numbers that are not finite"),
        ("truncated", "is damaged"),
        ("other weights", "the manifest says"),
        ("huge", "r is 1,000,000,000, but its largest tensor has 1 numbers"),
        ("no config", r"adapter_config\.json: not found"),
        ("deep config", r"adapter_config\.json: cannot be read"),
        ("deep manifest", r"pedro_adapter\.json: .* cannot be read"),
        ("deep header", "is damaged"),
    ],
)
def test_what_could_not_be_served_or_is_no_adapter_is_not_registered(registry, tmp_path, how, message):
    directory = adapter_directory(tmp_path / "bad", "bad")
    _damage(directory, how)
    run = registry.start_run(experiment="acme", name="job", params={}, tags={})
    with pytest.raises(AdapterError, match=message) as caught:
        registry.register(run, directory, "acme", "bad")
    assert "\n" not in caught.value.message
    assert registry.versions("acme.bad") == []
    assert not registry.client.list_artifacts(run)


@pytest.mark.parametrize("carry", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_home_that_was_carried_elsewhere_finds_its_own_artifacts(tmp_path, carry):
    there = Registry.open(settings_at(tmp_path / "there"))
    run = there.start_run(experiment="acme.faq", name="job", params={}, tags={})
    version = there.register(run, adapter_directory(tmp_path / "made", "moved"), "acme", "faq")
    here = tmp_path / "it's here"
    carry(tmp_path / "there", here)
    registry = Registry.open(Settings.from_env({"PEDRO_HOME": str(here)}))
    if carry is shutil.copytree:
        shutil.rmtree(tmp_path / "there" / "artifacts")
    assert registry.download(registry.get("acme.faq", 1)).is_relative_to(here)
    run = registry.start_run(experiment="acme.faq", name="job", params={}, tags={})
    again = registry.register(run, adapter_directory(tmp_path / "made again", "again"), "acme", "faq")
    assert list(here.glob(f"artifacts/**/{again.run_id}/**/pedro_adapter.json"))
    assert not (tmp_path / "there" / "artifacts").exists()
    assert version.digest != again.digest
