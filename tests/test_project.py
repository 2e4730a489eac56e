"""The repository as a whole: what may be imported when, how large files are, and whether versions agree."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "pedro"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400
HEAVY = ("torch", "ray", "peft", "transformers", "mlflow", "deepspeed", "datasets", "fastapi", "sqlalchemy", "pydantic")


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(run.stdout.split())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in found}


def test_the_source_root_is_no_package():
    """`platform/__init__.py` would hide the standard library's `platform` from every process started here."""
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_importing_pedro_imports_nothing_heavy():
    assert modules_after("import pedro").isdisjoint(HEAVY)


def test_importing_the_command_line_imports_nothing_heavy():
    assert modules_after("import pedro.cli").isdisjoint(HEAVY)


def test_the_gateway_imports_neither_tensors_nor_ray_nor_mlflow():
    modules = modules_after("import pedro.gateway.app")
    assert modules.isdisjoint({"torch", "ray", "mlflow", "peft", "transformers", "deepspeed"})


def test_the_data_room_imports_no_tensors():
    assert modules_after("import pedro.data").isdisjoint({"torch", "ray", "mlflow", "peft", "transformers"})


@pytest.mark.parametrize("room", ["platform/pedro", "dashboard"])
def test_a_class_has_its_name_for_itself(room):
    """Who searches for a name finds one thing."""
    found = re.findall(
        r"^class (\w+)", "\n".join(path.read_text() for path in (ROOT / room).rglob("*.py")), re.MULTILINE
    )
    assert not {name for name, count in Counter(found).items() if count > 1}


def test_torch_is_pinned_to_the_version_that_was_tested():
    assert pins()["torch"] == "2.13.0"


def test_the_pins_satisfy_every_range_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for group in project["optional-dependencies"].values() for text in group)]
    pinned = pins()
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name == "pedro-platform":  # its own extras
            continue
        assert name in pinned, f"{name} is not pinned"
        assert requirement.specifier.contains(Version(pinned[name])), f"{name}=={pinned[name]} is not {requirement}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_source_file_says_what_it_is_for_and_fits_a_head(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "opens without a docstring"
    assert len(text.splitlines()) <= LONGEST


def test_no_file_of_the_package_reads_a_pickle():
    unsafe = re.compile(r"torch\.load\(|pickle\.loads?\(|joblib\.load|trust_remote_code=True")
    assert not [str(path) for path in SOURCES if unsafe.search(path.read_text())]


def test_every_shipped_fine_tuning_spec_loads():
    from pedro.training.spec import load_finetune_spec

    specs = sorted((ROOT / "jobs" / "configs").glob("finetune*.yaml"))
    assert specs
    for spec in specs:
        load_finetune_spec(spec)


def test_mlflow_is_spoken_to_by_the_registry_alone():
    """Its client, its filters and the spelling of its tags: others use what `pedro.registry` offers."""
    spoken = re.compile(
        r"\bregistry\.client\b|filter_string|[\"']pedro\.(?:tenant|job|digest|gate|promoted)[\"']|mlflow\.runName"
    )
    files = [*SOURCES, *(ROOT / "jobs").rglob("*.py"), *(ROOT / "dashboard").rglob("*.py")]
    others = [path for path in files if PACKAGE / "registry" not in path.parents]
    assert not [str(path.relative_to(ROOT)) for path in others if spoken.search(path.read_text())]
