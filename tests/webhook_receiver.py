"""A receiver of webhooks on this machine: keeps what it was sent, answers as it is told to."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOOPBACK = ("127.0.0.0/8",)  # what an operator must allow for it to be reached


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes


@dataclass
class Receiver:
    port: int = 0
    statuses: list[int] = field(default_factory=list)
    """Of the next answers; 200 when they are used up."""
    location: str | None = None
    endless: bool = False
    """Whether the body of an answer never ends."""
    got: list[Received] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)
    """Requests are kept waiting while it is not set."""
    waiting: int = 0
    most_waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        """The `webhook-id` of each request, as they came."""
        return [one.headers["webhook-id"] for one in self.got]


@contextlib.contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A receiver for the time of the block."""
    receiver = Receiver()
    receiver.open.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with receiver.lock:
                receiver.got.append(Received(self.path, headers, body))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                receiver.waiting += 1
                receiver.most_waiting = max(receiver.most_waiting, receiver.waiting)
            receiver.open.wait(60)
            with receiver.lock:
                receiver.waiting -= 1
            with contextlib.suppress(OSError):
                self.answer(status)

        def answer(self, status: int) -> None:
            self.send_response(status)
            if receiver.location is not None:
                self.send_header("location", receiver.location)
            if not receiver.endless:
                self.send_header("content-length", "0")
            self.end_headers()
            while receiver.endless:
                self.wfile.write(b"x" * 65536)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.open.set()
        receiver.endless = False
        server.shutdown()
        server.server_close()
        thread.join(10)
