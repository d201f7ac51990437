"""The body of a request to the bytes of one image and its options, within limits of size and time."""

import asyncio
import base64
import binascii
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from kdsr import codecs
from kdsr.codecs import ImageHeader
from kdsr.config import LimitsConfig
from kdsr.errors import DataError, ImageTooLarge
from kdsr.serving.contract import json_object
from kdsr.serving.problems import Problem

ROOM_FOR_FIELDS = 64 * 2**10
"""Bytes of a form or a JSON object beside its image."""
MAX_DIGITS = 18
"""Of a length; no body has more."""
RAW_TYPES = ("application/octet-stream",)
HINT = (
    "send the image itself with Content-Type: image/..., a multipart/form-data field named file, or "
    'application/json {"image": BASE64}'
)


@dataclass(frozen=True)
class Body:
    """What a request brought."""

    image: bytes | None
    """None when `url` says where it is."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None


async def read_body(request: Request, limits: LimitsConfig) -> Body:
    """The one image of a request and its fields. Raises Problem."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _multipart(request, limits)
    if kind == "application/json":
        most = (limits.max_body_bytes + 2) // 3 * 4 + ROOM_FOR_FIELDS
        return await asyncio.to_thread(_json, await read_bytes(request, most, limits), limits.max_body_bytes)
    if kind.startswith("image/") or kind in RAW_TYPES:
        return Body(_not_empty(await read_bytes(request, limits.max_body_bytes, limits)))
    raise Problem("unsupported-media-type", f"Content-Type {kind[:60] or 'is missing'!r}: {HINT}")


async def read_bytes(request: Request, most: int, limits: LimitsConfig) -> bytes:
    """The body, `most` bytes at most. Raises Problem 413 as soon as it is longer, 408 when it is slow."""
    check_length(request.headers, most)
    received = bytearray()
    async for chunk in timely(request.stream(), limits, seconds=limits.body_seconds):
        received += chunk
        if len(received) > most:
            raise too_long(most)
    return bytes(received)


async def timely(
    chunks: AsyncIterator[bytes], limits: LimitsConfig, *, seconds: float
) -> AsyncIterator[bytes]:
    """The chunks of a body, which has `seconds` in all.

    Raises Problem 408 when it pauses or takes too long, 400 when it breaks off.
    """
    end = asyncio.get_running_loop().time() + seconds
    while True:
        left = end - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(left, limits.idle_seconds)):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem(
                "slow-body",
                f"the body must arrive within {seconds:g} seconds and without pauses of "
                f"more than {limits.idle_seconds:g}",
                headers={"Connection": "close"},
            ) from None
        except ClientDisconnect:
            raise Problem("bad-request", "the body broke off") from None
        yield chunk


def announced_length(headers: Mapping[str, str]) -> int | None:
    """Bytes that the body has by its header, None without one. Raises Problem 400 for what is no number."""
    text = headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise Problem("bad-request", "Content-Length: expected a whole number")
    digits = text.lstrip("0")
    # What has more digits is too much anyway, and Python refuses to read thousands of them.
    return int(digits or "0") if len(digits) <= MAX_DIGITS else 10**MAX_DIGITS


def check_length(headers: Mapping[str, str], most: int) -> None:
    """Raise Problem 413 when the header announces more than `most` bytes."""
    length = announced_length(headers)
    if length is not None and length > most:
        raise too_long(most)


def too_long(most: int) -> Problem:
    """The problem of a body that is longer."""
    return Problem(
        "body-too-large", f"more than the {most} bytes that are taken in one request; send it to /v1/jobs"
    )


def inspected(data: bytes, max_frames: int) -> tuple[ImageHeader, str]:
    """Header and sha256 of an image. Raises Problem for what is none that is read."""
    return header_of(data, max_frames), hashlib.sha256(data).hexdigest()


def header_of(data: bytes, max_frames: int) -> ImageHeader:
    """What an image says of itself. Raises Problem for what is none that is read."""
    try:
        codecs.identify(data)
    except DataError as error:
        raise Problem("unsupported-media-type", str(error)) from None
    try:
        return codecs.probe(data, max_frames=max_frames)
    except ImageTooLarge as error:
        raise Problem("image-too-large", str(error)) from None
    except DataError as error:
        raise Problem("invalid-image", str(error)) from None


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise Problem("bad-request", f"the body is empty; {HINT}")
    return data


# ---------------------------------------------------------------- JSON


def _json(data: bytes, most: int) -> Body:
    content = json_object(data)
    fields = dict(content)
    image, url = fields.pop("image", None), fields.pop("url", None)
    if (image is None) == (url is None):
        raise Problem("bad-request", 'expected either "image", in base64, or "url" in the JSON object')
    if any(isinstance(value, dict | list) for value in fields.values()):
        raise Problem("invalid-option", "options are texts and numbers")
    if url is not None:
        return Body(None, fields, url=_text(url, "url"))
    return Body(_not_empty(_decoded(_text(image, "image"), most)), fields)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Problem("bad-request", f'"{name}" must be a text')
    return value


def _decoded(text: str, most: int) -> bytes:
    """Base64, of a data: URL too."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem("bad-request", '"image" is not valid base64') from None
    if len(data) > most:
        raise too_long(most)
    return data


# ---------------------------------------------------------------- multipart


class _InMemory(MultiPartParser):
    """Nothing is written to a disk: the whole body is in memory and bounded already."""

    spool_max_size = 2**62


async def _multipart(request: Request, limits: LimitsConfig) -> Body:
    data = await read_bytes(request, limits.max_body_bytes + ROOM_FOR_FIELDS, limits)
    # In a thread, with a loop of its own: hostile bytes keep the parser busy for seconds.
    return await asyncio.to_thread(asyncio.run, _parsed(data, request.headers["content-type"], limits))


async def _parsed(data: bytes, content_type: str, limits: LimitsConfig) -> Body:
    parser = _InMemory(
        Headers({"content-type": content_type}),
        _once(data),
        max_files=1,
        max_fields=20,
        max_part_size=ROOM_FOR_FIELDS,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, LookupError, AssertionError) as error:
        detail = getattr(error, "message", "") or "it is broken or cut off"
        raise Problem("bad-request", f"the multipart body cannot be read: {detail}") from None
    files = {name: value for name, value in form.multi_items() if isinstance(value, UploadFile)}
    if set(files) != {"file"}:
        found = ", ".join(repr(name[:40]) for name in files) or "none"
        raise Problem("bad-request", f"expected one file in the field named file, found {found}")
    image = _not_empty(await files["file"].read())
    if len(image) > limits.max_body_bytes:
        raise too_long(limits.max_body_bytes)
    return Body(image, _texts(form))


def _texts(form: FormData) -> dict[str, str]:
    texts: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, str) and texts.setdefault(name, value) != value:
            raise Problem("invalid-option", f"{name[:40]!r} is given twice with different values")
    return texts


async def _once(data: bytes) -> AsyncGenerator[bytes, None]:
    yield data
