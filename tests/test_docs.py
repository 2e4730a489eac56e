"""README and docs/: links lead somewhere; routes, errors, words and the layout are those that there are."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
from docs_pages import PAGES, ROOT, anchors, blocks, links, name_of, prose, table

from pedro.cli import app
from pedro.gateway.app import create_app

PACKAGE = ROOT / "platform" / "pedro"
DOCS = ROOT / "docs"
HTTP_API = DOCS / "reference" / "http-api.md"
CODES = re.compile(
    r"""\bcode(?:: str \| None)? ?= ?"([a-z_]+)"|^[A-Z_]+ = "([a-z_]+)"  # the code of an error""", re.MULTILINE
)
CLASS = re.compile(r"\b([A-Z][a-z]+(?:[A-Z][a-z]+)+(?:\.[a-z_]+)?|[A-Z][a-z]+\.[a-z_]+)\b")  # ModelRef, Method.readers
CLIENTS = ("gateway", "serving", "engine")  # rooms whose errors reach clients


def files(room: Path) -> Iterator[Path]:
    return (path for path in sorted(room.rglob("*.py")) if "__pycache__" not in path.parts)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} is not there"
        generated = target.suffix == ".md" and "<!-- commands -->" in target.read_text()  # checked by `make docs`
        if anchor and not generated:
            assert anchor in anchors(target), f"{link} names no heading"


def test_the_readme_is_one_that_is_read():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_layout_in_the_readme_names_what_is_there():
    layout = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("platform/pedro/"))
    above: list[str] = []
    for line in layout.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        path = ROOT.joinpath(*above)
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"{path} is not there"


def test_every_route_of_the_gateway_is_documented_and_no_other():
    paths = create_app(lambda: pytest.fail("no backend is asked for routes"), store=None).openapi()["paths"]  # type: ignore[arg-type]
    served = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    documented = {route for row in table(HTTP_API, "## Routes") for route in re.findall(r"`([A-Z]+ /\S+)`", row[0])}
    assert documented == served


def test_every_error_code_that_a_client_may_get_is_documented():
    named = {code for name in CLIENTS for path in files(PACKAGE / name) for code in codes_of(path)}
    from_code = codes_of(PACKAGE / "errors.py") | codes_of(PACKAGE / "gateway" / "errors.py")  # a table of its own
    assert not {code for code in named - from_code if f"`{code}`" not in prose(HTTP_API)}


COMMAND = re.compile(r"^(?:\S* |\$\()*pedro ([a-z].*)")  # not `kubectl -n pedro get`
NOT_OURS = re.compile(r"-[nU] pedro")
ROOT_COMMAND = typer.main.get_command(app)


def unknown_words(code: str) -> Iterator[str]:
    """Of the `pedro` commands in a line or a span of code: subcommands and flags that there are not."""
    for part in re.split(r" \| | && |; |\$\(", code.partition("# ")[0]):
        found = COMMAND.search(part)
        if found is None or NOT_OURS.search(part):
            continue
        command, words = ROOT_COMMAND, re.sub(r"[)\"'`].*", "", found[1]).split()
        while (children := getattr(command, "commands", None)) and words and re.fullmatch("[a-z-]+", words[0]):
            name = words.pop(0)
            if name not in children:
                yield f"pedro … {name}"
                break
            command = children[name]
        else:
            known = {"--help", *(flag for option in command.params for flag in (*option.opts, *option.secondary_opts))}
            yield from (f"{command.name} {word}" for word in words if word.startswith("-") and word not in known)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_flag_on_a_page_is_one_of_the_command_line(page):
    code = [line for block in blocks(page) if block.language != "python" for line in block.text.splitlines()]
    code += [span for span in re.findall(r"`([^`]+)`", prose(page))]
    assert not [f"{word} in: {line}" for line in code for word in unknown_words(line)]


def test_a_command_or_flag_that_there_is_not_is_found():
    assert list(unknown_words("pedro adapters show acme.faq --json  # all of it")) == []
    assert list(unknown_words("kubectl -n pedro get pods --all")) == []
    assert list(unknown_words("pedro adapters shaw acme.faq")) == ["pedro … shaw"]
    assert list(unknown_words("x | pedro keys create acme --scopes train")) == ["create --scopes"]


@pytest.mark.parametrize(
    "kind", sorted({kind for page in PAGES for kind in re.findall(r"<!-- fields: (\S+) -->", page.read_text())})
)
def test_every_key_in_the_reference_has_a_meaning(kind):
    """It stands beneath or beside the field, in the code."""
    lines = code_reference().fields(kind).strip().splitlines()[2:]
    assert lines
    assert not [line for line in lines if line.endswith("|  |")]


