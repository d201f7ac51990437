"""POST, GET and DELETE under /v1/jobs: what is too big or too many for one request."""

import asyncio
import hashlib
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kdsr import codecs
from kdsr.codecs.sequences import MOST_FRAMES
from kdsr.config import ServedJobsConfig
from kdsr.errors import DataError, RequestError, StoreError
from kdsr.serving import contract
from kdsr.serving.bodies import RAW_TYPES, check_length, header_of, read_bytes, timely, too_long
from kdsr.serving.contract import MEDIA_TYPES, Description
from kdsr.serving.entrance import Entrance, idempotency_key, query_of
from kdsr.serving.jobs import (
    FINISHED,
    Job,
    JobRecords,
    JobRequest,
    allowed_place,
    job_id,
    open_records,
    request_of,
)
from kdsr.serving.keys import Caller
from kdsr.serving.pools import Answer, Arguments, Pool
from kdsr.serving.problems import Problem, problem_of
from kdsr.store import ObjectInfo

MAX_UPLOADS = 4
"""Uploads that are on their way to this entrance's disk at once."""
MAX_REQUEST_BYTES = 64 * 2**10
CHUNK_BYTES = 2**20
HINT = 'send {"input": URI, "output": URI} as application/json, or one image with Content-Type: image/...'


