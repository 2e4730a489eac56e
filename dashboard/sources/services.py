"""Health of the registry, the records, Ray and the server, with the command that starts what is missing.

Starts nothing and creates nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from pedro.config import without_password
from sources.gateway import DEFAULT_URL, GatewayClient
from sources.stores import SQLITE, is_there

if TYPE_CHECKING:
    from pedro.config import Settings

TIMEOUT_S = 2.0


class ServiceState(StrEnum):
    UP = "up"
    OFF = "off"
    """Not there, and nothing is wrong with that: a command brings it."""
    DOWN = "down"
    """Should answer and does not."""


@dataclass(frozen=True)
class Service:
    """One service: its state, what was found, and the remedy."""

    name: str
    state: ServiceState
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class RayAddress:
    """Where the cluster's job server is; empty, and why, where there is none to ask."""

    url: str = ""
    problem: str = ""


def health(settings: Settings) -> tuple[Service, ...]:
    """Every service, each asked for two seconds at most."""
    return registry_health(settings), records_health(settings), ray_health(settings), server_health(settings)


def registry_health(settings: Settings) -> Service:
    uri = settings.tracking_uri
    if not is_there(uri):
        return Service(
            "MLflow", ServiceState.OFF, "no registry yet", "`make demo` or `pedro submit SPEC.yaml` makes one"
        )
    if not uri.startswith("http"):
        return Service("MLflow", ServiceState.UP, _database(settings, uri))
    if _answers(f"{uri.rstrip('/')}/health"):
        return Service("MLflow", ServiceState.UP, f"server `{without_password(uri)}`")
    remedy = "start it (`mlflow server`), or unset MLFLOW_TRACKING_URI to use the file in PEDRO_HOME"
    return Service("MLflow", ServiceState.DOWN, f"`{without_password(uri)}` does not answer", remedy)


def records_health(settings: Settings) -> Service:
    url = settings.database_url
    if not is_there(url):
        return Service(
            "Records", ServiceState.OFF, "no keys and no jobs yet", "`pedro keys create TENANT` makes the first"
        )
    return Service("Records", ServiceState.UP, _database(settings, url))


def ray_health(settings: Settings) -> Service:
    ray = find_ray(settings)
    if ray.url and _answers(f"{ray.url}/api/version"):
        return Service("Ray", ServiceState.UP, f"dashboard {ray.url}")
    if ray.url:
        return Service("Ray", ServiceState.DOWN, f"{ray.url} does not answer", "`pedro doctor` checks the cluster")
    if settings.ray_address is None:
        return Service("Ray", ServiceState.OFF, "no local head", "`pedro submit SPEC.yaml` or `pedro serve` starts one")
    return Service("Ray", ServiceState.DOWN, f"cluster `{settings.ray_address}`", ray.problem)


def find_ray(settings: Settings, env: Mapping[str, str] = os.environ) -> RayAddress:
    """The job server of this home's local head, or of the cluster that RAY_ADDRESS names."""
    if env.get("RAY_API_SERVER_ADDRESS"):
        return RayAddress(env["RAY_API_SERVER_ADDRESS"].rstrip("/"))
    if settings.ray_address is None:
        from pedro.cluster import find_head, prepare_environment

        head = find_head(settings)
        if head is None:
            return RayAddress(problem="no local Ray head runs for this home")
        prepare_environment(settings)  # the head's token, without which it answers nobody
        return RayAddress(head.dashboard_url)
    if settings.ray_address.startswith("http"):
        return RayAddress(settings.ray_address.rstrip("/"))
    return RayAddress(
        problem="set RAY_API_SERVER_ADDRESS to the cluster's dashboard (http://HEAD:8265) to see its jobs here"
    )


def server_health(settings: Settings) -> Service:
    url = gateway_url(settings)
    status = GatewayClient(url).status()
    if status.ready:
        return Service("Serve", ServiceState.UP, f"{url}/v1")
    if status.answers:
        return Service(
            "Serve", ServiceState.DOWN, f"{url} answers, but is not ready", "it may still be loading its backbone"
        )
    named = bool(os.environ.get("PEDRO_GATEWAY_URL")) or (settings.home / "serve.json").is_file()
    seen = f"{url} does not answer" if named else "nothing is served"
    return Service("Serve", ServiceState.DOWN if named else ServiceState.OFF, seen, "`pedro serve` starts it")


def gateway_url(settings: Settings, env: Mapping[str, str] = os.environ) -> str:
    """Where the gateway is: as the environment says, else as `pedro serve` of this home wrote down."""
    if env.get("PEDRO_GATEWAY_URL"):
        return env["PEDRO_GATEWAY_URL"].rstrip("/")
    try:
        return str(json.loads((settings.home / "serve.json").read_text())["url"])
    except (OSError, ValueError, TypeError, KeyError):
        return DEFAULT_URL


def _database(settings: Settings, url: str) -> str:
    """How a page names it: a file of the home by its relative path."""
    path = Path(url.removeprefix(SQLITE))
    if url.startswith(SQLITE) and path.is_relative_to(settings.home):
        return f"`{path.relative_to(settings.home)}` in the home"
    return f"`{without_password(url)}`"


def _answers(url: str) -> bool:
    """Whether anything but a server error comes back; a page that wants a token is one that answers."""
    try:
        return httpx.get(url, timeout=TIMEOUT_S).status_code < 500
    except httpx.HTTPError:
        return False
