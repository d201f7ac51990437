"""EXIF changed where it stands: what a camera wrote stays byte by byte, and so its MakerNote stays readable.

All functions take EXIF with or without its "Exif" head, and raise struct.error or ValueError where it is
broken.
Source: Exif 3.0, CIPA DC-008-2023, sections 4.5 and 4.6.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL.ExifTags import IFD, Base

HEAD = b"Exif\0\0"
_PREVIEW_TAGS = (Base.JpegIFOffset, Base.JpegIFByteCount)
_LARGEST_PREVIEW = 60_000  # a JPEG has one segment of 64 KiB for all of EXIF
_SHORT, _LONG, _RATIONAL = 3, 4, 5
_JPEG, _INCH = 6, 2
_FIELD_BYTES = 12


@dataclass(frozen=True)
class _Field:
    """One field of a directory."""

    tag: int
    kind: int
    at: int
    """Where it stands."""
    number: int
    """Its value, when it is one SHORT or LONG."""


def with_numbers(exif: bytes, numbers: Mapping[int, int]) -> bytes:
    """`exif` with these values of tags, of those that it has, in its main and its EXIF directory."""
    tiff = bytearray(_without_head(exif))
    order = _order(tiff)
    main = list(_fields(tiff, order, _main(tiff, order)))
    inner = [field.number for field in main if field.tag == IFD.Exif]
    for field in [*main, *(each for at in inner for each in _fields(tiff, order, at))]:
        if field.tag in numbers and field.kind in (_SHORT, _LONG):
            number = numbers[field.tag]
            packed = (_SHORT, 1, number, 0) if number < 2**16 else (_LONG, 1, number)
            letters = "HIHH" if number < 2**16 else "HII"
            struct.pack_into(order + letters, tiff, field.at + 2, *packed)
    return HEAD + bytes(tiff)


def without_field(exif: bytes, tag: int) -> bytes:
    """`exif` without the field `tag` of its main directory; nothing else moves but the fields behind it."""
    tiff = bytearray(_without_head(exif))
    order = _order(tiff)
    main = _main(tiff, order)
    fields = list(_fields(tiff, order, main))
    for field in fields:
        if field.tag == tag:
            end = _link(tiff, order) + 4
            tiff[field.at : end] = tiff[field.at + _FIELD_BYTES : end] + bytes(_FIELD_BYTES)
            struct.pack_into(f"{order}H", tiff, main, len(fields) - 1)
            break
    return HEAD + bytes(tiff)


def preview(exif: bytes) -> bytes | None:
    """The small JPEG in its second directory, if it has one."""
    tiff = _without_head(exif)
    found = _preview_place(tiff, _order(tiff))
    return None if found is None else tiff[found[0] : found[0] + found[1]]


def without_preview(exif: bytes) -> bytes:
    """`exif` of one directory; what the second held is cut off or, where something follows, blank."""
    tiff = bytearray(_without_head(exif))
    order = _order(tiff)
    found = _preview_place(bytes(tiff), order)
    struct.pack_into(f"{order}I", tiff, _link(tiff, order), 0)
    if found is not None:
        offset, length = found
        tiff[offset : offset + length] = bytes(length)
        if offset + length >= len(tiff) - 1:
            del tiff[offset:]
    return HEAD + bytes(tiff)


def with_preview(exif: bytes, jpeg: bytes) -> bytes:
    """`exif` with the small picture `jpeg` in its second directory, instead of what is there."""
    tiff = _without_head(exif)
    tiff += bytes(len(tiff) % 2)
    order = _order(tiff)
    inch = len(tiff) + 2 + 6 * _FIELD_BYTES + 4  # where "72 / 1" stands, behind six fields
    fields = (
        struct.pack(f"{order}HHIHH", Base.Compression, _SHORT, 1, _JPEG, 0),
        struct.pack(f"{order}HHII", Base.XResolution, _RATIONAL, 1, inch),
        struct.pack(f"{order}HHII", Base.YResolution, _RATIONAL, 1, inch + 8),
        struct.pack(f"{order}HHIHH", Base.ResolutionUnit, _SHORT, 1, _INCH, 0),
        struct.pack(f"{order}HHII", Base.JpegIFOffset, _LONG, 1, inch + 16),
        struct.pack(f"{order}HHII", Base.JpegIFByteCount, _LONG, 1, len(jpeg)),
    )
    directory = struct.pack(f"{order}H", len(fields)) + b"".join(fields) + bytes(4)
    resolution = struct.pack(f"{order}IIII", 72, 1, 72, 1)
    link = _link(tiff, order)
    tiff = tiff[:link] + struct.pack(f"{order}I", len(tiff)) + tiff[link + 4 :]
    return HEAD + tiff + directory + resolution + jpeg


def _without_head(exif: bytes) -> bytes:
    while exif.startswith(HEAD):
        exif = exif[len(HEAD) :]
    return exif


def _order(tiff: bytes | bytearray) -> str:
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        raise ValueError(f"EXIF begins with {bytes(tiff[:4])!r}; expected a TIFF header")
    return "<" if tiff[:2] == b"II" else ">"


def _main(tiff: bytes | bytearray, order: str) -> int:
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    return int(at)


def _fields(tiff: bytes | bytearray, order: str, directory: int) -> Iterator[_Field]:
    (count,) = struct.unpack_from(f"{order}H", tiff, directory)
    for at in range(directory + 2, directory + 2 + count * _FIELD_BYTES, _FIELD_BYTES):
        tag, kind, _, wide = struct.unpack_from(f"{order}HHII", tiff, at)
        (short,) = struct.unpack_from(f"{order}H", tiff, at + 8)
        yield _Field(tag, kind, at, short if kind == _SHORT else wide)


def _link(tiff: bytes | bytearray, order: str) -> int:
    """Where the offset of the second directory stands."""
    main = _main(tiff, order)
    (count,) = struct.unpack_from(f"{order}H", tiff, main)
    link = main + 2 + int(count) * _FIELD_BYTES
    struct.unpack_from(f"{order}I", tiff, link)
    return link


def _preview_place(tiff: bytes, order: str) -> tuple[int, int] | None:
    """Offset and length of the small JPEG."""
    (second,) = struct.unpack_from(f"{order}I", tiff, _link(tiff, order))
    if not second:
        return None
    found = {field.tag: field.number for field in _fields(tiff, order, second) if field.tag in _PREVIEW_TAGS}
    offset, length = (found.get(tag, 0) for tag in _PREVIEW_TAGS)
    is_jpeg = tiff[offset : offset + 2] == b"\xff\xd8" and length <= min(_LARGEST_PREVIEW, len(tiff) - offset)
    return (offset, length) if is_jpeg else None
