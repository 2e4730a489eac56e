"""`pedro doctor`: is this host ready, and if not, what to fix."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pedro.cli.output import AsJson, emit

if TYPE_CHECKING:
    from pedro.config import Settings

Status = Literal["ok", "warn", "fail"]
_MARK = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Check:
    """One check: what was found and, where it is not fine, the remedy."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def doctor(
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also write to the storage, and read every version that an alias names."),
    ] = False,
    moved: Annotated[
        bool,
        typer.Option("--relocate", help="First rewrite the paths of a home that was copied or moved."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check Python, packages, memory, disk, sizes, ports, registry, database and cluster; exit 1 if something fails."""
    checks: list[Check] = []
    for check in run_checks(deep=deep, moved=moved):
        checks.append(check)
        if not as_json:
            line = f"{_MARK[check.status]}  {check.name}: {check.found}"
            typer.echo(line + (f"\n      → {check.remedy}" if check.remedy else ""))
    failed = any(check.status == "fail" for check in checks)
    emit({"ok": not failed, "checks": [asdict(check) for check in checks]}, as_json, lambda: None)
    if failed:
        raise typer.Exit(1)


def run_checks(*, deep: bool = False, moved: bool = False) -> Iterator[Check]:
    """Every check in turn; none leaves anything behind but PEDRO_HOME and, where it has `moved`, specs put right."""
    from pedro.config import Settings

    settings = Settings.from_env()
    if moved:
        from pedro.cli.doctor_relocate import relocate

        yield _service("relocation", lambda: relocate(settings), "check PEDRO_HOME and PEDRO_STORAGE")
    yield _python()
    yield _packages()
    yield _compiler()
    yield _accelerator()
    yield _memory()
    yield _home(settings.home)
    yield _disk(settings.home)
    yield _service("sizes", lambda: _sizes(settings), "check PEDRO_STORAGE")
    yield _port(8000)
    yield _service("registry", lambda: _registry(settings), "check MLFLOW_TRACKING_URI, or unset it to use sqlite")
    yield _service("database", lambda: _database(settings), "check PEDRO_DATABASE_URL, or unset it to use sqlite")
    yield _cluster(settings)
    if deep:
        from pedro.cli.doctor_deep import deep_probes

        for name, probe, remedy in deep_probes(settings):
            yield _service(name, probe, remedy)


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 11):
        return Check("python", "fail", found, "use Python 3.11 or newer")
    return Check("python", "ok", found)


def _packages() -> Check:
    """The installed versions against the ranges that pedro-platform declares."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wrong, seen = [], []
    for text in metadata.requires("pedro-platform") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        seen.append(f"{requirement.name} {version}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "pip install -c constraints.txt 'pedro-platform[all]'")
    key = [item for item in seen if item.split()[0] in ("torch", "transformers", "peft", "ray", "mlflow")]
    return Check("packages", "ok", ", ".join(key))


def _compiler() -> Check:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        remedy = "install gcc: the engine's CPU kernel wants it, and without it decodes at about half the speed"
        return Check("compiler", "warn", "none", remedy)
    return Check("compiler", "ok", compiler)


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        return Check("accelerator", "ok", f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}")
    return Check("accelerator", "ok", f"none; the CPU is used ({os.cpu_count()} cores)")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available < 10 * 2**30:
        return Check("memory", "warn", found, "the demo needs about 10 GiB, with --small 4: close other programs")
    return Check("memory", "ok", found)


def _home(home: Path) -> Check:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Check("home", "fail", f"{home}: {error.strerror}", "set PEDRO_HOME to a directory that you may write")
    return Check("home", "ok", str(home))


def _disk(home: Path) -> Check:
    there = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free under {there}"
    if free < 2**28:
        return Check("disk", "fail", found, "free at least 1 GiB, or set PEDRO_HOME to another disk")
    if free < 2**31:
        return Check("disk", "warn", found, "checkpoints and artifacts may need more")
    return Check("disk", "ok", found)


def _port(port: int) -> Check:
    from pedro.cluster import port_is_free

    if port_is_free(port):
        return Check("port", "ok", f"{port} is free")
    return Check("port", "warn", f"{port} is in use", "`pedro serve --port N` takes another one")


def _service(name: str, probe: Callable[[], str], remedy: str) -> Check:
    from pedro.errors import PedroError

    try:
        return Check(name, "ok", probe())
    except PedroError as error:
        return Check(name, "fail", error.message, remedy)
    except OSError as error:
        return Check(name, "fail", f"{error.filename}: {error.strerror}", remedy)


def _registry(settings: Settings) -> str:
    from pedro.config import without_password
    from pedro.registry import Registry

    registry = Registry.open(settings)
    registry.connect()
    waiting = len(registry.store.unmirrored())
    behind = f"; it has not heard of the last moves of {waiting}, `pedro db mirror` tells it" if waiting else ""
    return f"{without_password(settings.tracking_uri)}, {registry.store.count_adapters()} adapters{behind}"


def _sizes(settings: Settings) -> str:
    """What the home and the storage hold, the largest first."""
    from pedro.cli.gc import size
    from pedro.sizes import measure

    held = sorted(measure(settings).items(), key=lambda one: -one[1])
    kinds = ", ".join(f"{kind.replace('_', ' ')} {size(count)}" for kind, count in held if count)
    return f"{kinds}; `pedro gc --dry-run` says what may go" if kinds else "nothing is kept yet"


def _database(settings: Settings) -> str:
    from pedro.store import Store

    return f"{len(Store(settings.database_url).list_keys())} keys"


def _cluster(settings: Settings) -> Check:
    from pedro.cluster import connect, find_head
    from pedro.errors import PedroError

    if settings.launcher == "kuberay" and settings.ray_address is None:
        return Check("cluster", "ok", "each fine-tune has a Ray cluster of its own (PEDRO_LAUNCHER=kuberay)")
    if settings.ray_address is None:
        head = find_head(settings)
        if head is None:
            return Check("cluster", "ok", "no local Ray head yet; the first command that needs one starts it")
        return Check("cluster", "ok", f"local head at {head.address}, dashboard {head.dashboard_url}")
    try:
        cluster = connect(settings)
    except PedroError as error:
        return Check("cluster", "fail", error.message, "check RAY_ADDRESS")
    return Check("cluster", "ok", f"{cluster.address}, {cluster.nodes} nodes")
