"""The part of the Kubernetes API that serves RayJobs, over HTTP, and by hand what KubeRay would do to them.

It refuses what the API server and the operator refuse: unknown fields (by KubeRay's own schemas), a name that is
taken, one of more than 47 characters. Deletion in the foreground leaves an object until its
pods are gone. Independent of pedro.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import yaml

SCHEMAS = Path(__file__).parent / "fixtures" / "kuberay" / "schemas.json.gz"
PREFIX = "/apis/ray.io/v1/namespaces/pedro/rayjobs"


class RayJobs:
    """What the namespace `pedro` holds. `away` makes every request fail, `forbidden` refuses it."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}
        self.asked: list[tuple[str, str]] = []
        self.away = self.forbidden = False
        schema = json.loads(gzip.decompress(SCHEMAS.read_bytes()))["RayJob"]
        self._validator = jsonschema.Draft202012Validator(schema)

    def add(self, item: dict[str, Any]) -> None:
        """As `kubectl apply` does."""
        self.check(item)
        self.items[item["metadata"]["name"]] = item

    def check(self, item: dict[str, Any]) -> None:
        """Raise ValueError for what would be refused."""
        bare = {key: value for key, value in item.items() if key != "status"}
        for error in self._validator.iter_errors(bare):
            raise ValueError(f"{error.json_path}: {error.message}")
        if len(item["metadata"]["name"]) > 47:
            raise ValueError("the name has more than 47 characters")

    def set(self, name: str, deployment: str, job: str = "") -> None:
        """What the operator writes about one."""
        self.items[name]["status"] = {"jobDeploymentStatus": deployment, "jobStatus": job}

    def pods_gone(self, name: str) -> None:
        """The last step of a deletion."""
        assert self.items[name]["metadata"].get("deletionTimestamp"), "nobody deleted it"
        del self.items[name]

    def answer(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """Status and body of a request."""
        parts = urlsplit(url)
        self.asked.append((method, parts.path))
        name = parts.path.removeprefix(PREFIX).strip("/")
        if self.away:
            return 503, failure(503, "etcdserver: no leader")
        if self.forbidden:
            return 403, failure(403, "rayjobs.ray.io is forbidden")
        if not parts.path.startswith(PREFIX) or (name and name not in self.items):
            return 404, failure(404, f'rayjobs.ray.io "{name}" not found')
        if method == "POST":
            assert body is not None
            if body["metadata"]["name"] in self.items:
                return 409, failure(409, "already exists")
            try:
                self.add(body)
            except ValueError as error:
                return 422, failure(422, str(error))
            return 201, body
        if method == "DELETE":
            assert body == {"propagationPolicy": "Foreground"} or "Foreground" in str(body) + parts.query
            self.items[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            return 200, self.items[name]
        if name:
            return 200, self.items[name]
        wanted = dict(
            pair.split("=") for pair in parse_qs(parts.query).get("labelSelector", [""])[0].split(",") if pair
        )
        chosen = [item for item in self.items.values() if wanted.items() <= item["metadata"].get("labels", {}).items()]
        return 200, {"apiVersion": "ray.io/v1", "kind": "RayJobList", "metadata": {}, "items": chosen}


def failure(code: int, message: str) -> dict[str, Any]:
    """The API's own body of an error."""
    return {"apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code, "message": message}


@contextmanager
def serve(jobs: RayJobs, kubeconfig: Path) -> Iterator[None]:
    """Serve it on loopback, and write the kubeconfig that names it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, told = jobs.answer(self.command, self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "c", "namespace": "pedro"}}
    users = [{"name": "c", "user": {}}]
    config = {"apiVersion": "v1", "kind": "Config", "current-context": "c"}
    kubeconfig.write_text(yaml.safe_dump({**config, "clusters": [cluster], "contexts": [context], "users": users}))
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
