"""A client of kdsr's server, for programs that wait and for those that do not.

    from kdsr.client import Client

    with Client("http://127.0.0.1:8000", api_key=key) as client:
        client.upscale("photo.jpg", scale=4)                        # writes photo_x4.jpg, returns its path
        array = client.upscale(array)                               # RGB in, RGB out
        job = client.submit("huge.tif")
        client.wait(job.id)
        client.result(job.id, "huge_x4.tif")

`AsyncClient` is the same with `await`. Needs the extra `client`; loads neither torch nor ray. What is said
and when it is said again is in `kdsr.client.calls`; here it is only carried out.
"""

import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypedDict, TypeVar, Unpack, cast, overload

import anyio
import anyio.to_thread
import httpx2
import numpy as np
import PIL.Image

from kdsr import __version__
from kdsr.client import calls
from kdsr.client.calls import (
    Answer,
    Ask,
    Job,
    Offer,
    OfferedModel,
    Pause,
    Reply,
    Retries,
    Steps,
    Talk,
    Unanswered,
    Upscaled,
    Wanted,
    Work,
)
from kdsr.errors import RequestError

__all__ = [
    "AsyncClient",
    "Client",
    "Job",
    "Offer",
    "OfferedModel",
    "Retries",
    "Settings",
    "Upscaled",
    "Wanted",
]

Picture = TypeVar("Picture", bytes, PIL.Image.Image, np.ndarray)
CHUNK_BYTES = 2**18
CONNECT_SECONDS = 10.0

_NOT_SENT = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)
"""Our own fault, which no other try repairs."""


class Settings(TypedDict, total=False):
    """How a client reaches its server."""

    api_key: str | None
    timeout_seconds: float
    """Longest silence while an answer is awaited, 120 when not set; longer than the server's own limit."""
    retries: Retries
    verify: ssl.SSLContext | bool
    """For authorities of one's own, or client certificates."""
    transport: Any
    """One of httpx2's, to go another way than over the network."""


class _Settings:
    """What both clients are made of."""

    def __init__(self, url: str, **settings: Unpack[Settings]) -> None:
        """`url` is where the server's page is; a path in it is kept.

        Raises RequestError for no such url, and for a key that no header can hold.
        """
        self._retries = settings.get("retries", Retries())
        seconds, api_key = settings.get("timeout_seconds", 120.0), settings.get("api_key")
        # Redirects are not followed: a key must not travel to where it was not sent.
        self._options: dict[str, Any] = {
            "base_url": _address(url),
            "headers": {"User-Agent": f"kdsr/{__version__}"}
            | ({} if api_key is None else {"Authorization": f"Bearer {_checked_key(api_key)}"}),
            "timeout": httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            "verify": settings.get("verify", True),
            "transport": settings.get("transport"),
        }


def _checked_key(api_key: str) -> str:
    # Otherwise the error would come with the first request, and show the key.
    if not re.fullmatch(r"[\x21-\x7e]+", api_key):
        raise RequestError(
            "api_key: expected visible ASCII characters and nothing around them; a key that is read from a "
            "file often ends with a line break: strip it"
        )
    return api_key


def _address(url: str) -> httpx2.URL:
    try:
        address = httpx2.URL(url if url.endswith("/") else f"{url}/")
    except httpx2.InvalidURL:
        address = httpx2.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise RequestError(f"expected the url of a server, like http://127.0.0.1:8000, found {url[:80]!r}")
    return address


P = ParamSpec("P")


def _waiting(
    call: Callable[Concatenate[Retries, P], Steps[Answer]],
) -> Callable[Concatenate["Client", P], Answer]:
    """`call` as a method that returns when it is done."""

    @wraps(call)
    def method(self: "Client", *args: P.args, **kwargs: P.kwargs) -> Answer:
        return self._run(call(self._retries, *args, **kwargs))

    return cast(Any, method)


def _awaited(
    call: Callable[Concatenate[Retries, P], Steps[Answer]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, Answer]]:
    """`call` as a method that is awaited."""

    @wraps(call)
    async def method(self: "AsyncClient", *args: P.args, **kwargs: P.kwargs) -> Answer:
        return await self._run(call(self._retries, *args, **kwargs))

    return cast(Any, method)


