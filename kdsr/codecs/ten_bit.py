"""AVIF and HEIC of 10 and 12 bits, of which Pillow gives 8: their pixels, as uint16 over the whole range."""

import io

import imagecodecs
import numpy as np
import pillow_heif
from PIL.ImageFile import ImageFile

_HEIF_MODES = {"RGB;16": 3, "RGBA;16": 4, "I;16": 1}
_HEAD_BYTES = 2**16  # the AV1 configuration stands among the first boxes


def avif_bits(data: bytes) -> int:
    """8, 10 or 12, from the AV1 codec configuration. Source: AV1 Codec ISO Media File Format, 2.3.3."""
    at = data.find(b"av1C", 0, _HEAD_BYTES)
    flags = data[at + 6] if 0 <= at < len(data) - 6 else 0
    return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10


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
