"""Deploys the application on a cluster and removes it again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.config import SERVER_RECORD
from pedro.errors import BackboneError, ConfigError, ConflictError, PedroError, UnavailableError

if TYPE_CHECKING:
    from pedro.backbone import Backbone
    from pedro.config import Settings
    from pedro.serving.config import ServeConfig

APP_NAME = "pedro"
READY_TIMEOUT_S = 180


@dataclass(frozen=True)
class Served:
    """A running application."""

    url: str
    backbone: str


def deploy(
    settings: Settings,
    config: ServeConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Callable[[str], None] = lambda _line: None,
    *,
    again: bool = False,
) -> Served:
    """Serve `config` on the cluster of `settings` and wait until it answers. `again`: replace this home's server, whose
    head is gone; its port is kept, and clients wait.

    Raises BackboneError for a backbone that cannot be had or loaded, ConfigError for a device or an address that there
    is not or a limit of connections that is not a number,
    UnavailableError if the port is taken or the application does not come up, ConflictError if this home serves
    already; nothing is left half started.
    """
    from pedro import cluster
    from pedro.backbone import locate_backbone
    from pedro.backbones.sharing import offer_backbone
    from pedro.gateway.connections import ConnectionLimits

    config = config.model_copy(update={"backbone": locate_backbone(config.backbone, Path.cwd())})
    ConnectionLimits.from_env()
    if not again and not (host and cluster.port_is_free(0, host)):
        raise ConfigError(
            f"host: {host!r} is no address of this machine; 127.0.0.1 is for this machine alone, 0.0.0.0 for every "
            "interface, :: for every interface with IPv6 too",
            param="host",
        )
    _check(config, here=settings.ray_address is None)
    offer_backbone(settings, config.backbone, log)
    running = None if again else find(settings)
    if running is not None:
        raise ConflictError(
            f"already serving {running.backbone} at {running.url}: one server serves one backbone per PEDRO_HOME; "
            "stop it with `pedro down`, or use another PEDRO_HOME for a second server"
        )
    port = port or cluster.free_port()
    if not again and not cluster.port_is_free(port, host):
        raise UnavailableError(
            f"port: {port} on {host} is in use; stop what uses it, or choose another with --port (0: any free one)",
            param="port",
        )
    cluster.connect(settings, log, attach=True)
    import logging

    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from pedro.serving.app import NO_ACCESS_LOG, build_app

    app = build_app(config.model_dump())
    if record(settings).is_file():  # of a server that no longer answers, but may still occupy its port
        _take_down(settings)
    served = Served(cluster.url_of(host, port), config.model_name)
    log(f"loading {config.backbone} and starting the server on {served.url}")
    try:
        serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=75),
            logging_config=NO_ACCESS_LOG,
        )
        serve.run(app, name=APP_NAME, route_prefix="/", blocking=False)
        _wait_ready(served.url)
        with suppress(Exception):  # the server works anyway
            log(_room())
    except RuntimeError as error:
        own = _error_of_a_replica()
        _take_down(settings)
        if own is not None:
            raise own from error
        raise UnavailableError(f"the server did not start: {_last_line(error)}; its log is in Ray's session") from error
    except BaseException:
        _take_down(settings)
        raise
    record(settings).parent.mkdir(parents=True, exist_ok=True)
    record(settings).write_text(json.dumps({"url": served.url, "backbone": served.backbone}))
    return served


def undeploy(settings: Settings) -> bool:
    """Remove the application from the cluster; False if this home serves nothing."""
    from pedro import cluster

    recorded = record(settings).is_file()
    if recorded and settings.ray_address is None and cluster.find_head(settings) is None:
        record(settings).unlink(missing_ok=True)
        return False
    if recorded:
        cluster.connect(settings, attach=True)
        _take_down(settings)
    return recorded


def end(settings: Settings) -> dict[str, bool]:
    """End what this home runs: its application and its local head, if any, with everything on it.

    Returns which of `server` and `head` were running.
    """
    from pedro import cluster

    if settings.ray_address is not None:
        return {"server": undeploy(settings), "head": False}
    recorded = record(settings).is_file() or restarting(settings).is_file()
    record(settings).unlink(missing_ok=True)
    restarting(settings).unlink(missing_ok=True)
    head = cluster.stop_head(settings)
    return {"server": recorded and head, "head": head}


def disconnect() -> None:
    """Disconnect from the cluster, whose server continues: Ray kills connected processes when the head dies."""
    import ray

    ray.shutdown()


def find(settings: Settings) -> Served | None:
    """The application of this home, if it answers."""
    import httpx

    try:
        served = Served(**json.loads(record(settings).read_text()))
        httpx.get(f"{served.url}/health", timeout=5).raise_for_status()
    except (OSError, ValueError, TypeError, httpx.HTTPError):
        return None
    return served


def _take_down(settings: Settings) -> None:
    """Remove it from the cluster; also shut down Serve if the cluster belongs to this home."""
    from ray import serve

    if settings.ray_address is None:
        serve.shutdown()
    else:
        serve.delete(APP_NAME)
    record(settings).unlink(missing_ok=True)


def record(settings: Settings) -> Path:
    """The file with this home's server address, while it runs."""
    return settings.home / SERVER_RECORD


