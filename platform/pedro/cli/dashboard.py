"""`pedro dashboard`: the platform in a browser."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pedro.cli.output import log

if TYPE_CHECKING:
    from pedro.config import Settings

REQUIRE_KEY = "PEDRO_DASHBOARD_REQUIRE_KEY"


def dashboard(
    host: Annotated[
        str, typer.Option(help="Address to listen on; on any but loopback, visitors need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8501,
    browser: Annotated[bool, typer.Option("--browser", help="Open it in this machine's browser.")] = False,
) -> None:
    """Show comparisons, runs, sweeps, adapters and the server in a browser, until Ctrl-C.

    Example: `pedro dashboard`, then open http://127.0.0.1:8501
    """
    from pedro.cluster import is_loopback, port_is_free, url_of
    from pedro.config import Settings
    from pedro.errors import NotFoundError, UnavailableError

    app = find_app()
    try:
        from streamlit.web import cli
    except ImportError as error:
        raise NotFoundError("Streamlit is not installed: pip install 'pedro-platform[dashboard]'") from error
    settings, host = Settings.from_env(), host.strip("[]")  # as URLs have an IPv6 address
    if not port_is_free(port, host):
        raise UnavailableError(
            f"port: {port} on {host} is in use, perhaps by another dashboard; choose another with --port", param="port"
        )
    os.environ.update(settings.env())
    options = [f"--server.address={host}", f"--server.port={port}", f"--server.headless={str(not browser).lower()}"]
    if not is_loopback(host):
        os.environ[REQUIRE_KEY] = "1"
        options.append("--server.allowedHosts=*")  # whatever name resolves to this machine
    log(f"dashboard of {settings.home}: {url_of(host, port)}" + ("" if is_loopback(host) else " (asks for a key)"))
    threading.Thread(target=_warm_up, args=(settings,), name="warm-up", daemon=True).start()
    sys.argv = ["streamlit", "run", str(app), *options]
    cli.main()


def find_app() -> Path:
    """`app.py` of the installed package, or of the checkout that an editable install belongs to."""
    package = Path(__file__).parents[1]
    installed = package / "dashboard" / "app.py"
    return installed if installed.is_file() else package.parents[1] / "dashboard" / "app.py"


def _warm_up(settings: Settings) -> None:
    """Import what takes seconds while the user opens the browser."""
    from pedro.errors import PedroError
    from pedro.registry import Registry

    with suppress(ImportError):
        import altair  # noqa: F401
        import pandas  # noqa: F401
    sqlite = settings.tracking_uri.removeprefix("sqlite:///")
    if sqlite == settings.tracking_uri or Path(sqlite).is_file():  # looking creates nothing
        with suppress(PedroError):
            Registry.open(settings).connect()
