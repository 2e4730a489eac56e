"""`pedro files`: tenants' uploaded files, for operators; tenants use the server's `/v1/files`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, confirm, emit, table

if TYPE_CHECKING:
    from pedro.files import Files
    from pedro.store import FileRecord

app = typer.Typer(help="Tenants' uploaded files; a spec refers to one by its id.", no_args_is_help=True)
FileId = Annotated[str, typer.Argument(help="The file's id, from `pedro files list`.")]
Tenant = Annotated[str | None, typer.Option(help="Only a file of this tenant.")]
BLOCK = 1 << 20


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="The file.")],
    tenant: Annotated[str, typer.Option(help="The tenant who will own it.")],
    purpose: Annotated[str, typer.Option(help="fine-tune or batch.")] = "fine-tune",
    expires_after: Annotated[
        int | None,
        typer.Option(help="Seconds until it expires, 3600 to 2592000; a batch file expires after 30 days."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a file for a tenant; size limits do not apply here.

    Example: `pedro files upload train.jsonl --tenant acme`
    """
    from pedro.data.files import open_file
    from pedro.files import check_expiry, check_filename, check_purpose

    check_filename(path.name)
    check_purpose(purpose)
    after = None if expires_after is None else check_expiry("created_at", str(expires_after))
    files = _files()
    with open_file(path) as stream:
        growing = files.begin(tenant)
        try:
            while block := stream.read(BLOCK):
                growing.write(block)
            record = files.finish(growing, path.name, purpose, after)
        finally:
            growing.abandon()
    emit(asdict(record), as_json, lambda: typer.echo(record.id))


@app.command("list")
def list_files(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None,
    purpose: Annotated[str | None, typer.Option(help="Only files with this purpose.")] = None,
    as_json: AsJson = False,
) -> None:
    """List files, newest first, without expired ones."""
    records = _files().list_files(tenant, purpose=purpose)
    emit([asdict(record) for record in records], as_json, lambda: _show(records))


@app.command()
def show(file: FileId, tenant: Tenant = None, as_json: AsJson = False) -> None:
    """Show the details of a file."""
    record = _files().get(file, tenant)
    emit(asdict(record), as_json, lambda: _show([record], record.digest))


@app.command()
def download(
    file: FileId,
    to: Annotated[Path | None, typer.Argument(help="Where to write it [standard output].")] = None,
    tenant: Tenant = None,
) -> None:
    """Copy a file's content to a path that does not exist yet, or to standard output."""
    files = _files()
    with files.open(files.get(file, tenant)) as stream:
        if to is None:
            while block := stream.read(BLOCK):
                sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            return
        with to.open("xb") as target:
            while block := stream.read(BLOCK):
                target.write(block)


@app.command()
def delete(
    file: FileId,
    tenant: Tenant = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a file. Jobs that were submitted with it keep their own copy."""
    files = _files()
    record = files.get(file, tenant)
    confirm(f"Delete {record.filename} of tenant {record.tenant}?", yes, as_json)
    files.delete(record)
    emit({"id": record.id, "deleted": True}, as_json, lambda: typer.echo(f"deleted {record.id}"))


def _files() -> Files:
    from pedro.config import Settings
    from pedro.files import Files
    from pedro.store import Store

    settings = Settings.from_env()
    return Files(Store(settings.database_url), settings.storage)


def _show(records: Iterable[FileRecord], digest: str | None = None) -> None:
    columns = ["id", "tenant", "name", "purpose", "bytes", "created", "expires"]
    rows: list[list[Any]] = [
        [
            record.id,
            record.tenant,
            record.filename,
            record.purpose,
            f"{record.bytes:,}",
            _when(record.created),
            _when(record.expires),
        ]
        for record in records
    ]
    table(columns, rows, empty="no files yet; `pedro files upload FILE --tenant TENANT` adds one", whole=1)
    if digest is not None:
        typer.echo(f"digest: {digest}")


def _when(seconds: float | None) -> str:
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
