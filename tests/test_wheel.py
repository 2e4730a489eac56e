"""The wheel, built from the tree and unpacked: what it holds, and that its dashboard needs no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("platform", "dashboard", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
OPEN_PAGES = """
import functools
import sys

sys.modules.update(dict.fromkeys(("datasets", "deepspeed", "lm_eval", "matplotlib", "optuna"), None))  # other extras

import pedro
from pedro.cli.dashboard import find_app
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

manifest_scanner.scan_component_manifests = functools.cache(manifest_scanner.scan_component_manifests)  # of each page
app = find_app()
sys.path.insert(0, str(app.parent))  # as `streamlit run` does
print(pedro.__file__, app, sep="\\n")
for view in sorted(app.parent.glob("views/*.py")):
    shown = AppTest.from_file(str(app), default_timeout=600).switch_page(f"views/{view.name}").run()
    assert not shown.exception, (view.name, shown.exception)
    print(view.stem, shown.title[0].value)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of an installed wheel, far from any checkout."""
    pytest.importorskip("setuptools", minversion="77")
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=tree, capture_output=True, timeout=120, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        held.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_page_of_the_dashboard_and_nothing_of_the_jobs(installed):
    pages = {path.relative_to(ROOT) for path in ROOT.glob("dashboard/**/*.py")} - {Path("dashboard/timing.py")}
    pages |= {Path("dashboard/icon.png"), Path("dashboard/.streamlit/config.toml")}
    packed = {
        path.relative_to(installed / "pedro") for path in installed.glob("pedro/dashboard/**/*") if path.is_file()
    }
    assert packed == pages
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"pedro"}


def test_the_wheel_holds_no_benchmark_and_no_pretraining(installed):
    rooms = [ROOT / "jobs" / "benchmarks", ROOT / "jobs" / "pretrain"]
    outside = {path.read_bytes() for room in rooms for path in room.rglob("*.py")}
    packed = list(installed.rglob("*.py"))
    assert len(outside) > 30
    assert not [path for path in packed if path.read_bytes() in outside]
    assert not [path for path in packed if {"benchmarks", "pretrain"} & set(path.relative_to(installed).parts)]


def test_the_installed_dashboard_draws_every_page_without_a_checkout(installed, tmp_path):
    pytest.importorskip("streamlit")
    named = ("PYTHONPATH", "PEDRO_HOME", "MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL", "PEDRO_STORAGE", "RAY_ADDRESS")
    env = {key: value for key, value in os.environ.items() if key not in named}
    env |= {"PYTHONPATH": str(installed), "PEDRO_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", OPEN_PAGES]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    package, app, *shown = run.stdout.splitlines()
    assert package == str(installed / "pedro" / "__init__.py")
    assert app == str(installed / "pedro" / "dashboard" / "app.py")
    assert len(shown) == len(list((ROOT / "dashboard" / "views").glob("*.py")))