@cache
def code_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("code_reference", DOCS / "hooks" / "code_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def codes_of(path: Path) -> set[str]:
    return {first or second for first, second in CODES.findall(path.read_text())}


@cache
def read(path: Path) -> tuple[list[str], set[str]]:
    """A file's texts, with an ellipsis for what is filled in at run time, and its classes and `Class.attribute`s."""
    texts, defined = list[str](), set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
        elif isinstance(node, ast.ClassDef):
            defined.add(node.name)
            for part in node.body:
                target = part.target if isinstance(part, ast.AnnAssign) else None
                name = target.id if isinstance(target, ast.Name) else getattr(part, "name", "")
                defined.add(f"{node.name}.{name}")
    return texts, defined


@cache
def messages() -> str:
    """Every text of the code, a line each."""
    texts = [(ROOT / "Makefile").read_text(), *(text for path in files(PACKAGE) for text in read(path)[0])]
    return "\n".join(text.replace("`", "").replace("\n", " ") for text in texts)


@pytest.mark.parametrize("section", ["Starting", "Specs and data", "Jobs", "Adapters", "Over HTTP"])
def test_every_message_of_troubleshooting_is_one_of_the_code(section):
    for row in table(DOCS / "troubleshooting.md", f"## {section}\n"):
        quoted = re.findall(r"`([^`]+)`", row[0])
        assert quoted, row
        for message in quoted:
            pattern = ".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip())
            assert re.search(pattern, messages()), f"no text of the code is like {message!r}"


def test_every_message_in_the_runbook_is_one_that_is_written():
    written = re.sub(r"%[.\w]", "…", messages())
    quoted = {word for word in re.findall(r"`([^`]+)`", prose(DOCS / "runbook.md")) if " " in word}
    quoted = {word for word in quoted if not re.match(r"pedro |kubectl |grep |GET |POST |/|--|[a-z]+=", word)}
    assert len(quoted) > 10
    for message in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip())
        assert re.search(pattern, written), f"nothing writes {message!r}"


def test_the_glossary_has_each_term_once_in_order_and_the_classes_it_names_are_where_it_says():
    rows = table(DOCS / "glossary.md")
    terms = [row[0] for row in rows]
    assert terms == sorted(terms, key=lambda term: term.lower().replace("_", " ").replace("ω", "omega"))
    assert len(set(terms)) == len(terms)
    for term, meaning, where in rows:
        assert meaning.endswith((".", ")")), f"{term}: a meaning is a sentence"
        paths = [
            next(filter(Path.exists, (PACKAGE / path, ROOT / path)), None) for path in re.findall(r"`([^`]+)`", where)
        ]
        assert paths, f"{term}: says where it lives"
        assert None not in paths, f"{term}: {where} is not there"
        defined = {name for path in paths if path for name in definitions(path)}
        for name in CLASS.findall(f"{term} {meaning}"):
            assert name in defined, f"{term}: {where} defines no {name}"


def definitions(path: Path) -> set[str]:
    """What a file or a folder's files define."""
    inside = [path] if path.suffix == ".py" and path.is_file() else files(path)
    return {name for file in inside for name in read(file)[1]}


def test_each_fault_that_a_harness_found_is_held_by_a_test_that_there_is():
    section = (
        (ROOT / "CHANGELOG.md").read_text("utf-8").partition("### Found by the harnesses")[2].partition("\n## ")[0]
    )
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert {row[0] for row in rows} >= {"chaos", "fuzz", "integration", "alerts"}
    for _, what, test in rows:
        file, _, name = test.strip("`").partition("::")
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in found.read_text("utf-8"), f"{what}: {test}"


def test_no_curl_that_we_show_has_a_key_among_its_arguments():
    shown = [*PAGES, *(ROOT / "platform" / "pedro").rglob("*.py"), *(ROOT / "dashboard").rglob("*.py")]
    for path in shown:
        told = re.search(r"(-H|--header) *[\"']? *(Authorization|\$H)", path.read_text("utf-8"), re.IGNORECASE)
        assert told is None, f"{path}: {told[0]}; -H @- <<< reads it from standard input"


def test_no_page_asks_another_host_for_anything():
    """Fonts and scripts come with the site: it can be read without a network."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "mermaid" not in settings  # its script would come from a CDN
    for page in PAGES:
        assert not re.search(r"!\[[^]]*\]\(https?:", prose(page)), f"{name_of(page)} shows a picture from elsewhere"
