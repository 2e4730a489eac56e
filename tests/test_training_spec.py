"""The spec file: defaults, mistakes told together, and where relative paths start."""

import json
from pathlib import Path

import pytest
import yaml

from pedro.backbone import resolve_backbone
from pedro.comparison.spec import load_comparison_spec
from pedro.config import Settings
from pedro.errors import BackboneError, ConfigError
from pedro.training.job import flat, read_spec, stage
from pedro.training.prepare import make_training_plan
from pedro.training.spec import FineTuneSpec, load_finetune_spec
from pedro.training.sweep.spec import load_sweep_spec

SHIPPED = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("finetune*.yaml"))
SMALL = {"tenant": "acme", "adapter": "support", "data": {"train": "train.jsonl"}}


def _write(folder, **changes):
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def test_all_mistakes_are_told_at_once_each_with_its_remedy(tmp_path):
    path = _write(
        tmp_path,
        adaptor="x",
        tenant="Acme Inc",
        training={"lr": -1, "epoch": 3, "precision": "fp8"},
        resources={"zero_stage": 4},
        data={"train": "train.jsonl", "theta": 0.6, "validation": 0.5},
    )
    with pytest.raises(ConfigError) as caught:
        load_finetune_spec(path)
    text = caught.value.message
    for piece in (
        "7 mistakes",
        "adaptor: unknown key; did you mean 'adapter'?",
        "tenant: ",
        "training.lr: expected",
        "got -1",
        "training.epoch: unknown key; did you mean 'epochs'?",
        "training.precision",
        "resources.zero_stage",
        "theta and validation together take 1.1 of train",
    ):
        assert piece in text, text


def test_too_small_a_batch_for_the_workers_names_the_least_size(tmp_path):
    path = _write(tmp_path, training={"batch_size": 4, "gradient_accumulation": 3}, resources={"workers": 2})
    with pytest.raises(ConfigError, match="raise batch_size to at least 6"):
        load_finetune_spec(path)


def test_relative_paths_start_from_the_spec_and_those_of_overrides_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "specs", data={"train": "train.jsonl", "theta": "../theta.jsonl", "validation": 0.2})
    spec = load_finetune_spec(path, ["data.test=held_out.jsonl", "data.validation=0.3", "training.lr=1e-3"])
    assert spec.data.train == str(tmp_path / "specs" / "train.jsonl")
    assert Path(spec.data.theta).resolve() == tmp_path / "theta.jsonl"
    assert spec.data.test == str(tmp_path / "held_out.jsonl")
    assert spec.data.validation == 0.3
    assert spec.training.lr == 1e-3


def test_a_backbones_path_means_the_same_in_every_process(tmp_path, monkeypatch):
    for place in ("specs/mine", "here/mine"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    beside, here = str(tmp_path / "specs" / "mine"), str(tmp_path / "here" / "mine")
    path = _write(tmp_path / "specs", backbone="./mine")
    assert load_finetune_spec(path).backbone == beside
    assert load_finetune_spec(path, ["backbone=mine"]).backbone == here
    assert load_finetune_spec(_write(tmp_path / "specs", backbone="owner/name")).backbone == "owner/name"

    sweep = {
        "name": "s",
        "base": {**SMALL, "backbone": "mine"},
        "space": {"backbone": {"grid": ["mine", "stories260K"]}},
    }
    path.write_text(yaml.safe_dump(sweep))
    loaded = load_sweep_spec(path)
    assert (loaded.base.backbone, loaded.space["backbone"].values) == (beside, (beside, "stories260K"))

    compared = {"name": "c", "backbones": ["stories260K", "mine"], "tasks": ["snips"], "methods": ["pedro"]}
    path.write_text(yaml.safe_dump(compared))
    assert load_comparison_spec(path).backbones == ("stories260K", beside)


def test_urls_stay_and_packaged_data_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_DATA_SCHEMES", "s3, gs")
    spec = load_finetune_spec(
        _write(tmp_path, data={"train": "pedro://demo/acme/train.jsonl", "test": "s3://b/t.jsonl"})
    )
    assert Path(spec.data.train).is_file()
    assert spec.data.test == "s3://b/t.jsonl"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A spec's folder apart from the working directory and the home, and a file outside all of them."""
    for name in ("specs", "work", "outside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    (tmp_path / "outside" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path / "outside" / "rows.jsonl"


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data", "http is not a data scheme; download the file"),
        ("file:///etc/passwd", "file is not a data scheme"),
        ("zip://rows.jsonl", "zip is not a data scheme"),
        ("github://org:repo@main/rows.jsonl", "github is not a data scheme"),
        ("simplecache::s3://bucket/rows.jsonl", "chains several URLs"),
        ("s3://bucket/rows.jsonl", "set PEDRO_DATA_SCHEMES=s3"),
        ("pedro://../../../../etc/passwd", "is outside the packaged data"),
        ("pedro:///etc/passwd", "is outside the packaged data"),
        ("/etc/passwd", "lies outside the spec's folder"),
        ("../outside/rows.jsonl", "PEDRO_DATA_ROOTS"),
        ("link.jsonl", "PEDRO_DATA_ROOTS"),
    ],
)
def test_a_spec_opens_no_door_to_the_host_or_its_network(elsewhere, tmp_path, file, reason):
    (tmp_path / "specs" / "link.jsonl").symlink_to(elsewhere)
    for role in ("train", "theta", "test"):
        path = _write(tmp_path / "specs", data={"train": "train.jsonl", role: file})
        with pytest.raises(ConfigError, match=reason):
            load_finetune_spec(path)
    if "://" in file and not file.startswith("pedro"):
        with pytest.raises(ConfigError, match=reason):
            load_finetune_spec(_write(tmp_path / "specs"), [f"data.train={file}"])


