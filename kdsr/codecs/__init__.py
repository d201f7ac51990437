"""Bytes to pixels and back: the only entry for file formats. The format is found in the content.

Everything here works on bytes that somebody else fetched. A message names what is wrong with the image;
the caller knows which one it is.
"""

from kdsr.codecs import raster
from kdsr.codecs.colour import to_srgb
from kdsr.codecs.formats import HEAD_BYTES, SUFFIXES, ImageHeader, identify
from kdsr.codecs.raster import decode_png, encode, encode_png
from kdsr.errors import ImageTooLarge
from kdsr.image import Image

__all__ = [
    "HEAD_BYTES",
    "SUFFIXES",
    "ImageHeader",
    "decode",
    "decode_png",
    "encode",
    "encode_png",
    "identify",
    "probe",
    "to_srgb",
]


def probe(data: bytes) -> ImageHeader:
    """What the header says; no pixel is decoded. Raises ImageCorrupt or ImageUnsupported."""
    return raster.probe(data, identify(data))


def decode(data: bytes, *, max_pixels: int) -> Image:
    """All pixels of the image, upright, in the colour space of its file.

    Raises ImageTooLarge before anything is decoded, ImageCorrupt also when the end of the file is
    missing, ImageUnsupported for kinds of pixels that are not handled. The first frame of several.
    """
    header = probe(data)
    if header.height * header.width > max_pixels:
        raise ImageTooLarge(
            f"{header.width} x {header.height} pixels are more than max_pixels {max_pixels}; "
            f"raise it if the image is wanted"
        )
    # Nothing behind this takes 16 bits yet; the codecs already read them.
    return raster.decode(data, header.format).eight_bit()
