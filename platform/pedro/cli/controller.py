"""`pedro controller`: starts queued jobs when their turn comes, until it is stopped."""

from __future__ import annotations

from typing import Annotated

import typer

from pedro.cli.output import log


def controller(
    per_tenant: Annotated[
        int | None, typer.Option(help="Most jobs of one tenant that run at once [as many as fit].", min=1)
    ] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Exit when no job is queued or running.")] = False,
    template: Annotated[
        str | None,
        typer.Option(help="With PEDRO_LAUNCHER=kuberay: the suspended RayJob to use as a template.", metavar="NAME"),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option(
            help="With PEDRO_LAUNCHER=kuberay: most CPUs of all workers together [what the cluster allows].", min=0
        ),
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="The same for GPUs.", min=0)] = None,
) -> None:
    """Start queued jobs when their turn comes and their resources are free, and watch them until they end.

    A laptop needs none: `pedro submit` starts one that ends with the last job. On a cluster it runs as a Deployment;
    of several, each job has one at a time, and one that dies is replaced by another after 30 s. Jobs run on the Ray
    cluster in RAY_ADDRESS or, with PEDRO_LAUNCHER=kuberay, each as a RayJob of its own in Kubernetes.
    With PEDRO_SHARE_ACROSS_TENANTS=1, jobs of several tenants may share a worker (resources.share).
    """
    from pedro.config import Settings
    from pedro.errors import ConfigError
    from pedro.training.queue.process import run

    settings = Settings.from_env()
    launcher = None
    if settings.launcher == "kuberay":
        from pedro.training.queue.kuberay import TEMPLATE, KubeRayJobs

        launcher = KubeRayJobs(settings, template=template or TEMPLATE, cpus=cpus, gpus=gpus)
    elif template is not None or cpus is not None or gpus is not None:
        raise ConfigError("--template, --cpus and --gpus are for PEDRO_LAUNCHER=kuberay; set it, or leave them out")
    log(f"the controller of {settings.home} works on the jobs of its store; Ctrl-C ends it, and the jobs go on")
    run(settings, log, until_idle=until_idle, per_tenant=per_tenant, launcher=launcher)
