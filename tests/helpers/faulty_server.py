"""Serve a folder, or proxy another server, over HTTP; fail by a plan, and count requests."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Fault = Literal["stall", "silence", "reset", "500", "503", "403", "404", "cut", "short", "flip"]
"""stall: half of the bytes, then none; silence: not even a header; reset: by TCP after half;
cut: closed before the announced length; short: half of the bytes, announced as the whole;
flip: one bit is wrong."""

FAULTS: tuple[Fault, ...] = ("stall", "silence", "reset", "500", "503", "cut", "short", "flip")
"""Faults after which a second request can succeed."""


def never(name: str, before: int) -> None:
    """Plan no fault."""


def first_time(name: str, before: int) -> Fault | None:
    """Plan a fault for the first GET of every file; the kind depends on the name."""
    kind = sum(name.encode()) % len(FAULTS)
    return FAULTS[kind] if before == 0 else None


class FaultyServer:
    """An HTTP server that fails by a plan; a context manager. `url` is its address.

    Args:
        folder: serves its files, unless `upstream` is set.
        upstream: host and port of a server to proxy.
        plan: maps a file name and the number of earlier GETs to a fault.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        upstream: tuple[str, int] | None = None,
        plan: Callable[[str, int], Fault | None] = never,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.upstream = upstream
        self.gets: Counter[str] = Counter()
        """Number of GETs by file name."""
        self.num_bytes = 0
        self.is_over = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def note(self, name: str) -> Fault | None:
        with self._lock:
            before = self.gets[name]
            self.gets[name] += 1
            return self.plan(name, before)

    def sent(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    owner: FaultyServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        owner = self.server.owner
        name = self.path.rpartition("/")[2].partition("?")[0]
        fault = owner.note(name)
        if fault == "silence":
            owner.is_over.wait(60)
            self.close_connection = True
        elif fault in {"403", "404", "500", "503"}:
            self._send(int(fault), {}, b"no")
        else:
            status, headers, content = self._content()
            self._send(status, headers, content, fault if status < 300 else None)

    def do_HEAD(self) -> None:
        status, headers, content = self._content()
        self._send(status, headers, content)

    def log_message(self, *args: object) -> None:
        """Log nothing."""

    def _content(self) -> tuple[int, dict[str, str], bytes]:
        owner = self.server.owner
        if owner.upstream is not None:
            return self._forward(*owner.upstream)
        assert owner.folder is not None
        try:
            return 200, {}, (owner.folder / self.path.lstrip("/")).read_bytes()
        except OSError:
            return 404, {}, b""

    def _forward(self, host: str, port: int) -> tuple[int, dict[str, str], bytes]:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(host, port)
        connection.request(self.command, self.path, body, dict(self.headers))
        response = connection.getresponse()
        content = response.read()
        dropped = {"content-length", "transfer-encoding", "connection", "date", "server"}
        headers = {k: v for k, v in response.getheaders() if k.lower() not in dropped}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length", "0")
        connection.close()
        return response.status, headers, content

    def _send(
        self, status: int, headers: dict[str, str], content: bytes, fault: Fault | None = None
    ) -> None:
        half = content[: len(content) // 2]
        if fault == "flip":
            middle = len(half)
            content = half + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault == "short":
            self.send_header("Connection", "close")
            self.close_connection = True
        elif "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_broken = fault in {"stall", "reset", "cut", "short"}
        self.wfile.write(half if is_broken else content)
        self.server.owner.sent(len(half if is_broken else content))
        self.wfile.flush()
        if is_broken:
            self.close_connection = True
        if fault == "stall":
            self.server.owner.is_over.wait(60)
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
