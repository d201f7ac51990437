"""PPM and PGM, plain and binary, 8 and 16 bits. Knows bytes and numpy.

Source: the Netpbm format descriptions, ppm(5) and pgm(5). Bitmaps (P1, P4) are Pillow's.
"""

import re

import numpy as np

from kdsr.codecs.colour import to_srgb, to_srgb_16
from kdsr.image import Image, over_white

MAGICS = (b"P2", b"P3", b"P5", b"P6")
_COLOUR_MAGICS = (b"P3", b"P6")
_PLAIN_MAGICS = (b"P2", b"P3")
_COMMENT = re.compile(rb"#[^\r\n]*")


def read_header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, largest value, and where the samples begin. Comments run to the end of a line.

    Raises ValueError for numbers that are missing or out of range.
    """
    fields: list[int] = []
    at = 2
    while len(fields) < 3:
        while data[at : at + 1].isspace():
            at += 1
        end = at
        if data[at : at + 1] == b"#":
            at = data.index(b"\n", at)
            continue
        while data[end : end + 1].isdigit():
            end += 1
        fields.append(int(data[at : min(end, at + 10)]))
        at = end
    width, height, largest = fields
    if min(width, height) < 1:
        raise ValueError(f"the header announces {width} x {height} pixels")
    if not 1 <= largest <= 65535:
        raise ValueError(f"its largest value is {largest}; expected 1 to 65535")
    return width, height, largest, at + 1


def bits(data: bytes) -> int:
    """8 or 16, of a sample when it is decoded."""
    return 16 if read_header(data)[2] > 255 else 8


def decode(data: bytes) -> Image:
    """Grey or RGB, uint8 or uint16 over the whole range. Raises ValueError for a file that is cut off."""
    width, height, largest, begin = read_header(data)
    shape = height, width, 3 if data[:2] in _COLOUR_MAGICS else 1
    read = _plain if data[:2] in _PLAIN_MAGICS else _binary
    planes = read(data, begin, height * width * shape[2], largest).reshape(shape)
    full = 255 if largest < 256 else 65535
    if largest != full:
        scaled = (np.minimum(planes, largest).astype(np.uint32) * full + largest // 2) // largest
        planes = scaled.astype(planes.dtype)
    return Image(planes)


def _binary(data: bytes, begin: int, count: int, largest: int) -> np.ndarray:
    stored = np.dtype(np.uint8 if largest < 256 else ">u2")
    return np.frombuffer(data, stored, count=count, offset=begin).astype(stored.newbyteorder("="))


def _plain(data: bytes, begin: int, count: int, largest: int) -> np.ndarray:
    if 2 * count - 1 > len(data) - begin:
        raise ValueError(f"{count} samples do not fit into {len(data) - begin} bytes")
    words = _COMMENT.sub(b"", data[begin:]).split(maxsplit=count)[:count]
    values = np.array(words, dtype="S6").astype(np.int64)
    if len(values) < count or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"expected {count} samples of 0 to {largest}")
    return values.astype(np.uint8 if largest < 256 else np.uint16)


def encode(image: Image) -> bytes:
    """Binary, in sRGB and over white: the format holds neither profiles nor alpha. 16 bits stay 16."""
    if image.alpha is not None:
        image = Image(over_white(image.pixels, image.alpha), icc_profile=image.icc_profile)
    deep = image.pixels.dtype == np.uint16
    if image.icc_profile is not None:
        image = to_srgb_16(image) if deep else to_srgb(image)
    magic = "P6" if image.pixels.shape[2] == 3 else "P5"
    header = f"{magic}\n{image.width} {image.height}\n{65535 if deep else 255}\n".encode()
    return header + (image.pixels.astype(">u2") if deep else image.pixels).tobytes()
