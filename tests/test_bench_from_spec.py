"""An efficiency spec: checked before it measures, by the benchmarks of the checkout, which the package lacks."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

import pedro
from jobs.benchmarks import from_spec
from pedro.cli import app
from pedro.comparison.efficiency import check_efficiency
from pedro.comparison.spec import EfficiencySpec
from pedro.errors import ConfigError, UnavailableError


def test_an_efficiency_spec_says_what_is_missing_before_it_measures(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    spec = EfficiencySpec(kind="efficiency", name="speed", device="cuda", models=("7B",))
    with pytest.raises(ConfigError, match="device: cuda, but torch finds no GPU here"):
        from_spec.check_efficiency(spec)
    with pytest.raises(ConfigError, match="models: '7X' is none of"):
        check_efficiency(spec.model_copy(update={"models": ("7X",)}))


def test_without_a_checkout_the_command_says_where_it_can_run(monkeypatch, tmp_path):
    monkeypatch.setattr(pedro, "__file__", str(tmp_path / "site" / "pedro" / "__init__.py"))
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UnavailableError, match="speed: benchmarks are not part of the installed package"):
        check_efficiency(EfficiencySpec(kind="efficiency", name="speed"))


@pytest.mark.slow
def test_pedro_compare_measures_an_efficiency_spec_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    path = tmp_path / "speed.yaml"
    path.write_text("kind: efficiency\nname: speed\nmodels: [tiny]\nbatches: [2]\nrounds: 1\nthreads: 1\n")
    done = CliRunner().invoke(app, ["compare", str(path), "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    shown, saved = json.loads(done.stdout), json.loads((tmp_path / "out" / "efficiency.json").read_text())
    assert shown["rows"] == saved["rows"] != []
