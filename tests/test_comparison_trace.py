"""How many files of the project `pedro compare --report` enters, traced in process on committed runs."""

import shutil
import sys
from collections import Counter
from pathlib import Path

from typer.testing import CliRunner

import pedro
from pedro.cli import app
from pedro.comparison import statistics

PACKAGE = Path(pedro.__file__).parent
ROOT = PACKAGE.parents[1]
PREFIX = f"{PACKAGE}/"
MOST_FILES = 20
MOST_MOVES = 50  # from file to file, for a reader who follows each function when it is first called


class Trace:
    """The project's files that calls enter, and each move to another file for a function that was not called before."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.moves: list[str] = []
        self._seen: set[tuple[str, int]] = set()

    def __call__(self, frame, event, _) -> None:
        if event != "call" or not (path := frame.f_code.co_filename).startswith(PREFIX):
            return
        name = path.removeprefix(PREFIX)
        self.calls[name] += 1
        function = (name, frame.f_code.co_firstlineno)
        if function not in self._seen:
            self._seen.add(function)
            if not self.moves or self.moves[-1] != name:
                self.moves.append(name)


def test_a_report_enters_few_files_and_seldom_moves_between_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(statistics, "NUM_SAMPLES", 50)  # the way is the same
    # To draw for a reader enters no file of ours, and took most of the time.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _figure, path, **_how: path.touch())
    shutil.copytree(ROOT / "jobs" / "results" / "nano_table4", tmp_path / "out")
    words = [
        "compare",
        str(next((ROOT / "jobs").rglob("nano_table4.yaml"))),
        "--out",
        str(tmp_path / "out"),
        "--report",
    ]
    assert CliRunner().invoke(app, words).exit_code == 0  # imports, which enter every file once, are none of the trip
    trace = Trace()
    sys.setprofile(trace)
    done = CliRunner().invoke(app, words)
    sys.setprofile(None)
    assert done.exit_code == 0, done.output
    listed = "\n".join(f"{count:8,} calls  {name}" for name, count in trace.calls.most_common())
    assert {path.name for path in tmp_path.rglob("*.png")}, "figures were drawn"
    assert len(trace.calls) <= MOST_FILES, f"{len(trace.calls)} files are entered:\n{listed}"
    assert len(trace.moves) <= MOST_MOVES, f"{len(trace.moves)} moves:\n" + " → ".join(trace.moves)
