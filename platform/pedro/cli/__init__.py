"""The `pedro` command: parses arguments and prints results; the work happens in other packages.

Each group of commands is a file of this package. Heavy imports are inside the commands, so that `--help` is instant.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

import typer

from pedro.cli import (
    adapters,
    audit,
    backbones,
    backup,
    chat,
    compare,
    controller,
    dashboard,
    data,
    db,
    doctor,
    files,
    gc,
    jobs,
    keys,
    methods,
    serve,
    sweep,
    tasks,
    tenants,
    usage,
    webhooks,
)
from pedro.cli.output import fail

if TYPE_CHECKING:
    from pedro.errors import PedroError

app = typer.Typer(
    name="pedro",
    help="Fine-tune and serve prompt-dependent adapters: one frozen backbone, many tenants, one tiny adapter each.\n\n"
    "Start with `pedro demo`. As a tenant: data check, submit, keys create, serve, chat. "
    "Every command has --help; most have examples, and --json for programs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(jobs.app, name="jobs")
app.add_typer(adapters.app, name="adapters")
app.add_typer(backbones.app, name="backbones")
app.add_typer(keys.app, name="keys")
app.add_typer(files.app, name="files")
app.add_typer(tenants.app, name="tenants")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(db.app, name="db")
app.command("submit")(jobs.submit)
app.command("controller")(controller.controller)
app.command("sweep")(sweep.sweep)
app.command("compare")(compare.compare)
app.command("dashboard")(dashboard.dashboard)
app.command("eval")(adapters.evaluate)
app.command("usage")(usage.usage)
app.command("serve")(serve.serve)
app.command("down")(serve.down)
app.command("chat")(chat.chat)
app.command("methods")(methods.methods)
app.command("tasks")(tasks.tasks)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("doctor")(doctor.doctor)
app.command("audit")(audit.audit)
app.command("gc")(gc.gc)
app.command("demo")(serve.demo)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from pedro import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: run the command; a PedroError becomes one clear message and exit status 1."""
    from pedro.errors import PedroError

    try:
        app()
    except PedroError as error:
        fail(error, as_json="--json" in sys.argv)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe had enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes it on its way out
        sys.exit(1)
    except OSError as error:
        fail(_of_this_machine(error), as_json="--json" in sys.argv)


def _of_this_machine(error: OSError) -> PedroError:
    """A disk or network error as one line; an error that names no file is a bug and keeps its traceback."""
    from pedro.errors import UnavailableError

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "PEDRO_HOME"
        return UnavailableError(f"no space left on the disk of {where}; free some and try again")
    if error.filename is None:
        raise error
    return UnavailableError(
        f"{error.filename}: {error.strerror or type(error).__name__}; check the path, and that PEDRO_HOME is a "
        "directory that you may write"
    )
