"""The HTTP application. Everything behind it is a `Backend`: a cluster, or a process of its own for tests."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from kdsr import __version__
from kdsr.codecs import ImageHeader
from kdsr.config import KeyConfig, LimitsConfig, ServeConfig
from kdsr.serving import contract
from kdsr.serving.access import Access, request_id_of
from kdsr.serving.bodies import Body, announced_length, inspected, read_body
from kdsr.serving.contract import (
    Call,
    Options,
    Refusal,
    Result,
    ServedModel,
    ServedNetwork,
    Wanted,
)
from kdsr.serving.docs_page import docs_page
from kdsr.serving.entrance import Backend, Entrance, idempotency_key, query_of
from kdsr.serving.fetch import Fetcher, refused
from kdsr.serving.front import add_page
from kdsr.serving.job_routes import JobRoutes
from kdsr.serving.keys import Caller, Keys, Quotas
from kdsr.serving.openapi import ANSWER_HEADERS, JOBS, UPSCALE, described, require_keys
from kdsr.serving.problems import MEDIA_TYPE, Problem
from kdsr.serving.replays import Replays

logger = logging.getLogger("kdsr.serving")


def build_app(
    config: ServeConfig, backend: Backend, keys: Mapping[str, KeyConfig], *, tells_id: bool = True
) -> FastAPI:
    """The application in front of `backend` that lets in whoever has one of `keys`; everybody with none.

    `tells_id` unless X-Request-Id is put on answers by what is around it.
    """
    limits = config.limits
    entrance = Entrance(
        config,
        backend,
        Keys(keys),
        Quotas(share=1 / max(1, config.num_entrances)),
        Replays(max_bytes=limits.replay_bytes, seconds=limits.replay_seconds),
    )
    app = FastAPI(
        title="kdsr",
        version=__version__,
        summary="Super-resolution of images.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    app.state.entrance = entrance
    app.add_exception_handler(HTTPException, _http_error)
    add_routes(app, entrance)
    add_page(app)
    if keys:
        require_keys(app.openapi())
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "X-API-Key",
                "Content-Type",
                "Accept",
                "Idempotency-Key",
                "If-None-Match",
                "X-Request-Id",
            ],
            expose_headers=[*ANSWER_HEADERS, "Location", "Retry-After"],
        )
    app.add_middleware(Access, telemetry=entrance.telemetry, tells_id=tells_id)
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: an unknown path or method."""
    assert isinstance(error, HTTPException)
    kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "bad-request")
    headers = dict(error.headers or {})
    # Not request.url: it is made of the query too, which may be no text at all.
    return problem_response(
        request, Problem(kind, f"{request.method} {request.scope['path'][:80]}", headers=headers)
    )


def problem_response(request: Request, problem: Problem) -> Response:
    """`problem` as JSON."""
    return JSONResponse(
        problem.body(request_id=request_id_of(request)),
        problem.status,
        headers=problem.all_headers(),
        media_type=MEDIA_TYPE,
    )


Handler = Callable[[Request], Awaitable[Response]]