class Client(_Settings):
    """Waits for each answer. Safe to share between threads; close it, or use it in a `with` statement."""

    def __init__(self, url: str, **settings: Unpack[Settings]) -> None:
        super().__init__(url, **settings)
        self._http = httpx2.Client(**self._options)

    @overload
    def upscale(self, picture: Picture, **wanted: Unpack[Wanted]) -> Picture: ...

    @overload
    def upscale(
        self, picture: str | Path, *, output: str | Path | None = None, **wanted: Unpack[Wanted]
    ) -> Path: ...

    def upscale(self, picture: Any, *, output: Any = None, **wanted: Unpack[Wanted]) -> Any:
        """The upscaled picture, of the kind that was given: a path, bytes, a PIL picture or an array.

        A path's result is a file, whole or not there, and its path is returned: `output`, or in the folder
        `output`, or beside the source as NAME_x4.jpg. What was there is replaced. Arrays are RGB, not BGR:
        see `kdsr.client.pictures.outgoing`. Raises ServerError, RequestError.
        """
        return self.upscale_told(picture, output=output, **wanted).image

    upscale_told = _waiting(calls.upscale_told)
    models = _waiting(calls.models)
    submit = _waiting(calls.submit)
    submit_places = _waiting(calls.submit_places)
    job = _waiting(calls.job)
    cancel = _waiting(calls.cancel)
    wait = _waiting(calls.wait)
    result = _waiting(calls.result)

    def close(self) -> None:
        """End all connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, steps: Steps[Answer]) -> Answer:
        with Talk(steps) as talk:
            while talk.step is not None:
                with talk.turn():
                    talk.outcome = self._outcome(talk.step)
            return talk.answer

    def _outcome(self, step: Ask | Pause | Work[Any]) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        return step.do() if isinstance(step, Work) else self._reply(step)

    def _reply(self, ask: Ask) -> Reply:
        content = _chunks(ask.body) if isinstance(ask.body, Path) else ask.body
        with _unanswered(), self._http.stream(**_request(ask), content=content) as response:
            if ask.into is None or not response.is_success:
                return _reply(response, response.read())
            with ask.into.open("wb") as file:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)
            return _reply(response)


class AsyncClient(_Settings):
    """The same with `await`, under asyncio or trio. Files are read and written away from the event loop."""

    def __init__(self, url: str, **settings: Unpack[Settings]) -> None:
        super().__init__(url, **settings)
        self._http = httpx2.AsyncClient(**self._options)

    @overload
    async def upscale(self, picture: Picture, **wanted: Unpack[Wanted]) -> Picture: ...

    @overload
    async def upscale(
        self, picture: str | Path, *, output: str | Path | None = None, **wanted: Unpack[Wanted]
    ) -> Path: ...

    async def upscale(self, picture: Any, *, output: Any = None, **wanted: Unpack[Wanted]) -> Any:
        """See `Client.upscale`."""
        return (await self.upscale_told(picture, output=output, **wanted)).image

    upscale_told = _awaited(calls.upscale_told)
    models = _awaited(calls.models)
    submit = _awaited(calls.submit)
    submit_places = _awaited(calls.submit_places)
    job = _awaited(calls.job)
    cancel = _awaited(calls.cancel)
    wait = _awaited(calls.wait)
    result = _awaited(calls.result)

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[Answer]) -> Answer:
        with Talk(steps) as talk:
            while talk.step is not None:
                with talk.turn():
                    talk.outcome = await self._outcome(talk.step)
            return talk.answer

    async def _outcome(self, step: Ask | Pause | Work[Any]) -> Any:
        if isinstance(step, Pause):
            return await anyio.sleep(step.seconds)
        if isinstance(step, Work):
            return await anyio.to_thread.run_sync(step.do)
        return await self._reply(step)

    async def _reply(self, ask: Ask) -> Reply:
        content = _chunks_apart(ask.body) if isinstance(ask.body, Path) else ask.body
        with _unanswered():
            async with self._http.stream(**_request(ask), content=content) as response:
                if ask.into is None or not response.is_success:
                    return _reply(response, await response.aread())
                async with await anyio.open_file(ask.into, "wb") as file:
                    async for chunk in response.aiter_bytes(CHUNK_BYTES):
                        await file.write(chunk)
                return _reply(response)


def _request(ask: Ask) -> dict[str, Any]:
    # A length instead of chunks: the server can refuse what is too long before it is sent.
    length = {"Content-Length": str(ask.body.stat().st_size)} if isinstance(ask.body, Path) else {}
    return {"method": ask.method, "url": ask.path, "params": ask.query, "headers": {**ask.headers, **length}}


def _reply(response: httpx2.Response, body: bytes = b"") -> Reply:
    return Reply(response.status_code, dict(response.headers), body)


@contextmanager
def _unanswered() -> Iterator[None]:
    """What goes wrong on the way, as one kind of error."""
    try:
        yield
    except _NOT_SENT as error:
        raise RequestError(f"the request cannot be sent: {error}; did the file change meanwhile?") from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        raise Unanswered(f"{type(error).__name__} {error}".strip()) from error


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def _chunks_apart(path: Path) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        while chunk := await file.read(CHUNK_BYTES):
            yield chunk
