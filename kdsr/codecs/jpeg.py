"""JPEG files written without holding up the other threads of Python, as Pillow does while it compresses.

The compressor (libjpeg-turbo) is the same, and so are the pixels. Of files that are read, only how many scans
they have.
Sources: JPEG File Interchange Format 1.02, 1992; Exif 3.0, section 4.7; ICC.1:2022, annex B.4; ITU-T T.81,
1992, annex B.
"""

import re
import struct

import imagecodecs
import numpy as np

from kdsr.config import EncodeConfig
from kdsr.errors import ImageUnsupported
from kdsr.image import Image

MOST_SCANS, MOST_SEGMENTS, MOST_STRAY, MOST_EXIF = 200, 2000, 2**16, 64
"""Each scan goes over all pixels anew, and takes a few bytes to ask for: a small file could ask for hours.
So it could with what stands before the first one, which Pillow reads piece by piece: segments, bytes between
them, and EXIF, which it puts together anew for each piece."""
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_ALONE = frozenset({0xC8, 0xD8, 0xD9, *range(0xF0, 0xFE)})
"""Markers that have no segment for Pillow."""
_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")
"""Not a byte that is stuffed into a scan, nor what lets it begin anew."""
_JFIF = b"\xff\xd8\xff\xe0\x00\x10JFIF\0"
_DENSITY = slice(13, 18)  # unit, across, down
_HEAD_BYTES = 20
_PER_INCH = 1
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ICC = b"ICC_PROFILE\0"
_LARGEST_CONTENT = 65_533  # of a segment, whose length of 16 bits counts itself
_LARGEST_DENSITY = 65_535


def require_few_parts(data: bytes) -> None:
    """Raise ImageUnsupported for a file that is made to keep its decoder busy."""
    if _is_long_before_pixels(data):
        raise ImageUnsupported(
            f"JPEG with more than {MOST_SEGMENTS} segments, {MOST_EXIF} of EXIF or {MOST_STRAY} stray bytes "
            f"before its pixels is not read; save it as a plain one"
        )
    # What looks like the begin of a scan may lie in a profile or a thumbnail too, or behind the picture.
    if data.count(b"\xff\xda") > MOST_SCANS and _num_scans(data) > MOST_SCANS:
        raise ImageUnsupported(f"JPEG of more than {MOST_SCANS} scans is not read; save it as a plain one")


def _is_long_before_pixels(data: bytes) -> bool:
    at, segments, exif, stray = 2, 0, 0, 0
    while segments <= MOST_SEGMENTS and exif <= MOST_EXIF and stray <= MOST_STRAY:
        end = at + MOST_STRAY + 2
        found = _MARKER.search(data, at, end)
        if found is None:
            return end < len(data)
        code = found[1][0]
        if code == _SCAN:
            return False
        stray += found.start() - at
        if code in _ALONE:
            at, stray = found.end(), stray + 2
            continue
        at, segments = _behind(data, found), segments + 1
        exif += code == _APP1 and data.startswith(_EXIF, found.end() + 2)
    return True


def _num_scans(data: bytes) -> int:
    """Scans of the picture, counted as far as it matters; too many where its segments do not end."""
    at, scans = 2, 0
    for _ in range(MOST_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None or found[1][0] == _END or scans > MOST_SCANS:
            return scans
        scans += found[1][0] == _SCAN
        at = _behind(data, found)
    return MOST_SCANS + 1


def _behind(data: bytes, marker: "re.Match[bytes]") -> int:
    """Where the segment ends that `marker` begins."""
    return marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def encode(image: Image, options: EncodeConfig) -> bytes:
    """`image`, uint8 and without alpha, with its profile, EXIF, XMP and resolution.

    EXIF and XMP that need more than one segment of 64 KiB are left out; readers would not find them.
    """
    planes = image.pixels[:, :, 0] if image.pixels.shape[2] == 1 else image.pixels
    subsampling = options.subsampling.replace(":", "")
    written = imagecodecs.jpeg8_encode(
        np.ascontiguousarray(planes), level=options.quality, subsampling=subsampling
    )
    assert written.startswith(_JFIF), "libjpeg began with another segment than JFIF"
    return b"".join(
        (_head(bytes(written[:_HEAD_BYTES]), image.dpi), *_segments(image), written[_HEAD_BYTES:])
    )


def _head(jfif: bytes, dpi: tuple[float, float] | None) -> bytes:
    if dpi is None:
        return jfif
    across, down = (min(max(1, round(number)), _LARGEST_DENSITY) for number in dpi)
    return jfif[: _DENSITY.start] + struct.pack(">BHH", _PER_INCH, across, down) + jfif[_DENSITY.stop :]


def _segments(image: Image) -> list[bytes]:
    segments = []
    if image.exif:
        segments.append((0xE1, _EXIF + image.exif.removeprefix(_EXIF)))
    if image.xmp:
        segments.append((0xE1, _XMP + image.xmp))
    profile, room = image.icc_profile or b"", _LARGEST_CONTENT - len(_ICC) - 2
    parts = [profile[start : start + room] for start in range(0, len(profile), room)]
    segments += [(0xE2, _ICC + bytes((number, len(parts))) + part) for number, part in enumerate(parts, 1)]
    return [
        struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
        for marker, content in segments
        if len(content) <= _LARGEST_CONTENT
    ]
