"""The adapter registry on a real sqlite MLflow store."""

import json

import pytest

from pedro.errors import AdapterError, ConflictError, NotFoundError, PedroError
from pedro.registry import Registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return Registry(f"sqlite:///{home / 'mlflow.db'}", str(home / "artifacts"), home / "cache")


def adapter_directory(path, digest="sha256:aa", content="weights"):
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_model.safetensors").write_text(content)
    manifest = {
        "digest": digest,
        "manifest_digest": "sha256:cc",
        "backbone": {"id": "b", "digest": "sha256:bb"},
        "method": {"name": "pedro"},
        "metrics": {"accuracy": 0.5},
        "spec": {"tenant": "acme"},
        "trainable_parameters": 7,
    }
    (path / "pedro_adapter.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def register(registry, tmp_path):
    def make(tenant, adapter, digest):
        run = registry.start_run(experiment=tenant, name="job", params={"lr": 1e-3}, tags={})
        registry.log(run, 1, {"loss": 2.0})
        registry.log(run, 2, {"loss": 1.0})
        return registry.register(run, adapter_directory(tmp_path / digest[-2:], digest), tenant, adapter)

    return make


def test_a_version_carries_what_was_registered_and_its_curve(registry, register):
    version = register("acme", "one", "sha256:11")
    assert (version.ref, version.digest, version.method) == ("acme.one:1", "sha256:11", "pedro")
    assert version.metrics == {"accuracy": 0.5}
    assert version.trainable_parameters == 7
    assert registry.history(version.run_id, "loss") == [(1, 2.0), (2, 1.0)]


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
    assert (directory / "adapter_model.safetensors").read_text() == "weights"
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


@pytest.mark.parametrize("name", ["acme", "acme.o'ne", "a.b.c", "../x.y"])
def test_a_hostile_name_never_reaches_the_store(registry, name):
    with pytest.raises(PedroError, match=r"no adapter name|no valid name"):
        registry.versions(name)
