"""Animated PNG, chunk by chunk: each frame becomes a PNG of its own, so its depth and colours are kept.

PNG third edition, W3C 2025, section 11.3.6.
"""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from PIL.PngImagePlugin import PngImageFile

from kdsr.codecs import metadata, png, raster
from kdsr.codecs.canvas import Canvas, changed_box, cropped, planes_of
from kdsr.codecs.png import SIGNATURE
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt, ImageUnsupported
from kdsr.image import Frame, Image
from kdsr.tiles import Box

_CONTROL = struct.Struct(">IIIIIHHBB")
_CLEAR, _RESTORE = 1, 2
_OVER = 1

# What a frame needs to have the colours of the file. EXIF and XMP would turn it and stay outside.
_SHARED = {b"PLTE", b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"sBIT"}


@dataclass(frozen=True)
class Chunk:
    """A chunk as it lies in the file."""

    name: bytes
    content: slice
    """Of the file."""
    is_whole: bool
    """Whether its checksum is right; looked at only when asked for."""


@dataclass(frozen=True)
class ApngFrame:
    """One frame as it lies in the file."""

    box: Box
    seconds: float
    disposal: int
    blend: int
    codes: list[slice]
    """Of the file: its compressed pixels."""


def scan_chunks(data: bytes, *, check: bool) -> Iterator[Chunk]:
    """The chunks up to IEND, and this one too. Raises ImageCorrupt when the end is missing."""
    at = len(SIGNATURE)
    while True:
        head = data[at : at + 8]
        if len(head) < 8:
            raise ImageCorrupt(f"cut off: there is no IEND chunk at byte {at}")
        length, name = struct.unpack(">I4s", head)
        end = at + 8 + length
        if end + 4 > len(data):
            raise ImageCorrupt(f"cut off: chunk {name!r} at byte {at} announces {length} bytes")
        stored = data[end : end + 4]
        is_whole = not check or zlib.crc32(memoryview(data)[at + 4 : end]) == int.from_bytes(stored, "big")
        yield Chunk(name, slice(at + 8, end), is_whole)
        if name == b"IEND":
            return
        at = end + 4


def announced_frames(data: bytes) -> tuple[int, int]:
    """(frames, plays) as the file announces them, 0 plays for ever; (1, 0) without animation.

    Raises ImageCorrupt for a file that ends before its pixels begin.
    """
    for chunk in scan_chunks(data, check=False):
        if chunk.name == b"acTL" and chunk.content.stop - chunk.content.start == 8:
            frames, plays = struct.unpack(">II", data[chunk.content])
            return (frames, plays) if frames > 1 else (1, 0)
        if chunk.name == b"IDAT":
            break
    return 1, 0


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Apng:
    """The structure of a whole file."""

    height: int
    width: int
    kind: bytes
    """The end of IHDR: depth, colour type and methods."""
    shared: list[Chunk]
    frames: list[ApngFrame]


def scan(data: bytes) -> Apng:
    """All of the structure, checksums and numbers of the sequence included. Raises ImageCorrupt."""
    chunks = list(scan_chunks(data, check=True))
    for chunk in chunks:
        if not chunk.is_whole:
            raise ImageCorrupt(f"chunk {chunk.name!r} at byte {chunk.content.start - 8} has a wrong checksum")
    if chunks[0].name != b"IHDR" or chunks[0].content.stop - chunks[0].content.start != 13:
        raise ImageCorrupt(f"expected IHDR of 13 bytes first, found {chunks[0].name!r}")
    header = data[chunks[0].content]
    width, height = struct.unpack(">II", header[:8])
    first_pixels = next((n for n, chunk in enumerate(chunks) if chunk.name == b"IDAT"), len(chunks))
    shared = [chunk for chunk in chunks[:first_pixels] if chunk.name in _SHARED]
    frames = _frames(data, chunks)
    announced = next(data[chunk.content][:4] for chunk in chunks if chunk.name == b"acTL")
    if int.from_bytes(announced, "big") != len(frames):
        raise ImageCorrupt(
            f"{int.from_bytes(announced, 'big')} frames are announced and {len(frames)} are there"
        )
    for frame in frames:
        if frame.box.clipped(height, width) != frame.box or not frame.box.height or not frame.box.width:
            raise ImageCorrupt(f"a frame covers {frame.box} of a canvas of {width} x {height}")
    return Apng(height, width, header[8:], shared, frames)


def _frames(data: bytes, chunks: list[Chunk]) -> list[ApngFrame]:
    frames: list[ApngFrame] = []
    expected = 0
    for chunk in chunks:
        if chunk.name in (b"fcTL", b"fdAT"):
            number = int.from_bytes(data[chunk.content][:4], "big")
            if number != expected:
                raise ImageCorrupt(f"expected chunk {expected} of the animation, found {number}")
            expected += 1
        if chunk.name == b"fcTL":
            frames.append(_frame(data[chunk.content]))
        elif chunk.name == b"fdAT" and frames:
            frames[-1].codes.append(slice(chunk.content.start + 4, chunk.content.stop))
        elif chunk.name == b"IDAT" and len(frames) == 1:
            frames[0].codes.append(chunk.content)
    return frames


