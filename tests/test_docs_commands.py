"""The commands of README and docs/ do what the pages say: each marked block is run, a page at a time, in order.

Before a block, `<!-- run -->` marks one that a laptop does within seconds, `<!-- run: slow -->` one that trains or
serves, `<!-- file: NAME -->` a file that the reader is asked to save. No block needs one of the other kind.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, Block, blocks, name_of

from pedro.cluster import free_port

GUARD_S = 1500  # against a command that never ends
REPRINTED = ("nano_rivals_template",)  # results that a page prints again, and so writes


def pages_with(mark: str) -> list[Path]:
    return [page for page in PAGES if any(block.mark == mark for block in blocks(page))]


@contextmanager
def checkout() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder that looks like a checkout and may be written to, and the environment of a reader of the pages."""
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as name:
        folder = Path(name) / "checkout"
        (folder / "jobs" / "results").mkdir(parents=True)
        (folder / "platform").symlink_to(ROOT / "platform")
        for path in (ROOT / "jobs").iterdir():
            if path.name != "results":
                (folder / "jobs" / path.name).symlink_to(path)
        for result in REPRINTED:
            shutil.copytree(ROOT / "jobs" / "results" / result, folder / "jobs" / "results" / result)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
        env["PEDRO_HOME"] = f"{name}/home"
        env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
        yield folder, env


def run(page: Path, mark: str) -> None:
    """Run the page's blocks of a kind as one shell session that ends at the first failure."""
    with checkout() as (folder, env):
        script = ["set -eu"]
        for number, block in enumerate(blocks(page), 1):
            if block.mark.startswith("file: "):
                (folder / block.mark.removeprefix("file: ")).write_text(block.text)
            elif block.mark == mark:
                script += [f"echo '== block {number}' >&2", as_shell(block)]
        words = on_port("\n".join(script), free_port())
        try:
            done = subprocess.run(
                ["bash", "-c", words], cwd=folder, env=env, capture_output=True, text=True, timeout=GUARD_S
            )
        finally:
            if (Path(env["PEDRO_HOME"]) / "ray").exists():
                down = [sys.executable, "-m", "pedro.cli", "down", "--yes"]
                subprocess.run(down, cwd=folder, env=env, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def as_shell(block: Block) -> str:
    assert block.language in ("sh", "python"), f"{block.language} cannot be run"
    return block.text if block.language == "sh" else f"python - <<'END'\n{block.text}END"


def on_port(script: str, port: int) -> str:
    """The script with a server on a free port in place of 8000."""
    return re.sub(r"\bpedro serve\b", f"pedro serve --port {port}", script.replace(":8000", f":{port}"))


@pytest.mark.parametrize("page", pages_with("run"), ids=name_of)
def test_quick_commands_of_a_page_work(page):
    run(page, "run")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("run: slow"), ids=name_of)
def test_slow_commands_of_a_page_work_one_after_the_other(page):
    run(page, "run: slow")
