"""Writes what the code itself says into pages: spec keys, request fields, errors, commands, methods, the Python API.

A page asks with a comment on a line of its own, for instance `<!-- fields: pedro.training.spec:FineTuneSpec -->`.
Nothing of it is committed, so none of it can go stale.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import json
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pydantic import BaseModel

if typing.TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).parents[2] / "platform" / "pedro"
ASK = re.compile(r"^<!-- (\w+)(?:: (\S+))? -->$", re.MULTILINE)
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least", "max_length": "at most"}
SERVED = {True: "yes", False: "no", None: "depends on its options"}
LARGE = 10**6  # bounds that only keep arithmetic safe are not worth a reader's time
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The last section of the navigation: a page for each package of pedro."""
    assert config.nav is not None, "mkdocs.yml names its pages"
    config.nav.append({"Python API": [{name: f"api/{name}.md"} for name in _rooms()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """One page for each package, with every public module of it."""
    for name, modules in _rooms().items():
        text = "\n\n".join([f"# {name}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{name}.md", content=text + "\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the answers in the place of the comments."""
    return ASK.sub(lambda ask: ANSWERS[ask[1]](ask[2] or "") if ask[1] in ANSWERS else ask[0], markdown)


def _rooms() -> dict[str, list[str]]:
    """The public modules of pedro, by package."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts) or parts[:1] == ("cli",):  # commands have a page of their own
            continue
        is_package = len(parts) > 1 or path.name == "__init__.py"
        room = f"pedro.{parts[0]}" if is_package and parts else "pedro"
        rooms.setdefault(room, []).append(".".join(("pedro", *parts)))
    return rooms


def fields(where: str) -> str:
    """The keys of a spec, a request body or settings (`module:Class`): type, default, meaning."""
    module, _, name = where.partition(":")
    kind = getattr(importlib.import_module(module), name)
    meanings = _meanings(kind)
    sections = {key: _first(part) for key, part in _sections(kind)}
    rows = [
        [f"`{key}`", shape, default, meanings.get(key) or sections.get(key, "")]
        for key, shape, default in (_of_model(kind) if issubclass(kind, BaseModel) else _of_dataclass(kind))
    ]
    return _table(["key", "type", "default", "meaning"], rows)


def errors(_: str) -> str:
    """Every error that a client may get."""
    seen: dict[type[Any], None] = {}
    for module in ("pedro.errors", "pedro.gateway.errors"):
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and issubclass(kind, Exception) and hasattr(kind, "status"):
                seen.setdefault(kind)
    rows = [[str(e.status), f"`{e.type}`", f"`{e.code}`" if e.code else "", _first(e)] for e in seen]
    return _table(["status", "type", "code", "when"], sorted(rows))


def commands(_: str) -> str:
    """Every command with its arguments and options, as `--help` has them."""
    from typer.main import get_command

    from pedro.cli import app

    def walk(command: Any, words: str) -> Iterator[str]:
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                if not child.hidden:
                    yield from walk(child, f"{words} {name}")
            return
        arguments = [_argument(each) for each in command.params if each.param_type_name == "argument"]
        usage, text = " ".join([words, *arguments, "[OPTIONS]"]), inspect.cleandoc(command.help or "")
        yield f"## {words}\n\n`{usage}`\n\n{text}\n"
        rows = [_parameter(each) for each in command.params if not getattr(each, "hidden", False)]
        if rows:
            yield _table(["argument or option", "default", "meaning"], rows)

    return "\n".join(walk(get_command(app), "pedro"))


def methods(_: str) -> str:
    """Every method of `pedro methods`."""
    from pedro.methods.capabilities import capabilities

    rows = [
        [
            f"`{record['name']}`",
            record["title"],
            f"`{record['equation']}`" if record["equation"] else "",
            SERVED[record["mixed_batches"]],
            record["source"],
        ]
        for record in capabilities(counts=False)
    ]
    return _table(["name", "method", "what it changes", "served in mixed batches", "source"], rows)


ANSWERS: dict[str, Callable[[str], str]] = {
    "fields": fields,
    "errors": errors,
    "commands": commands,
    "methods": methods,
}


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _parameter(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [f"`{_argument(parameter)}`", "", parameter.help or ""]
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    default = parameter.default
    shown = "" if callable(default) or default in (None, False, "", (), []) else f"`{default}`"
    return [names, shown, parameter.help or ""]


def _of_model(kind: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    for key, field in kind.model_fields.items():
        shape = _shape(field.annotation, field.metadata)
        default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
        yield key, shape, default


def _sections(kind: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    """The keys that hold a section, one or a list of them, and its class."""
    for key, field in getattr(kind, "model_fields", {}).items():
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield key, part


def _of_dataclass(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        default = "required" if field.default is dataclasses.MISSING else _value(field.default)
        yield field.name, _shape(hints[field.name], ()), default


def _shape(annotation: Any, bounds: Iterable[Any]) -> str:
    """A type in words, with its bounds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _shape(inner[0], [*inner[1:], *bounds])
    if origin in (typing.Union, types.UnionType):
        words = " or ".join(_shape(each, ()) for each in inner if each is not type(None))
    elif origin is typing.Literal:
        words = ", ".join(f"`{each}`" for each in inner)
    elif origin in (tuple, list, frozenset):
        words = f"list of {_shape(inner[0], ())}"
    elif origin is dict:
        words = "mapping" if inner[1] is Any else f"mapping to {_shape(inner[1], ())}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        words = f"section ({annotation.__name__})"
    else:
        words = PLAIN.get(annotation) or str(getattr(annotation, "__name__", annotation))
    limits = [
        f"{sign} {limit:,}"
        for bound in bounds
        for name, sign in BOUNDS.items()
        for part in (bound, *getattr(bound, "metadata", ()))
        if (limit := getattr(part, name, None)) is not None and abs(limit) < LARGE
    ]
    return " ".join([words, ", ".join(dict.fromkeys(limits))]).strip()


def _value(default: Any) -> str:
    if isinstance(default, BaseModel):
        return "its own defaults"
    if default is None:
        return "not set"
    return f"`{json.dumps(default, ensure_ascii=False, default=str)}`"


def _meanings(kind: type[Any]) -> dict[str, str]:
    """What stands beneath or beside each field of a class and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not base.__module__.startswith("pedro."):
            continue
        source = inspect.cleandoc("\n" + inspect.getsource(base))
        body = ast.parse(source).body[0]
        assert isinstance(body, ast.ClassDef), f"{base} is no class"
        comments = _comments(source)
        for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            beneath = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            beside = " ".join(
                comments[line] for line in range(statement.lineno, _end(statement) + 1) if line in comments
            )
            text = str(after.value.value) if beneath else beside  # type: ignore[union-attr]
            found[statement.target.id] = " ".join(text.split())
    return found


def _end(statement: ast.stmt) -> int:
    return statement.end_lineno or statement.lineno


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _first(kind: type[Any]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [
        columns,
        ["---"] * len(columns),
        *([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows),
    ]
    return "\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