def _frame(control: bytes) -> ApngFrame:
    if len(control) != _CONTROL.size:
        raise ImageCorrupt(f"expected fcTL of {_CONTROL.size} bytes, found {len(control)}")
    _, width, height, left, top, part, parts, disposal, blend = _CONTROL.unpack(control)
    box = Box(top, left, top + height, left + width)
    return ApngFrame(box, part / (parts or 100), disposal, blend, [])


def decode_apng(data: bytes, apng: Apng) -> Iterator[Frame]:
    """Each frame as it is seen, 8 or 16 bits as in the file."""
    canvas: Canvas | None = None
    picture = PngImageFile(io.BytesIO(png.with_metadata_first(data)))
    turn, described = metadata.orientation(picture), metadata.described(picture)
    for number, frame in enumerate(apng.frames):
        image = raster.decode(_alone(data, apng, frame), "png")
        if canvas is None:
            with_alpha = image.alpha is not None or _may_show_nothing(apng)
            canvas = Canvas(apng.height, apng.width, channels=image.pixels.shape[2], dtype=image.pixels.dtype)
        below = canvas.cut(frame.box) if frame.disposal == _RESTORE and number else None
        lay = canvas.lay_over if frame.blend == _OVER else canvas.replace
        lay(frame.box, planes_of(image))
        shown = canvas.picture(with_alpha=with_alpha)
        shown = replace(shown, icc_profile=image.icc_profile, **described)
        yield Frame(shown.turned(turn), frame.seconds)
        if below is not None:
            canvas.replace(frame.box, below)
        elif frame.disposal in (_CLEAR, _RESTORE):
            canvas.clear(frame.box)


def _may_show_nothing(apng: Apng) -> bool:
    covers = apng.frames[0].box == Box(0, 0, apng.height, apng.width)
    clears = any(frame.disposal == _CLEAR for frame in apng.frames)
    return not covers or clears or apng.frames[0].disposal == _RESTORE


def _alone(data: bytes, apng: Apng, frame: ApngFrame) -> bytes:
    """The frame as a PNG of its own."""
    if not frame.codes:
        raise ImageCorrupt("a frame of the animation has no pixels")
    file = io.BytesIO()
    file.write(SIGNATURE)
    file.write(png.chunk(b"IHDR", struct.pack(">II", frame.box.width, frame.box.height) + apng.kind))
    for chunk in apng.shared:
        file.write(png.chunk(chunk.name, data[chunk.content]))
    for codes in frame.codes:
        file.write(png.chunk(b"IDAT", data[codes]))
    file.write(png.chunk(b"IEND", b""))
    return file.getvalue()


# ---------------------------------------------------------------- writing


@dataclass
class _Part:
    """A frame that is written already."""

    png: bytes
    box: Box
    seconds: float


def encode_apng(frames: Iterable[Frame], *, plays: int, options: EncodeConfig) -> bytes:
    """Lossless, 8 or 16 bits; only the box that changes is stored. One frame is held, and the file.

    Raises ImageUnsupported when frames have different kinds of pixels.
    """
    parts: list[_Part] = []
    before: Image | None = None
    for frame in frames:
        image = frame.image
        box = Box(0, 0, image.height, image.width) if before is None else changed_box(before, image)
        part = image if before is None else cropped(image, box)
        parts.append(_Part(raster.encode(part, format="png", options=options), box, frame.seconds))
        before = image
    return _joined(parts, plays)


def _joined(parts: list[_Part], plays: int) -> bytes:
    first = parts[0].png
    file = io.BytesIO()
    file.write(SIGNATURE)
    number = 0
    for chunk in scan_chunks(first, check=False):
        if chunk.name == b"IDAT" and not number:
            file.write(png.chunk(b"acTL", struct.pack(">II", len(parts), plays)))
            file.write(png.chunk(b"fcTL", _control(0, parts[0])))
            number = 1
        if chunk.name != b"IEND":
            file.write(png.chunk(chunk.name, first[chunk.content]))
    for part in parts[1:]:
        number = _append(file, number, part, kind=first[24:29])
    file.write(png.chunk(b"IEND", b""))
    return file.getvalue()


def _append(file: io.BytesIO, number: int, part: _Part, *, kind: bytes) -> int:
    """Write a later frame from chunk `number` of the animation on; the number that follows."""
    if part.png[24:29] != kind:
        raise ImageUnsupported(
            "frames with different depths or channels cannot be one animated PNG; choose tiff"
        )
    file.write(png.chunk(b"fcTL", _control(number, part)))
    number += 1
    for chunk in scan_chunks(part.png, check=False):
        if chunk.name == b"IDAT":
            file.write(png.chunk(b"fdAT", struct.pack(">I", number) + part.png[chunk.content]))
            number += 1
    return number


def _control(number: int, part: _Part) -> bytes:
    box, time = part.box, time_of(part.seconds)
    return _CONTROL.pack(
        number, box.width, box.height, box.left, box.top, time.numerator, time.denominator, 0, 0
    )


def time_of(seconds: float) -> Fraction:
    """The fraction of 16-bit numbers that is nearest to it; the longest one above 65,535 seconds."""
    if seconds >= 65535:
        return Fraction(65535)
    for largest in (65535, 1001, 1000, 100, 10):
        time = Fraction(seconds).limit_denominator(largest)
        if time.numerator <= 65535:
            return time
    return Fraction(round(seconds))