def answering(handler: Handler) -> Handler:
    """`handler`, with its problems as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Problem as problem:
            return problem_response(request, problem)

    return answer


def add_routes(app: FastAPI, entrance: Entrance) -> None:
    """Paths and what they do."""

    async def upscale(request: Request) -> Response:
        caller = entrance.keys.caller(request.headers)
        request.state.caller = caller.name
        return await _upscale(request, entrance, caller)

    async def models(request: Request) -> Response:
        request.state.caller = entrance.keys.caller(request.headers).name
        description = await entrance.backend.describe()
        body = {"models": contract.cards(description.models), "failures": dict(description.failures)}
        return JSONResponse(body | {"limits": public_limits(entrance.limits)})

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        (await entrance.backend.describe()).model(None)
        return PlainTextResponse("ready\n")

    async def metrics(request: Request) -> Response:
        request.state.caller = entrance.keys.caller(request.headers).name
        return PlainTextResponse(
            entrance.telemetry.text(await _gauges(entrance)), media_type="text/plain; version=0.0.4"
        )

    async def docs(_: Request) -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    for path, methods, handler, documentation in (
        ("/v1/upscale", ["POST"], upscale, UPSCALE),
        ("/v1/models", ["GET"], models, described("models")),
        ("/healthz", ["GET"], healthz, described("healthz")),
        ("/readyz", ["GET"], readyz, described("readyz")),
        ("/metrics", ["GET"], metrics, described("metrics")),
    ):
        _add(app, path, handler, methods, **documentation)
    if entrance.config.jobs is not None:
        _add_job_routes(app, entrance, JobRoutes(entrance, entrance.config.jobs))
    app.add_api_route("/docs", answering(docs), methods=["GET"], include_in_schema=False, response_model=None)


def _add_job_routes(app: FastAPI, entrance: Entrance, routes: JobRoutes) -> None:
    def known(work: Callable[[Request, Caller], Awaitable[Response]]) -> Handler:
        async def handler(request: Request) -> Response:
            caller = entrance.keys.caller(request.headers)
            request.state.caller = caller.name
            return await work(request, caller)

        return handler

    for path, method, work, documentation in (
        ("/v1/jobs", "POST", routes.create, JOBS["create"]),
        ("/v1/jobs/{id}", "GET", routes.show, JOBS["show"]),
        ("/v1/jobs/{id}", "DELETE", routes.cancel, JOBS["cancel"]),
        ("/v1/jobs/{id}/result", "GET", routes.result, JOBS["result"]),
    ):
        _add(app, path, known(work), [method], **documentation)


def _add(app: FastAPI, path: str, handler: Handler, methods: list[str], **documentation: Any) -> None:
    # A class without a type, or the document would promise JSON beside what there is.
    app.add_api_route(
        path,
        answering(handler),
        methods=methods,
        response_model=None,
        response_class=Response,
        **documentation,
    )


def public_limits(limits: LimitsConfig) -> dict[str, int]:
    """What a client may want to know before it sends something."""
    names = ("max_body_bytes", "max_pixels", "max_output_pixels", "max_frames")
    return {name: getattr(limits, name) for name in names}


async def _gauges(entrance: Entrance) -> dict[str, float]:
    gauges = {"kdsr_entrance_waiting_bytes": float(entrance.waiting_bytes)}
    try:
        found = await entrance.backend.describe()
    except Problem:
        return gauges | {"kdsr_ready": 0.0}
    return gauges | {
        "kdsr_ready": 1.0,
        "kdsr_waiting_tiles": float(found.waiting_tiles),
        "kdsr_held_bytes": float(found.held_bytes),
        "kdsr_model_failures": float(len(found.failures)),
    }


# ---------------------------------------------------------------- upscaling


async def _upscale(request: Request, entrance: Entrance, caller: Caller) -> Response:
    began = perf_counter()
    # Before the body is read: a wrong option costs nobody an upload.
    query = contract.read_options(query_of(request))
    (await entrance.backend.describe()).model(query.model)
    with entrance.holding(_announced(request, entrance.limits)):
        body = await read_body(request, entrance.limits)
        options = contract.read_options(query_of(request), body.fields)
        (await entrance.backend.describe()).model(options.model)
        data = await _image(entrance, body)
    # From here on what there is: a body that announced no length has held as much as it might become.
    with entrance.holding(len(data)):
        order = await _order(request, entrance, options, data)
        return await _answer(request, entrance, caller, order, began)


def _announced(request: Request, limits: LimitsConfig) -> int:
    """Bytes that the body has, or may have."""
    length, most = announced_length(request.headers), limits.max_body_bytes * 4 // 3
    return most if length is None else min(length, most)


@dataclass(frozen=True)
class _Order:
    """What a request comes to."""

    data: bytes
    header: ImageHeader
    model: ServedModel
    network: ServedNetwork
    wanted: Wanted
    pixels: int
    etag: str
    fingerprint: str
    """The same for the same request, whatever network answers it by now."""


async def _order(request: Request, entrance: Entrance, options: Options, data: bytes) -> _Order:
    """Everything that can be refused without decoding a pixel is refused here."""
    # Asked again: while the image came, models may have been replaced.
    model = (await entrance.backend.describe()).model(options.model)
    network = model.network_for(options.scale)
    header, digest = await entrance.inspections.run(inspected, data, entrance.limits.max_frames)
    accept = request.headers.get("accept", "*/*")
    wanted = contract.wanted_of(options, accept=accept, header=header, limits=entrance.limits)
    pixels = contract.check_limits(header, network, wanted, entrance.limits)
    etag = contract.etag_of(digest, network, wanted, tile_size=entrance.config.tile_size)
    fingerprint = f"{digest} {options.model} {wanted}"
    return _Order(data, header, model, network, wanted, pixels, etag, fingerprint)


async def _image(entrance: Entrance, body: Body) -> bytes:
    if body.image is not None:
        return body.image
    if not entrance.config.fetch_urls:
        raise Problem("forbidden", "this server does not fetch URLs; send the image itself")
    seconds = entrance.limits.body_seconds
    fetcher = Fetcher(entrance.limits.max_body_bytes, seconds)
    try:
        # The fetcher ends by itself but for asking for a name, which nothing can break off.
        async with asyncio.timeout(seconds):
            return await entrance.fetches.run(fetcher.get, str(body.url))
    except TimeoutError:
        raise refused("it did not arrive in time") from None


async def _answer(
    request: Request, entrance: Entrance, caller: Caller, order: _Order, began: float
) -> Response:
    headers = _headers(order)
    if contract.matches(request.headers.get("if-none-match", ""), order.etag):
        raise Problem("same-result", "If-None-Match names this result; nothing was done", headers=headers)
    given = idempotency_key(request)
    key = None if given is None else (caller.name, given)
    if key is not None and (kept := entrance.replays.begin(key, order.fingerprint)) is not None:
        return _image_response(kept[0], kept[1] | {"Idempotency-Replayed": "true"})
    try:
        result = await _result(request, entrance, caller, order, began)
    except BaseException:
        if key is not None:
            entrance.replays.fail(key)
        raise
    headers |= _timing(result, order)
    if key is not None:
        entrance.replays.finish(key, (result, headers), len(result.data))
    return _image_response(result, headers)


async def _result(
    request: Request, entrance: Entrance, caller: Caller, order: _Order, began: float
) -> Result:
    left = entrance.limits.timeout_seconds - (perf_counter() - began)
    entrance.quotas.spend(caller, order.pixels)
    call = Call(
        order.data,
        order.header,
        order.model.name,
        order.network.card.sha256,
        order.wanted,
        max(left, 0.0),
        request_id_of(request),
    )
    answer: Result | Refusal | None = None
    try:
        async with asyncio.timeout(max(left, 0.0)):
            answer = await entrance.backend.upscale(call)
    except TimeoutError:
        answer = Refusal("deadline", f"it took more than {entrance.limits.timeout_seconds:g} seconds", 5)
    finally:
        if not isinstance(answer, Result):
            entrance.quotas.give_back(caller, order.pixels)
    if isinstance(answer, Refusal):
        raise answer.problem()
    _count(entrance, order, answer)
    return answer


def _headers(order: _Order) -> dict[str, str]:
    return {
        "ETag": order.etag,
        "Vary": "Accept, Authorization, X-API-Key",
        "Cache-Control": "no-store",
        "Kdsr-Model": order.model.name,
        "Kdsr-Network": re.sub(r"[^\x21-\x7e]", "_", order.network.card.name)[:100],
        "Kdsr-Input-Size": f"{order.header.width}x{order.header.height}",
    }


def _timing(result: Result, order: _Order) -> dict[str, str]:
    milliseconds = {
        "queue": result.queue_seconds * 1e3,
        "decode": result.decode_seconds * 1e3,
        "compute": result.compute_seconds * 1e3,
        "encode": result.encode_seconds * 1e3,
    }
    return {
        "Kdsr-Scale": f"{order.wanted.scale or order.network.scale:g}",
        "Kdsr-Output-Size": f"{result.width}x{result.height}",
        "Kdsr-Queue-Ms": f"{milliseconds['queue']:.1f}",
        "Kdsr-Compute-Ms": f"{milliseconds['compute']:.1f}",
        "Kdsr-Batch-Size": str(result.batch_size),
        "Server-Timing": ", ".join(f"{name};dur={spent:.1f}" for name, spent in milliseconds.items()),
    }


def _image_response(result: Result, headers: Mapping[str, str]) -> Response:
    return Response(result.data, media_type=contract.MEDIA_TYPES[result.format], headers=dict(headers))


def _count(entrance: Entrance, order: _Order, result: Result) -> None:
    telemetry, model = entrance.telemetry, order.model.name
    telemetry.count("kdsr_output_pixels_total", result.height * result.width, model=model)
    telemetry.count("kdsr_compute_seconds_total", result.compute_seconds, model=model)
    telemetry.observe("kdsr_queue_seconds", result.queue_seconds, model=model)
