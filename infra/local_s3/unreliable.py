"""A proxy before a local S3 server that fails as networks and servers do, and counts how often.

    with local_s3() as server, UnreliableS3(server.endpoint_url, share=0.05, seed=1) as proxy:
        ...                     # ask proxy.endpoint_url
        proxy.go_away()         # nothing listens any more
        proxy.come_back()

Knows nothing of kdsr.
"""

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("500", "reset", "stall", "half")
"""An error answer, a reset connection, no answer at all, half of the body of a request or an answer."""
ERROR = b"<Error><Code>InternalError</Code><Message>made up by a proxy</Message></Error>"


class UnreliableS3:
    """Passes requests on, but for a `share` of them that fails in one of the ways of `faults`.

    A request that fails may have reached the server before: half of them do.
    """

    def __init__(
        self,
        upstream: str,
        *,
        share: float,
        seed: int,
        faults: Sequence[str] = FAULTS,
        stall_seconds: float = 5.0,
    ) -> None:
        self.stall_seconds = stall_seconds
        self.upstream = urlsplit(upstream)
        self.is_away = False
        self.damaged: str | None = None
        """Requests for what has this text in its key always fail with error 500."""
        self.requests = 0
        self.counts: Counter[str] = Counter()
        self._share, self._faults = share, faults
        self._random, self._lock = random.Random(seed), threading.Lock()  # noqa: S311 - no secret
        self._server = self._listen(0)
        self._port = self._server.server_address[1]

    @property
    def endpoint_url(self) -> str:
        """Where clients find the proxy, the same for all its life."""
        return f"http://127.0.0.1:{self._port}"

    def go_away(self) -> None:
        """Refuse new connections and cut those that there are at their next request."""
        self.is_away = True
        self._close()

    def come_back(self) -> None:
        """Listen again."""
        self.is_away = False
        self._server = self._listen(self._port)

    def draw(self, path: str) -> tuple[str, bool]:
        """The fault of the next request, "" for none, and whether the server sees the request at all."""
        with self._lock:
            self.requests += 1
            if self.is_away:
                self.counts["away"] += 1
                return "reset", False
            if self.damaged and self.damaged in path:
                self.counts["500"] += 1
                return "500", False
            if self._random.random() >= self._share:
                return "", True
            fault = self._random.choice(self._faults)
            self.counts[fault] += 1
            return fault, self._random.random() < 0.5

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"proxy": self}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "UnreliableS3":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_away:
            self.go_away()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64
    block_on_close = False

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, with one to the server behind it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: UnreliableS3
    _behind: http.client.HTTPConnection | None = None

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, is_passed_on = self.proxy.draw(self.path)
        if fault == "half" and body:
            self._send_half(body)
            self._hang_up()
            return
        if not fault or fault == "half" or is_passed_on:
            answer = self._ask(body)
        if fault == "500":
            self._answer(500, [("Content-Type", "application/xml")], ERROR)
        elif fault == "reset":
            self._hang_up()
        elif fault == "stall":
            threading.Event().wait(self.proxy.stall_seconds)
            self._hang_up()
        elif fault == "half":
            self._answer(*answer, share=0.5)
            self._hang_up()
        else:
            self._answer(*answer)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._behind is None:
            upstream = self.proxy.upstream
            self._behind = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        self._put_request(self._behind, body)
        self._behind.send(body)
        response = self._behind.getresponse()
        return response.status, response.getheaders(), response.read()

    def _send_half(self, body: bytes) -> None:
        """The beginning of the request, as from a client that dies; the server sees the connection end."""
        upstream = self.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        self._put_request(connection, body)
        connection.send(body[: len(body) // 2])
        connection.close()

    def _put_request(self, connection: http.client.HTTPConnection, body: bytes) -> None:
        # The client has signed the name of the host that it asked, so that name goes on unchanged.
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection", "content-length"}:
                connection.putheader(name, value)
        if body or "Content-Length" in self.headers:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, share: float = 1.0
    ) -> None:
        """Say what the server said; of the body perhaps a part only."""
        is_head = self.command == "HEAD"
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in {"connection", "transfer-encoding"} and (
                is_head or name.lower() != "content-length"
            ):
                self.send_header(name, value)
        if not is_head and status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not is_head:
            self.wfile.write(body[: int(share * len(body))])

    def _hang_up(self) -> None:
        """End the connection so that the client sees a reset."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self._behind is not None:
            self._behind.close()
