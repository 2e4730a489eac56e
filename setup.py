"""Puts the pages of `dashboard/` into the wheel, as `pedro/dashboard`; all else is declared in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PAGES = ("app.py", "connection.py", "drawing.py", "icon.png", ".streamlit/*.toml", "[a-z]*/*.py")


class BuildWithDashboard(build_py):
    """`pedro dashboard` needs no checkout; an editable install uses the pages of its own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for page in _pages():
            target = Path(self.build_lib, "pedro", page)
            self.mkpath(str(target.parent))
            self.copy_file(page, str(target))

    def get_source_files(self) -> list[str]:
        """What a source distribution holds, from which a wheel can be built again."""
        return [*super().get_source_files(), *_pages()]


def _pages() -> list[str]:
    return sorted(str(file) for pattern in PAGES for file in Path("dashboard").glob(pattern))


setup(cmdclass={"build_py": BuildWithDashboard})
