"""Lets pages link to files of the repository outside docs/: each becomes part of the site, below `repository/`.

A relative link means the same in a checkout, on a forge and in the built site. MkDocs itself checks what comes out.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
OUTSIDE = "repository"
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s]+)(?=\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and those that these link to in turn."""
    todo = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path is not None]
    seen: set[Path] = set()
    while todo:
        page = todo.pop()
        for target in _targets(page.read_text(encoding="utf-8"), page.parent):
            if target in seen or target.is_relative_to(DOCS) or not target.is_relative_to(ROOT):
                continue
            seen.add(target)
            if target.is_file():
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
                if target.suffix == ".md":
                    todo.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ (or come back to it from outside) to where the site has the file."""
    here = _path(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path, mark, anchor = link[1].partition("#")
        target = Path(os.path.normpath(here.parent / path))
        if here.is_relative_to(DOCS) and target.is_relative_to(DOCS):
            return link[1]
        return posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri)) + mark + anchor

    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[last:])])


def _targets(markdown: str, folder: Path) -> Iterator[Path]:
    for link in LINK.finditer(FENCE.sub("", markdown)):
        yield Path(os.path.normpath(folder / link[1].partition("#")[0]))


def _uri(path: Path) -> str:
    """Where the site has a file of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def _path(uri: str) -> Path:
    """The file of the repository that is at `uri` of the site."""
    return ROOT / uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else DOCS / uri
