"""Bytes to pixels and back: the only entry for file formats. The format is found in the content.

Everything here works on bytes that somebody else fetched. A message names what is wrong with the image;
the caller knows which one it is.
"""

from dataclasses import replace

from kdsr.codecs import raster
from kdsr.codecs.colour import to_srgb
from kdsr.codecs.formats import (
    HEAD_BYTES,
    SUFFIXES,
    ImageHeader,
    identify,
    largest_side,
    output_format,
    suffix,
)
from kdsr.codecs.png import PngWriter
from kdsr.codecs.raster import decode_png, encode, encode_png
from kdsr.codecs.sequences import (
    HOLD_FRAMES,
    MOST_FRAMES,
    count_frames,
    decode_frames,
    encode_frames,
    with_pages,
)
from kdsr.errors import ImageTooLarge
from kdsr.image import Image

__all__ = [
    "HEAD_BYTES",
    "SUFFIXES",
    "ImageHeader",
    "PngWriter",
    "can_hold_frames",
    "decode",
    "decode_frames",
    "decode_png",
    "encode",
    "encode_frames",
    "encode_png",
    "identify",
    "largest_side",
    "output_format",
    "probe",
    "suffix",
    "to_srgb",
]


def can_hold_frames(name: str) -> bool:
    """Whether a file of the format can be an animation or have pages."""
    return name in HOLD_FRAMES


def probe(data: bytes, *, max_frames: int = MOST_FRAMES) -> ImageHeader:
    """What the header says; no pixel is decoded.

    Raises ImageCorrupt or ImageUnsupported, and ImageTooLarge above `max_frames`, where counting stops.
    """
    kind = identify(data)
    header = raster.probe(data, kind)
    frames, loop = count_frames(data, kind, at_most=max_frames)
    header = replace(header, frames=frames, loop=loop)
    return with_pages(header, data) if kind == "tiff" and frames > 1 else header


def decode(data: bytes, *, max_pixels: int) -> Image:
    """All pixels of the image, upright, in the depth and the colour space of its file.

    Raises ImageTooLarge before anything is decoded, ImageCorrupt also when the end of the file is
    missing, ImageUnsupported for kinds of pixels that are not handled. The first frame of several.
    """
    kind = identify(data)
    header = raster.probe(data, kind)
    if header.height * header.width > max_pixels:
        raise ImageTooLarge(
            f"{header.width} x {header.height} pixels are more than max_pixels {max_pixels}; "
            f"raise it if the image is wanted"
        )
    return raster.decode(data, kind)
