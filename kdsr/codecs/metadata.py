"""EXIF and XMP: read once, corrected for the pixels they are written with. Knows no pixels.

What cannot be understood is left out: a broken EXIF never fails an image.
"""

import re
import struct
from contextlib import suppress

import PIL.Image
from PIL.ExifTags import IFD, Base

# What Pillow raises on broken EXIF.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    struct.error,
)

# Tags of a TIFF's own directory that tell of the picture, not of how it is stored.
_ABOUT_THE_PICTURE = (
    Base.ImageDescription,
    Base.Make,
    Base.Model,
    Base.Software,
    Base.DateTime,
    Base.Artist,
    Base.Copyright,
)

_XMP_SIZES = {
    "ImageWidth": "width",
    "PixelXDimension": "width",
    "ImageLength": "height",
    "PixelYDimension": "height",
}


def orientation(picture: PIL.Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF is broken."""
    try:
        found = picture.getexif().get(Base.Orientation, 1)
    except _MALFORMED:
        return 1
    return int(found) if found in range(1, 9) else 1


def read_exif(picture: PIL.Image.Image, *, is_tiff: bool) -> bytes | None:
    """EXIF with orientation 1, of a TIFF without the tags that say how it is stored; None without any."""
    try:
        exif = picture.getexif()
        if is_tiff:
            exif = _of_tiff(exif)
        if not exif:
            return None
        if Base.Orientation in exif:
            exif[Base.Orientation] = 1
        return exif.tobytes()
    except _MALFORMED:
        return None


def _of_tiff(exif: PIL.Image.Exif) -> PIL.Image.Exif:
    kept = PIL.Image.Exif()
    for tag in _ABOUT_THE_PICTURE:
        if tag in exif:
            kept[tag] = exif[tag]
    for directory in (IFD.Exif, IFD.GPSInfo):
        content = exif.get_ifd(directory)
        if content:
            kept[directory] = dict(content)
    return kept


def sized_exif(exif: bytes | None, *, height: int, width: int) -> bytes | None:
    """`exif` for an image of this size. An embedded preview, which would show the old one, is left out."""
    if exif is None:
        return None
    try:
        content = loaded(exif)
        for tag, length in ((Base.ImageWidth, width), (Base.ImageLength, height)):
            if tag in content:
                content[tag] = length
        # The old file's samples are not those of this one.
        inner = dict(content.get_ifd(IFD.Exif))
        if inner:
            inner[Base.ExifImageWidth], inner[Base.ExifImageHeight] = width, height
            content.get_ifd(IFD.Exif).update(inner)
        return content.tobytes()
    except _MALFORMED:
        return None


def texts(exif: bytes | None) -> dict[int, str]:
    """Texts of the main directory by tag."""
    content = loaded(exif)
    return {tag: value for tag in _ABOUT_THE_PICTURE if isinstance(value := content.get(tag), str)}


def main_tags(exif: bytes | None) -> PIL.Image.Exif:
    """Texts of the main directory alone: what a TIFF can take over without its EXIF directories."""
    content = PIL.Image.Exif()
    for tag, text in texts(exif).items():
        content[tag] = text
    return content


def loaded(exif: bytes | None) -> PIL.Image.Exif:
    """`exif` as Pillow has it; empty when there is none or it is broken."""
    content = PIL.Image.Exif()
    if exif is not None:
        with suppress(*_MALFORMED):
            content.load(exif)
    return content


def read_xmp(picture: PIL.Image.Image) -> bytes | None:
    """The packet, with orientation 1."""
    found = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp")
    if not found:
        return None
    packet = found.encode() if isinstance(found, str) else bytes(found)
    return _replaced(packet, "Orientation", 1)


def sized_xmp(xmp: bytes | None, *, height: int, width: int) -> bytes | None:
    """`xmp` for an image of this size."""
    if xmp is None:
        return None
    for name, side in _XMP_SIZES.items():
        xmp = _replaced(xmp, name, width if side == "width" else height)
    return xmp


def _replaced(packet: bytes, name: str, value: int) -> bytes:
    """The number of tiff:`name` or exif:`name`, as an attribute or as an element."""
    packet = re.sub(rf'((?:tiff|exif):{name}=["\'])\d+'.encode(), rf"\g<1>{value}".encode(), packet)
    return re.sub(rf"(<(?:tiff|exif):{name}>)\d+".encode(), rf"\g<1>{value}".encode(), packet)


def read_dpi(picture: PIL.Image.Image) -> tuple[float, float] | None:
    """Pixels per inch, when the file tells and they are plausible; 1 stands for an unknown resolution."""
    try:
        across, down = (float(number) for number in picture.info["dpi"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 1 < across <= 1e5 and 1 < down <= 1e5 else None
