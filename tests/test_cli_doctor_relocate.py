"""`pedro doctor --relocate`: what a copied home keeps of where it was before."""

from __future__ import annotations

import json
import shutil

import pytest
from training_runs import sweep_for

from pedro.cli.doctor_relocate import relocate
from pedro.config import Settings
from pedro.errors import ConfigError
from pedro.training.sweep import launch
from pedro.training.sweep.records import Records, recall


def test_specs_of_a_copied_home_name_its_own_data_and_nothing_else_is_changed(tmp_path):
    there = tmp_path / "there"
    data = there / "storage" / "datasets" / "abc.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    elsewhere = tmp_path / "mounted" / "datasets" / "other.jsonl"
    spec = {"data": {"train": str(data), "test": str(elsewhere), "template": "/datasets"}, "training": {"lr": 0.1}}
    for place, fields in (("jobs/ftjob-1/spec.json", spec), ("sweeps/sweep-1/sweep.json", {"spec": {"base": spec}})):
        path = there / "storage" / place
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(fields))
    here = shutil.copytree(there, tmp_path / "here")
    settings = Settings.from_env({"PEDRO_HOME": str(here)})
    assert "2 specs of jobs and sweeps named another home's data" in relocate(settings)
    moved = {**spec, "data": {**spec["data"], "train": str(here / "storage" / "datasets" / "abc.jsonl")}}
    assert json.loads((here / "storage/jobs/ftjob-1/spec.json").read_text()) == moved
    assert json.loads((here / "storage/sweeps/sweep-1/sweep.json").read_text()) == {"spec": {"base": moved}}
    assert json.loads((there / "storage/jobs/ftjob-1/spec.json").read_text()) == spec
    assert "no spec names data that this home has elsewhere" in relocate(settings)


def test_a_sweep_of_a_copied_home_is_found_again_by_its_spec(tmp_path):
    there = Settings.from_env({"PEDRO_HOME": str(tmp_path / "there")})
    spec = sweep_for(tmp_path)
    made = launch.create(spec, there)
    here = Settings.from_env({"PEDRO_HOME": str(shutil.copytree(there.home, tmp_path / "here"))})
    relocate(here)
    assert recall(here.storage, launch.staged(spec, here)) == made.id
    assert Records(here.storage, made.id).spec().base.data.train.startswith(here.storage)


def test_a_storage_of_its_own_is_not_moved(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path), "PEDRO_STORAGE": "s3://bucket/pedro"})
    with pytest.raises(ConfigError, match="means the same from everywhere"):
        relocate(settings)
