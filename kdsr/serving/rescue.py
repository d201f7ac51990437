"""Around Serve's proxies: what they leave unanswered, or answer in their own words, is a problem too."""

import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdsr.serving.access import SAFETY, id_of, problem_messages
from kdsr.serving.problems import Problem

logger = logging.getLogger("kdsr.serving")

LOST = Problem("worker-lost", "the worker that had this request is gone; send it again", retry_after=1)
LOADING = Problem("loading", "no worker can take this request yet; try again soon", retry_after=2)
OF_STATUS = {
    404: LOADING,  # There is no application yet, or no more.
    408: Problem("deadline", "it took longer than any request may", retry_after=5),
    500: LOST,
    503: LOADING,
}
"""What a proxy's own status says of a request for a path of ours."""
ITS_OWN_PATHS = "/-/"
"""Below it lies what a proxy says of itself."""


def middlewares() -> list[Middleware]:
    """What Serve is to put around each proxy."""
    return [Middleware(Rescue)]


class Rescue:
    """ASGI middleware: a request whose worker died gets 503 and Retry-After, and is worth sending again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and answer it where nobody did."""
        if scope["type"] != "http" or scope["path"].startswith(ITS_OWN_PATHS):
            await self._app(scope, receive, send)
            return
        request_id = id_of(scope)
        started, rescued = False, False

        async def answer(problem: Problem) -> None:
            for message in problem_messages(problem, request_id, {"X-Request-Id": request_id, **SAFETY}):
                await send(message)

        async def sent(message: Message) -> None:
            nonlocal started, rescued
            if message["type"] == "http.response.start":
                started = True
                problem = None if _is_ours(message) else OF_STATUS.get(message["status"])
                if problem is not None:
                    rescued = True
                    await answer(problem)
            if not rescued:
                await send(message)

        # The same id for whoever answers in the end.
        headers = [pair for pair in scope["headers"] if pair[0] != b"x-request-id"]
        headers.append((b"x-request-id", request_id.encode()))
        try:
            await self._app({**scope, "headers": headers}, receive, sent)
        except Exception:
            logger.exception("request %s failed in the proxy", request_id)
            if started:
                raise
        if not started:
            await answer(LOST)


def _is_ours(start: Message) -> bool:
    """Whether the application answered, all of whose answers have these headers."""
    return "X-Content-Type-Options" in Headers(raw=start["headers"])
