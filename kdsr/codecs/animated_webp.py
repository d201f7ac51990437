"""Animated WebP, chunk by chunk. libwebp decodes and composes the frames; writing puts still files together.

WebP Container Specification, RFC 9649.
"""

import io
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL.WebPImagePlugin import WebPImageFile

from kdsr.codecs import raster
from kdsr.codecs.canvas import changed_box, cropped
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt
from kdsr.image import Frame, Image
from kdsr.tiles import Box

_ANIMATION, _XMP, _EXIF, _ALPHA, _ICC = 0x02, 0x04, 0x08, 0x10, 0x20
_LONGEST = 2**24 - 1  # milliseconds in one frame
_NO_BLENDING = 0x02
_PIXELS = (b"ALPH", b"VP8 ", b"VP8L")


@dataclass(frozen=True)
class WebPStructure:
    """What the chunks tell without decoding."""

    height: int
    width: int
    plays: int
    """How often the animation is shown, 0 is for ever."""
    milliseconds: list[int]
    """Of each frame."""
    boxes: list[Box]


def _chunks(data: bytes, begin: int) -> Iterator[tuple[bytes, slice]]:
    """Name and content of each. Raises ImageCorrupt when the last one is cut off."""
    at = begin
    while at + 8 <= len(data):
        name, length = struct.unpack("<4sI", data[at : at + 8])
        if at + 8 + length > len(data):
            raise ImageCorrupt(f"cut off: chunk {name!r} at byte {at} announces {length} bytes")
        yield name, slice(at + 8, at + 8 + length)
        at += 8 + length + length % 2


def scan(data: bytes, *, at_most: int) -> WebPStructure | None:
    """None without animation. Stops above `at_most` frames. Raises ImageCorrupt where the file is cut off."""
    header = data[12:30]
    if len(header) < 18 or header[:4] != b"VP8X" or not header[8] & _ANIMATION:
        return None
    plays, times, boxes = 1, [], []
    for name, content in _chunks(data, 12):
        if name == b"ANIM" and content.stop - content.start >= 6:
            (plays,) = struct.unpack("<4xH", data[content][:6])
        elif name == b"ANMF" and content.stop - content.start >= 16:
            frame = data[content.start : content.start + 16]
            times.append(_int24(frame, 12))
            boxes.append(_box(frame))
            if len(times) > at_most:
                break
    return WebPStructure(_int24(header, 15) + 1, _int24(header, 12) + 1, plays, times, boxes)


def _int24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _box(frame: bytes) -> Box:
    left, top = 2 * _int24(frame, 0), 2 * _int24(frame, 3)
    return Box(top, left, top + _int24(frame, 9) + 1, left + _int24(frame, 6) + 1)


def decode_webp(data: bytes, structure: WebPStructure) -> Iterator[Frame]:
    """Each frame as it is seen, RGB of 8 bits."""
    announced = 8 + int.from_bytes(data[4:8], "little")
    if announced > len(data):
        raise ImageCorrupt(f"cut off: {announced} bytes are announced and {len(data)} are there")
    picture: Any = WebPImageFile(io.BytesIO(data))
    if picture.n_frames != len(structure.milliseconds):
        raise ImageCorrupt(f"{len(structure.milliseconds)} frames are listed and {picture.n_frames} are good")
    for image, milliseconds in zip(raster.composed_frames(picture), structure.milliseconds, strict=True):
        yield Frame(image, milliseconds / 1000)


# ---------------------------------------------------------------- writing


def encode_webp(frames: Iterable[Frame], *, plays: int, options: EncodeConfig) -> bytes:
    """8 bits; only the box that changes is stored. One frame is held, and the file.

    Raises ImageTooLarge above 16,383 pixels a side.
    """
    body = io.BytesIO()
    still, before = b"", None
    seconds, milliseconds, flags = 0.0, 0, _ANIMATION
    for frame in frames:
        image = frame.image
        box = Box(0, 0, image.height, image.width) if before is None else _even(changed_box(before, image))
        part = raster.encode(image if before is None else cropped(image, box), format="webp", options=options)
        still = still or part
        seconds += frame.seconds
        left = max(0, round(seconds * 1000) - milliseconds)
        milliseconds += left
        for time in [_LONGEST] * ((left - 1) // _LONGEST) + [(left - 1) % _LONGEST + 1] if left else [0]:
            _write_chunk(body, b"ANMF", _frame_header(box, time) + _pixel_chunks(part))
        flags |= _ALPHA if image.alpha is not None else 0
        before = image
    assert before is not None, "the caller hands over at least one frame"
    return _file(body.getvalue(), still, before, flags=flags, plays=plays)


def _even(box: Box) -> Box:
    """Offsets are stored halved."""
    return Box(box.top // 2 * 2, box.left // 2 * 2, box.bottom, box.right)


def _frame_header(box: Box, milliseconds: int) -> bytes:
    values = (box.left // 2, box.top // 2, box.width - 1, box.height - 1, milliseconds)
    return b"".join(value.to_bytes(3, "little") for value in values) + bytes([_NO_BLENDING])


def _write_chunk(file: io.BytesIO, name: bytes, content: bytes) -> None:
    file.write(struct.pack("<4sI", name, len(content)) + content + bytes(len(content) % 2))


def _pixel_chunks(still: bytes) -> bytes:
    file = io.BytesIO()
    for name, content in _chunks(still, 12):
        if name in _PIXELS:
            _write_chunk(file, name, still[content])
    return file.getvalue()


def _file(frames: bytes, still: bytes, image: Image, *, flags: int, plays: int) -> bytes:
    """All chunks in their order; what is known about the colours comes from `still`, the first frame."""
    kept = {name: still[content] for name, content in _chunks(still, 12)}
    for name, flag in ((b"ICCP", _ICC), (b"EXIF", _EXIF), (b"XMP ", _XMP)):
        flags |= flag if name in kept else 0
    size = (image.width - 1).to_bytes(3, "little") + (image.height - 1).to_bytes(3, "little")
    file = io.BytesIO()
    _write_chunk(file, b"VP8X", struct.pack("<I", flags) + size)
    if b"ICCP" in kept:
        _write_chunk(file, b"ICCP", kept[b"ICCP"])
    _write_chunk(file, b"ANIM", struct.pack("<IH", 0, min(plays, 65535)))
    file.write(frames)
    for name in (b"EXIF", b"XMP "):
        if name in kept:
            _write_chunk(file, name, kept[name])
    content = file.getvalue()
    return struct.pack("<4sI4s", b"RIFF", len(content) + 4, b"WEBP") + content