def restarting(settings: Settings) -> Path:
    """A file that exists while a server is restarted after its head died; removing it aborts the restart."""
    return settings.home / "ray" / "restarting"


def answers(url: str) -> bool:
    """Whether the server there is ready for requests."""
    import httpx

    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _wait_ready(url: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if answers(url):
            return
        time.sleep(0.2)
    raise UnavailableError(f"the server at {url} was not ready within {READY_TIMEOUT_S} s")


def _room() -> str:
    """A line on the size of a replica's KV cache."""
    from ray import serve

    stats = serve.get_deployment_handle("engine", APP_NAME).stats.remote().result(timeout_s=READY_TIMEOUT_S)
    return str(stats["room"])


def _check(config: ServeConfig, here: bool) -> None:
    """Raise errors on which a replica would fail, before anything starts; `here`: replicas run on this host."""
    from pedro.backbone import check_dtype_and_device, check_tokenizer_files, resolve_backbone

    backbone = resolve_backbone(config.backbone)
    if here:
        check_dtype_and_device(config.dtype, config.device)
        check_tokenizer_files(backbone)
        if config.weights != "float32":
            _check_quantised(config, backbone)
        if config.tensor_parallel_size > 1:
            _check_ranks(config, backbone)


def _check_quantised(config: ServeConfig, backbone: Backbone) -> None:
    """Raise BackboneError if these weights need the native kernel, which cannot run."""
    from pedro.backbone import load_config
    from pedro.engine.native_model import unfit

    why = f"--device {config.device}" if config.device != "cpu" else ""
    why = why or (f"--dtype {config.dtype}" if config.dtype != "float32" else unfit(load_config(backbone)))
    if why:
        raise BackboneError(
            f"weights: {config.weights} needs the CPU kernel with --dtype float32, which cannot run here: {why}; "
            "use --weights float32"
        )


def _check_ranks(config: ServeConfig, backbone: Backbone) -> None:
    """Raise errors that would prevent the ranks of a replica from starting."""
    from pedro.backbone import load_config
    from pedro.engine.tensor_parallel import check_devices, check_split

    check_split(load_config(backbone), config.tensor_parallel_size, backbone.id)
    check_devices(config.device, config.tensor_parallel_size)


def _error_of_a_replica() -> PedroError | None:
    """The PedroError with which a replica failed, from Serve's status."""
    from ray import serve

    from pedro import errors

    app = serve.status().applications.get(APP_NAME)
    said = "\n".join(deployment.message for deployment in app.deployments.values()) if app else ""
    raised = re.findall(r"pedro\.errors\.(\w+): (.+)", said)
    kind = getattr(errors, raised[-1][0], None) if raised else None
    return kind(raised[-1][1]) if isinstance(kind, type) and issubclass(kind, PedroError) else None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
