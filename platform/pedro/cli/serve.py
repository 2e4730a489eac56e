"""`pedro serve`, `pedro down` and `pedro demo`: the running platform."""

from __future__ import annotations

import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from pedro.cli.output import AsJson, emit, log

READ_BYTES = 1 << 20


def serve(
    backbone: Annotated[
        str, typer.Option(help="A name of `pedro backbones list`, a directory or a hub id.")
    ] = "stories260K",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface, :: with IPv6 too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(help="Engine replicas, usually one per device.")] = 1,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Processes to split each replica over, on one machine, one GPU each.", min=1)
    ] = 1,
    gateways: Annotated[int, typer.Option(help="Gateway processes; quotas hold for all of them together.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Most CPU threads per replica [its share of half the cores].")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    weights: Annotated[
        str, typer.Option(help="float32, or int8 or int4: quantise the backbone, for the CPU kernel.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_batch: Annotated[int, typer.Option(help="Most sequences decoded together.")] = 32,
    prefill_stall: Annotated[
        float,
        typer.Option(help="Time a step may spend on others' prompts, in decode steps: less for even streams."),
    ] = 1.25,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer together.")] = None,
    kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory per replica for running requests, e.g. 4GiB, or a share of what is free "
            "[0.5 for all replicas of a machine; 0.8 of a GPU]."
        ),
    ] = None,
    adapter_budget_mb: Annotated[float, typer.Option(help="Memory per replica for resident adapters.")] = 512,
    prefix_cache_mb: Annotated[
        float, typer.Option(help="Memory per replica for reusing prompts that begin alike; 0 is off.", min=0)
    ] = 512,
    share_bare_prefixes: Annotated[
        bool, typer.Option("--share-bare-prefixes", help="Let tenants reuse each other's prompts to the bare backbone.")
    ] = False,
    speculate: Annotated[
        str, typer.Option(help="off, or ngram: guess tokens from the text so far; answers stay the same.")
    ] = "off",
    num_speculative_tokens: Annotated[int, typer.Option(help="Most tokens guessed at once.")] = 8,
    prompt_lookup_max: Annotated[int, typer.Option(help="Most trailing tokens to look up.")] = 3,
    prompt_lookup_min: Annotated[int, typer.Option(help="Fewest trailing tokens to look up.")] = 2,
    tenant_weight: Annotated[
        list[str] | None, typer.Option(help="TENANT=SHARE of a busy engine, 1 if not given; repeatable.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it answers; `pedro down` stops it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the backbone and every registered champion behind an OpenAI-compatible API, until Ctrl-C.

    If the Ray head dies, it is restarted together with the server, but not with --detach.

    Example: `pedro serve --port 8000`, then point any OpenAI client at http://127.0.0.1:8000/v1
    """
    import os

    from pedro.config import Settings
    from pedro.serving.config import ServeConfig
    from pedro.serving.deploy import answers, deploy, disconnect, record, restarting, undeploy
    from pedro.serving.door import Door
    from pedro.serving.supervision import Supervisor
    from pedro.spec_reader import validate_spec
    from pedro.training.queue.process import ControllerKeeper

    settings, host = Settings.from_env(), host.strip("[]")  # as URLs have an IPv6 address
    options = {
        "backbone": backbone,
        "replicas": replicas,
        "tensor_parallel_size": tensor_parallel_size,
        "gateways": gateways,
        "threads": threads
        or max(1, (os.cpu_count() or 2) // 2 // max(1, replicas)),  # the rest: proxy, gateway, clients
        "dtype": dtype,
        "weights": weights,
        "device": device,
        "num_gpus": tensor_parallel_size if device.startswith("cuda") else 0,
        "max_batch": max_batch,
        "prefill_stall": prefill_stall,
        "max_length": max_length,
        "kv_memory": kv_memory,
        "adapter_budget_mb": adapter_budget_mb,
        "prefix_cache_mb": prefix_cache_mb,
        "share_bare_prefixes": share_bare_prefixes,
        "speculate": speculate,
        "num_speculative_tokens": num_speculative_tokens,
        "prompt_lookup_max": prompt_lookup_max,
        "prompt_lookup_min": prompt_lookup_min,
        "tenant_weights": dict(_share(text) for text in tenant_weight or ()),
    }
    config = validate_spec(options, ServeConfig, source="serve")
    served = deploy(settings, config, host, port, log)
    controller_keeper = ControllerKeeper(settings)
    controller_keeper.ensure()

    def show() -> None:
        typer.echo(f"serving {served.backbone} at {served.url}/v1")
        url = shlex.quote(served.url)  # some shells take brackets for a pattern
        typer.echo(f'try:  curl {url}/v1/models -H @- <<< "Authorization: Bearer $(pedro keys create TENANT)"')
        if not detach:
            typer.echo(f"requests, as {settings.requests_log} has them; Ctrl-C ends the server", err=True)

    emit({"url": served.url, "backbone": served.backbone}, as_json, show)
    if detach:
        return
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    threading.Thread(target=_show_requests, args=(settings.requests_log,), name="requests", daemon=True).start()
    own_port = int(served.url.rpartition(":")[2])

    def served_here() -> bool:
        return settings.ray_address is None and (record(settings).is_file() or restarting(settings).is_file())

    door = Door(host, own_port, served_here, lambda: answers(served.url))
    try:
        disconnect()
        door.start()
        Supervisor(settings, config, host, own_port, log, controller_keeper.ensure).run()
        log("the server was ended")
    except KeyboardInterrupt:
        log("ending the server")
    finally:
        door.close()
        undeploy(settings)


def down(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Cancel running jobs without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop the server and the local Ray head of this PEDRO_HOME. Asks first if a job is running."""
    from pedro.cli.jobs import running_jobs, stop_jobs
    from pedro.cli.output import confirm
    from pedro.config import Settings
    from pedro.serving.deploy import end
    from pedro.store import Store
    from pedro.training.queue.process import end_controller

    settings = Settings.from_env()
    running = running_jobs(settings)
    if running:
        log(f"{len(running)} of its jobs have not ended: " + ", ".join(f"{model} ({job})" for job, model in running))
        confirm("End them? What they have trained since their last checkpoint is lost.", yes, as_json)
        stop_jobs([job for job, _ in running])
    end_controller(settings)
    ended = end(settings)
    if waiting := Store(settings.database_url).count_open_jobs():
        stay = "1 job stays" if waiting == 1 else f"{waiting} jobs stay"
        log(f"{stay} queued; `pedro controller`, or the next `pedro submit`, starts what waits")

    def show() -> None:
        typer.echo(
            "ended " + " and ".join(name for name, was in ended.items() if was)
            if any(ended.values())
            else "nothing ran"
        )

    emit(ended, as_json, show)


def demo(
    small: Annotated[
        bool, typer.Option("--small", help="On a small packaged backbone, with short answers; a few minutes.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    port: Annotated[int, typer.Option(help="Port of the server; 0 takes a free one.", min=0, max=65535)] = 0,
    as_json: AsJson = False,
) -> None:
    """Three tenants, three tasks, one backbone: train, register, serve, hot-swap and measure, on this machine.

    Pulls smollm2-135m if it is not there; where that cannot be had, does as with --small. A second run starts from the
    adapters that are there. Results: PEDRO_HOME/demo/result.json.
    """
    from pedro.config import Settings
    from pedro.demo import run_demo

    result = run_demo(Settings.from_env(), small=small, keep=keep, port=port, log=log if as_json else typer.echo)
    emit(result, as_json, lambda: None)


def follow(path: Path, poll_s: float = 0.5) -> Iterator[str]:
    """Lines appended to a log from now on, without end; the file may be created or rotated meanwhile.

    What is no regular file is not read: a device may give bytes without end.
    """
    at = path.stat().st_size if path.is_file() else 0
    rest = b""
    while True:
        gained = b""
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    if at > file.seek(0, 2):
                        at, rest = 0, b""
                    file.seek(at)
                    gained = file.read(READ_BYTES)
        at += len(gained)
        *whole, rest = (rest + gained).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in whole)
        if len(gained) < READ_BYTES:
            time.sleep(poll_s)


def _show_requests(path: Path) -> None:
    for line in follow(path):
        log(line)


def _share(text: str) -> tuple[str, float]:
    from pedro.errors import ConfigError

    tenant, _, share = text.partition("=")
    try:
        return tenant, float(share)
    except ValueError:
        raise ConfigError(f"--tenant-weight: expected TENANT=NUMBER, got {text!r}") from None