def test_files_beneath_the_known_folders_and_those_typed_by_hand_are_taken(elsewhere, tmp_path, monkeypatch):
    for folder in ("specs", "work", "home"):
        spec = load_finetune_spec(
            _write(tmp_path / "specs", data={"train": str(tmp_path / folder / "deep" / "a.jsonl")})
        )
        assert spec.data.train.endswith("a.jsonl")
    assert load_finetune_spec(_write(tmp_path / "specs"), [f"data.train={elsewhere}"]).data.train == str(elsewhere)
    monkeypatch.setenv("PEDRO_DATA_ROOTS", f"/nowhere:{elsewhere.parent}")
    path = _write(tmp_path / "specs", data={"train": str(elsewhere)})
    assert load_finetune_spec(path).data.train == str(elsewhere)
    monkeypatch.chdir("/")
    monkeypatch.setenv("PEDRO_DATA_ROOTS", "")
    with pytest.raises(ConfigError, match="lies outside"):
        load_finetune_spec(path)


def test_a_resolved_spec_is_held_to_the_same_places(elsewhere, tmp_path):
    settings = Settings.from_env()
    location = tmp_path / "spec.json"
    for file, good in ((f"{settings.storage}/datasets/a.jsonl", True), ("/etc/passwd", False), ("s3://b/a", False)):
        location.write_text(json.dumps({**SMALL, "data": {"train": file}}))
        if good:
            assert read_spec(str(location), settings.cache).data.train == file
        else:
            with pytest.raises(ConfigError, match=r"data\.train: "):
                read_spec(str(location), settings.cache)


def test_a_backbones_directory_is_held_to_the_same_places(elsewhere, tmp_path, monkeypatch):
    outside, specs = str(elsewhere.parent), tmp_path / "specs"
    (specs / "link").symlink_to(outside)
    sweep = {"name": "s", "base": SMALL, "space": {"backbone": {"grid": ["stories260K", outside]}}}
    compared = {"name": "c", "backbones": ["stories260K", outside], "tasks": ["snips"], "methods": ["pedro"]}
    asked = (
        (load_finetune_spec, {**SMALL, "backbone": outside}, "backbone"),
        (load_finetune_spec, {**SMALL, "backbone": "./link"}, "backbone"),
        (load_sweep_spec, {**sweep, "base": {**SMALL, "backbone": outside}}, "base.backbone"),
        (load_sweep_spec, sweep, "space.backbone"),
        (load_comparison_spec, compared, "backbones"),
    )
    path = specs / "spec.yaml"
    for load, fields, key in asked:
        path.write_text(yaml.safe_dump(fields))
        with pytest.raises(ConfigError, match=rf"{key}\S*: '.*' lies outside the spec's folder.*pedro backbones add"):
            load(path)
    path.write_text(yaml.safe_dump(compared))
    assert load_comparison_spec(path, [f"backbones=[{outside}]"]).backbones == (outside,), "typed by hand"
    path.write_text(yaml.safe_dump({**SMALL, "backbone": outside}))
    assert load_finetune_spec(path, [f"backbone={outside}"]).backbone == outside
    monkeypatch.setenv("PEDRO_DATA_ROOTS", outside)
    assert load_finetune_spec(path).backbone == outside


