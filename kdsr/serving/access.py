"""Around every request: its id, what the log says of it, headers for safety, always an answer."""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdsr.serving.problems import MEDIA_TYPE, Problem
from kdsr.serving.telemetry import Telemetry

access_log = logging.getLogger("kdsr.access")
logger = logging.getLogger("kdsr.serving")

SAFETY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' "
    "'unsafe-inline'; script-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}
"""On every answer; nothing of another host is ever loaded."""


def request_id_of(request: Request) -> str:
    """The id under which the log knows the request."""
    return str(request.state.request_id)


class Access:
    """ASGI middleware: outermost, so that nothing leaves without it."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, *, tells_id: bool) -> None:
        """`tells_id` unless whatever is around this application puts the id on answers itself."""
        self._app, self._telemetry, self._tells_id = app, telemetry, tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note what became of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Passage(scope, send, self._telemetry, self._tells_id).run(self._app, receive)


class _Passage:
    """One request on its way through."""

    def __init__(self, scope: Scope, send: Send, telemetry: Telemetry, tells_id: bool) -> None:
        self._scope, self._send, self._telemetry, self._tells_id = scope, send, telemetry, tells_id
        self._began, self._status, self._num_bytes = time.perf_counter(), 0, 0
        self._id, self._method = id_of(scope), scope["method"]
        scope.setdefault("state", {})["request_id"] = self._id
        if self._method == "HEAD":
            # Whatever answers GET answers HEAD, which has the same headers and no body (RFC 9110, 9.3.2).
            self._scope = {**scope, "method": "GET"}  # a copy: the server goes by its own

    async def run(self, app: ASGIApp, receive: Receive) -> None:
        try:
            await app(self._scope, receive, self._sent)
        except Exception:
            logger.exception("request %s failed", self._id)
            if self._status:
                raise  # Half an answer is out: only breaking off tells the caller.
            await self._fail()
        finally:
            self._note()

    async def _sent(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            if self._tells_id:
                headers["X-Request-Id"] = self._id
            for name, value in SAFETY.items():
                headers.setdefault(name, value)
            await self._send(message)
            if self._method == "HEAD":
                await self._send({"type": "http.response.body", "body": b""})
        elif self._method != "HEAD":
            self._num_bytes += len(message.get("body", b""))
            await self._send(message)

    async def _fail(self) -> None:
        problem = Problem("internal", "an error on our side; it is in the log under this request's id")
        for message in problem_messages(problem, self._id):
            await self._sent(message)

    def _note(self) -> None:
        seconds = time.perf_counter() - self._began
        route = getattr(self._scope.get("route"), "path", "none")
        # 499 is the usual word for a caller that left.
        status = str(self._status or 499)
        self._telemetry.count("kdsr_requests_total", route=route, status=status)
        self._telemetry.observe("kdsr_request_seconds", seconds, route=route)
        line = {
            "request_id": self._id,
            "caller": self._scope["state"].get("caller", "-"),
            "client": (self._scope.get("client") or ("-",))[0],
            "method": self._method,
            "path": self._scope["path"][:200],
            "status": int(status),
            "bytes": self._num_bytes,
            "seconds": round(seconds, 4),
        }
        access_log.info("%s", json.dumps(line))


def problem_messages(
    problem: Problem, request_id: str, headers: Mapping[str, str] | None = None
) -> Iterator[Message]:
    """An answer that says what is wrong, where no framework makes one."""
    body = json.dumps(problem.body(request_id=request_id)).encode()
    described = {"content-type": MEDIA_TYPE, "content-length": str(len(body))}
    raw = Headers(described | problem.all_headers() | dict(headers or {})).raw
    yield {"type": "http.response.start", "status": problem.status, "headers": raw}
    yield {"type": "http.response.body", "body": body}


def id_of(scope: Scope) -> str:
    """The caller's own id when it is harmless, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