class JobRoutes:
    """What the paths do. Each answer is for the caller whose key came with the request."""

    def __init__(self, entrance: Entrance, jobs: ServedJobsConfig) -> None:
        self._entrance, self._jobs = entrance, jobs
        self._records: JobRecords = open_records(jobs, entrance.config.store)
        # One at a time: the whole file is in memory meanwhile.
        self._headers = Pool("headers of uploads", threads=1, most=MAX_UPLOADS)
        self._uploads = 0

    async def create(self, request: Request, caller: Caller) -> Response:
        """202 and where to ask."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        description = await self._entrance.backend.describe()
        given = idempotency_key(request)
        id_ = job_id(caller.name, given)
        # What was made already needs no room.
        if given is None or not await self._stored(self._records.is_there, id_):
            await self._require_room(caller)
        if kind == "application/json":
            job = await self._from_places(request, caller, description, id_)
        elif kind.startswith("image/") or kind in RAW_TYPES:
            job = await self._from_upload(request, caller, description, id_)
        else:
            raise Problem("unsupported-media-type", f"Content-Type {kind[:60] or 'is missing'!r}: {HINT}")
        return _shown(job, 202, {"Location": f"/v1/jobs/{job.id}"})

    async def _require_room(self, caller: Caller) -> None:
        """Raise Problem 429 when the caller has too many unfinished jobs."""
        if await self._stored(self._records.num_open, caller.name) >= self._jobs.max_waiting:
            raise Problem("busy", f"{self._jobs.max_waiting} jobs of this key are not finished", 60)

    async def show(self, request: Request, caller: Caller) -> Response:
        """How far it is."""
        return _shown(await self._get(request, caller), 200)

    async def cancel(self, request: Request, caller: Caller) -> Response:
        """No further image is begun; what is done stays."""
        job = await self._get(request, caller)
        if job.state in ("done", "failed"):
            raise Problem("conflict", f"the job is {job.state} already")
        await self._stored(self._records.cancel, job.id)
        return _shown(await self._get(request, caller), 200)

    async def result(self, request: Request, caller: Caller) -> Response:
        """The file that an uploaded image became."""
        job = await self._get(request, caller)
        if not job.request.is_upload:
            raise Problem("not-found", "the results of this job are at its output")
        if job.state not in FINISHED:
            raise Problem("conflict", f"the job is {job.state}; ask again later", retry_after=2)
        info = await self._stored(self._records.result, job.id)
        if info is None:
            raise Problem("not-found", "the job left no result; its message says why")
        # For whoever may have it, and for nobody else's cache.
        headers = {"ETag": f'"{info.etag}"', "Cache-Control": "private, no-cache"}
        if contract.matches(request.headers.get("if-none-match", ""), headers["ETag"]):
            return Response(status_code=304, headers=headers)
        head = await self._stored(self._records.store.get, info.key, start=0, length=codecs.HEAD_BYTES)
        return StreamingResponse(
            self._parts(info),
            media_type=MEDIA_TYPES[codecs.identify(head)],
            headers=headers | {"Content-Length": str(info.size)},
        )

    async def _stored(
        self, work: Callable[Arguments, Answer], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Answer:
        """`work` with the store in a thread, with its errors as problems."""
        try:
            return await self._entrance.store_calls.run(work, *arguments, **named)
        except (StoreError, RequestError) as error:
            raise problem_of(error) from error

    async def _parts(self, info: ObjectInfo) -> AsyncIterator[bytes]:
        for start in range(0, info.size, CHUNK_BYTES):
            yield await self._stored(self._records.store.get, info.key, start=start, length=CHUNK_BYTES)

    async def _get(self, request: Request, caller: Caller) -> Job:
        return await self._stored(self._records.get, request.path_params["id"], owner=caller.name)

    async def _from_places(self, request: Request, caller: Caller, description: Description, id_: str) -> Job:
        content = _json(await read_bytes(request, MAX_REQUEST_BYTES, self._entrance.limits))
        include = content.pop("include", [])
        if not isinstance(include, list) or not all(map(_is_text, include)):
            raise Problem("invalid-option", "include: expected a list of patterns")
        places = (
            await self._place(_text(content, "input"), self._jobs.inputs, what="input"),
            await self._place(_text(content, "output"), self._jobs.outputs, what="output"),
        )
        options = contract.read_options(query_of(request), content)
        wanted = request_of(
            options,
            description,
            owner=caller.name,
            places=places,
            include=tuple(include),
            tile_size=self._entrance.config.tile_size,
        )
        return await self._stored(self._records.create, id_, wanted)

    async def _place(self, uri: str, allowed: tuple[str, ...], *, what: str) -> str:
        """See `allowed_place`, which looks at the disk."""
        return await self._stored(allowed_place, uri, allowed, what=what)

    async def _from_upload(self, request: Request, caller: Caller, description: Description, id_: str) -> Job:
        options = contract.read_options(query_of(request))
        description.model(options.model)  # A wrong name costs nobody an upload.
        check_length(request.headers, self._jobs.max_upload_bytes)
        if self._uploads >= MAX_UPLOADS:
            raise Problem("busy", "too many uploads are on their way already; try again later", 5)
        self._uploads += 1
        try:
            with tempfile.NamedTemporaryFile(prefix="kdsr-") as file:
                digest, path = await self._receive(request, file), Path(file.name)
                name = digest[:32] + await asyncio.to_thread(_suffix, path)
                wanted = request_of(
                    options,
                    description,
                    owner=caller.name,
                    places=self._records.upload_places(id_, name),
                    upload_sha256=digest,
                    tile_size=self._entrance.config.tile_size,
                )
                # What came before is not kept and counted again, and another image under its key not at all.
                if (made := await self._stored(self._records.made, id_, wanted)) is not None:
                    return made
                pixels = await self._pixels(path, options, description, caller)
                with self._entrance.quotas.spent(caller, pixels):
                    return await self._kept(id_, wanted, name, path)
        finally:
            self._uploads -= 1

    async def _kept(self, id_: str, wanted: JobRequest, name: str, path: Path) -> Job:
        """A new job, with its image in the store before anybody looks for it."""
        await self._stored(self._records.announce, id_, wanted.owner)
        await self._stored(self._records.put_upload, id_, name, path)
        return await self._stored(self._records.create, id_, wanted)

    async def _pixels(
        self, path: Path, options: contract.Options, description: Description, caller: Caller
    ) -> int:
        """Output pixels of an upload by its header; 0 where there is no quota. Raises Problem."""
        if caller.pixels_per_minute is None:
            return 0
        header = await self._headers.run(lambda: header_of(path.read_bytes(), MOST_FRAMES))
        network = description.model(options.model).network_for(options.scale)
        return contract.output_pixels(header, network, options.scale)

    async def _receive(self, request: Request, file: IO[bytes]) -> str:
        """The body into `file`; its sha256."""
        limits, digest, size = self._entrance.limits, hashlib.sha256(), 0
        seconds = self._entrance.config.longest_body_seconds
        async for chunk in timely(request.stream(), limits, seconds=seconds):
            size += len(chunk)
            if size > self._jobs.max_upload_bytes:
                raise too_long(self._jobs.max_upload_bytes)
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
        file.flush()
        if not size:
            raise Problem("bad-request", f"the body is empty; {HINT}")
        return digest.hexdigest()


def _shown(job: Job, status: int, headers: dict[str, str] | None = None) -> Response:
    waiting = {} if job.state in FINISHED else {"Retry-After": "2"}
    return JSONResponse(
        job.shown(), status, headers={**(headers or {}), **waiting, "Cache-Control": "no-store"}
    )


def _json(data: bytes) -> dict[str, Any]:
    content = contract.json_object(data)
    if not {"input", "output"} <= content.keys():
        raise Problem("bad-request", HINT)
    return content


def _is_text(value: Any) -> bool:
    """JSON can escape halves of characters, which no name of a file or object has."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _text(content: dict[str, Any], name: str) -> str:
    value = content.pop(name)
    if not isinstance(value, str):
        raise Problem("invalid-option", f"{name}: expected a text")
    return value


def _suffix(path: Path) -> str:
    """The usual ending for what is in the file. Raises Problem 415."""
    with path.open("rb") as file:
        head = file.read(codecs.HEAD_BYTES)
    try:
        kind = codecs.identify(head)
    except DataError as error:
        raise Problem("unsupported-media-type", str(error)) from None
    return ".heic" if kind == "heic" else codecs.suffix(kind)
