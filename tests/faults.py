"""A proxy in front of an S3 endpoint that misbehaves on request, for tests of what a client makes of it."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Faults:
    """What the proxy does to requests; change it while it runs."""

    def __init__(self) -> None:
        self.lose_replies_of: Callable[[str, str], bool] = lambda method, path: False  # forwarded, then answered with 500
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None  # a status, not forwarded
        self.delay: Callable[[str, str], float] = lambda method, path: 0.0
        self.drop_headers: tuple[str, ...] = ()
        self.seen: list[tuple[str, str, int]] = []
        self.lost: set[tuple[str, str]] = set()


@contextmanager
def faulty(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """A proxy of an endpoint on loopback: its address, and its faults."""
    faults, upstream = Faults(), urlsplit(endpoint)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            time.sleep(faults.delay(self.command, self.path))
            if (status := faults.refuse(self.command, self.path)) is not None:
                self._answer(status, {}, b"<Error><Code>InternalError</Code></Error>")
                return
            connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=30)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", *faults.drop_headers)}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            once = (self.command, self.path)
            if answer.status < 300 and once not in faults.lost and faults.lose_replies_of(*once):
                faults.lost.add(once)
                self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
                return
            self._answer(answer.status, dict(answer.getheaders()), data)

        def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            faults.seen.append((self.command, self.path, status))
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", headers.get("content-length")) if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        server.server_close()
