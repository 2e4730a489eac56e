"""Runs `pedro` commands in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from pedro import cli

Ended = tuple[Any, str, str]


def command_runner(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """A function that runs a command; it gives exit status, standard output and standard error. No traceback passes."""

    def run(*words: object, **environment: object) -> Ended:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", ["pedro", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return ended.value.code or 0, out, err

    return run
