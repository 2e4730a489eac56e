"""`pedro submit` and `pedro jobs`: fine-tuning jobs."""

import typer

app = typer.Typer(help="Fine-tuning jobs: list, logs, stop.", no_args_is_help=True)


def submit() -> None: ...
@app.command("list")
def l() -> None: ...
@app.command("logs")
def m() -> None: ...
