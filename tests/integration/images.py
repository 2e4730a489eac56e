"""The two images that are none of ours, from packages: PostgreSQL of a wheel, and moto's server for S3."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from k8s_postgres import make_databases

from jobs.benchmarks.postgres_server import PostgresServer, running_server

if TYPE_CHECKING:
    from integration.pods import LocalPod

POSTGRES, S3 = 5432, 9000
BUCKET = "pedro"
ENTRY = (
    "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256"  # as the image's own: from elsewhere with a password
)
STARTS_S = 120


@contextmanager
def postgres(pod: LocalPod) -> Iterator[PostgresServer]:
    """A server at the Service's port, with the roles, databases and passwords that the container would make."""
    with running_server(pod.ports[POSTGRES]) as server:
        make_databases(server, pod.known.objects, pod.environment(pod.container), ENTRY)
        yield server


@contextmanager
def s3(pod: LocalPod) -> Iterator[None]:
    """An object store at the Service's port, with the bucket that MinIO's init container makes. It keeps everything
    in memory, and takes any key."""
    import boto3

    (bucket,) = (Path(words[-1]).name for words in (one["command"] for one in pod.pod.spec["initContainers"]))
    assert bucket == BUCKET
    address = f"http://127.0.0.1:{pod.ports[S3]}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(pod.ports[S3])]
    with pod.log.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + STARTS_S
        while not _answers(address):
            assert process.poll() is None, pod.last_words()
            assert time.monotonic() < until, pod.last_words()
            time.sleep(0.2)
        keys = pod.environment(pod.container)
        client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id=keys["MINIO_ROOT_USER"],
            aws_secret_access_key=keys["MINIO_ROOT_PASSWORD"],
        )
        client.create_bucket(Bucket=BUCKET)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=2).status_code < 500
    except httpx.HTTPError:
        return False