def test_sweeps_and_comparisons_open_no_door_either(elsewhere, tmp_path):
    outside = str(elsewhere.parent)
    sweep = {"name": "s", "base": SMALL, "space": {"training.lr": {"grid": [0.1]}}}
    compared = {"name": "c", "tasks": ["snips"], "methods": ["pedro"]}
    asked = (
        (
            load_sweep_spec,
            {**sweep, "base": {**SMALL, "data": {"train": str(elsewhere)}}},
            "base.data.train: .* lies out",
        ),
        (load_sweep_spec, {**sweep, "base": {**SMALL, "data": {"train": "http://a/b"}}}, "http is not a data scheme"),
        (
            load_sweep_spec,
            {**sweep, "space": {"data.train": {"grid": ["/etc/passwd"]}}},
            "space.data.train: cannot vary",
        ),
        (load_comparison_spec, {**compared, "data": outside}, "data: .* lies outside"),
        (
            load_comparison_spec,
            {**compared, "tasks": [{"task": "snips", "data": outside}]},
            "tasks.0.data: .* lies outsi",
        ),
        (load_comparison_spec, {**compared, "forgetting": {"data": outside}}, "forgetting.data: .* lies outside"),
    )
    path = tmp_path / "specs" / "spec.yaml"
    for load, fields, reason in asked:
        path.write_text(yaml.safe_dump(fields))
        with pytest.raises(ConfigError, match=reason):
            load(path)


@pytest.mark.parametrize("url", ["http://169.254.169.254/model", "file:///etc", "s3://bucket/model", "a::b://c/d"])
def test_a_url_is_no_backbone(elsewhere, tmp_path, url):
    path = _write(tmp_path / "specs", backbone=url)
    with pytest.raises(BackboneError, match="is neither a directory"):
        resolve_backbone(load_finetune_spec(path).backbone)


def test_a_scheme_that_is_no_data_scheme_cannot_be_configured(monkeypatch):
    monkeypatch.setenv("PEDRO_DATA_SCHEMES", "http")
    with pytest.raises(ConfigError, match="PEDRO_DATA_SCHEMES: 'http'"):
        Settings.from_env()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_spec_loads_and_finds_its_data(path):
    spec = load_finetune_spec(path)
    assert all(Path(file).is_file() for file in spec.data.files().values())


def test_the_resolved_spec_reads_back_as_itself(tmp_path):
    spec = load_finetune_spec(_write(tmp_path, method={"name": "lora", "r": 4}))
    assert spec.method.options == {"r": 4}
    assert FineTuneSpec.model_validate(spec.to_dict()) == spec
    assert flat(spec.to_dict())["method.r"] == 4


def test_staged_data_is_named_by_content_and_does_not_change_with_the_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    spec = load_finetune_spec(_write(tmp_path))
    storage = str(tmp_path / "storage")
    first = stage(spec, storage)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    second = stage(spec, storage)
    assert first.data.train != second.data.train
    assert '"b"' in Path(first.data.train).read_text()
    assert stage(first, storage) == first
    assert len(list((tmp_path / "storage" / "datasets").iterdir())) == 2


def test_steps_that_were_asked_for_are_not_cut_short_by_the_default_of_epochs(tmp_path):
    spec = load_finetune_spec(_write(tmp_path), ["training.max_steps=2000"])
    read_back = FineTuneSpec.model_validate(json.loads(json.dumps(spec.to_dict())))
    assert (spec.training.epochs, read_back) == (None, spec)
    assert make_training_plan(spec.training, 2208, has_theta=True).steps == 2000


def test_of_epochs_and_steps_that_are_both_given_the_first_to_be_reached_ends_training(tmp_path):
    both = load_finetune_spec(_write(tmp_path, training={"epochs": 3, "max_steps": 2000}))
    stored = FineTuneSpec.model_validate({**SMALL, "training": {"epochs": 3.0, "max_steps": 2000}})  # before this rule
    neither = load_finetune_spec(_write(tmp_path))
    assert [make_training_plan(one.training, 2208, True).steps for one in (both, stored, neither)] == [414, 414, 1380]
    with pytest.raises(ConfigError, match="epochs is null and max_steps not given"):
        load_finetune_spec(_write(tmp_path, training={"epochs": None}))
