"""AVIF and HEIC of 10 and 12 bits, of which Pillow gives 8: their pixels, as uint16 over the whole range.

Source of the fields of an AVIF's header: AV1 Codec ISO Media File Format Binding, section 2.3.
"""

import io
from collections.abc import Iterator

import imagecodecs
import numpy as np
import pillow_heif
from PIL.ImageFile import ImageFile

_HEIF_MODES = {"RGB;16": 3, "RGBA;16": 4, "I;16": 1}
_HIGH_BIT_DEPTH, _TWELVE_BITS, _MONOCHROME = 0x40, 0x20, 0x10
_HEAD_BYTES = 2**16  # the AV1 configuration stands among the first boxes


def avif_bits(data: bytes) -> int:
    """8, 10 or 12."""
    flags = next(_av1_flags(data), 0)
    return 8 if not flags & _HIGH_BIT_DEPTH else 12 if flags & _TWELVE_BITS else 10


def is_grey_avif(data: bytes) -> bool:
    """Whether it has no colours; transparency never has."""
    return all(flags & _MONOCHROME for flags in _av1_flags(data))


def _av1_flags(data: bytes) -> Iterator[int]:
    """Of each AV1 codec configuration, the picture's and that of its transparency."""
    at = data.find(b"av1C", 0, _HEAD_BYTES)
    while 0 <= at < len(data) - 6:
        yield data[at + 6]
        at = data.find(b"av1C", at + 4, _HEAD_BYTES)


def heic_bits(picture: ImageFile) -> int:
    """As the header of an open picture tells."""
    return int(picture.info.get("bit_depth") or 8)


def avif_planes(data: bytes, bits: int, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) or (H, W, C) uint16 as stored; None when they are not of this `size` (width, height)."""
    values = np.asarray(imagecodecs.avif_decode(data, numthreads=1))
    if values.dtype != np.uint16 or values.ndim > 3 or values.shape[1::-1] != size:
        return None
    return values << (16 - bits) | values >> (2 * bits - 16)


def heic_planes(data: bytes, bits: int) -> np.ndarray | None:
    """(H, W) or (H, W, C) uint16, upright; None when libheif gives another kind of pixels."""
    picture = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    if picture.mode not in _HEIF_MODES:
        return None
    values = np.asarray(picture)
    return values | values >> bits
