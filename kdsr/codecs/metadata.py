"""EXIF and XMP: read once, corrected for the pixels they are written with. Knows no pixels.

What cannot be understood is left out: a broken EXIF never fails an image.
"""

import re
import struct
from contextlib import suppress
from typing import Any, BinaryIO

import PIL.Image
from PIL.ExifTags import IFD, Base

from kdsr.codecs import exif as exif_bytes

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
    Base.HostComputer,
    Base.Artist,
    Base.Copyright,
)

TURNED_ASIDE = (5, 6, 7, 8)
"""EXIF orientations that change height and width for each other."""

_THUMBNAILS = (b"xmp:Thumbnails>", b"xap:Thumbnails>")

_XMP_SIZES = {
    "ImageWidth": "width",
    "PixelXDimension": "width",
    "ImageLength": "height",
    "PixelYDimension": "height",
}


def orientation(picture: PIL.Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF is broken."""
    try:
        # Pillow's own PNG method would decode the pixels first.
        found = PIL.Image.Image.getexif(picture).get(Base.Orientation, 1)
    except _MALFORMED:
        return 1
    return int(found) if found in range(1, 9) else 1


def described(picture: PIL.Image.Image) -> dict[str, Any]:
    """EXIF, XMP and resolution as an `Image` names them."""
    return {"exif": _read_exif(picture), "xmp": _read_xmp(picture), "dpi": _read_dpi(picture)}


def _read_exif(picture: PIL.Image.Image) -> bytes | None:
    """EXIF with orientation 1; None without any.

    Where it can be, it is as the camera wrote it, so that a MakerNote keeps its meaning.
    """
    try:
        exif = picture.getexif()
        if not exif:
            return None
        as_found = picture.info.get("exif")
        return upright_exif(as_found if isinstance(as_found, bytes) else exif.tobytes())
    except _MALFORMED:
        return None


def upright_exif(exif: bytes) -> bytes | None:
    """`exif` with orientation 1; None when it is broken."""
    try:
        return exif_bytes.with_numbers(exif, {Base.Orientation: 1})
    except _MALFORMED:
        return None


def read_tiff_exif(file: BinaryIO, directory: int, *, order: str, is_big: bool) -> bytes | None:
    """EXIF of the page whose directory stands at this byte, without the tags that say how it is stored."""
    exif = PIL.Image.Exif()
    exif.endian, exif.bigtiff = order, is_big
    try:
        exif.load_from_fp(file, directory)
        kept = _about_the_picture(exif)
        return kept.tobytes() if kept else None
    except _MALFORMED:
        return None


def _without_maker_note(directory: dict[int, Any]) -> dict[int, Any]:
    """Its offsets count from the begin of the file, and would be wrong in another place."""
    return {tag: value for tag, value in directory.items() if tag != Base.MakerNote}


def _about_the_picture(exif: PIL.Image.Exif) -> PIL.Image.Exif:
    kept = PIL.Image.Exif()
    for tag in _ABOUT_THE_PICTURE:
        if tag in exif:
            kept[tag] = exif[tag]
    for directory in (IFD.Exif, IFD.GPSInfo):
        content = exif.get_ifd(directory)
        if content:
            kept[directory] = _without_maker_note(content)
    return kept


def sized_exif(exif: bytes | None, *, height: int, width: int) -> bytes | None:
    """`exif` for an image of this size. An embedded preview, which would show the old one, is left out."""
    if exif is None:
        return None
    sizes: dict[int, int] = {
        Base.ImageWidth: width,
        Base.ImageLength: height,
        Base.ExifImageWidth: width,
        Base.ExifImageHeight: height,
    }
    try:
        return exif_bytes.with_numbers(exif_bytes.without_preview(exif), sizes)
    except _MALFORMED:
        return None


def has_preview(exif: bytes | None) -> bool:
    """Whether a small JPEG of the picture is in it."""
    if exif is None:
        return False
    try:
        return exif_bytes.preview(exif) is not None
    except _MALFORMED:
        return False


def texts(exif: bytes | None) -> dict[int, str]:
    """Texts of the main directory by tag."""
    content = loaded(exif)
    return {tag: value for tag in _ABOUT_THE_PICTURE if isinstance(value := content.get(tag), str)}


def exif_directories(exif: bytes | None) -> dict[int, dict[int, Any]]:
    """The EXIF and GPS directories by the tag that points to them; those that are there."""
    content = loaded(exif)
    found = {}
    with suppress(*_MALFORMED):
        for directory in (IFD.Exif, IFD.GPSInfo):
            inner = _without_maker_note(content.get_ifd(directory))
            if IFD.Interop in inner:
                inner[IFD.Interop] = dict(content.get_ifd(IFD.Interop))
            if inner:
                found[int(directory)] = inner
    return found


def loaded(exif: bytes | None) -> PIL.Image.Exif:
    """`exif` as Pillow has it; empty when there is none or it is broken."""
    content = PIL.Image.Exif()
    if exif is not None:
        with suppress(*_MALFORMED):
            content.load(exif)
    return content


def _read_xmp(picture: PIL.Image.Image) -> bytes | None:
    """The packet, with orientation 1."""
    found = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp")
    if not found:
        return None
    return upright_xmp(found.encode() if isinstance(found, str) else bytes(found))


def upright_xmp(packet: bytes) -> bytes:
    """`packet` with orientation 1."""
    return _replaced(packet, "Orientation", 1)


def sized_xmp(xmp: bytes | None, *, height: int, width: int) -> bytes | None:
    """`xmp` for an image of this size, without small pictures of the old one."""
    if xmp is None:
        return None
    for tag in _THUMBNAILS:
        xmp = _without(xmp, b"<" + tag, b"</" + tag)
    for name, side in _XMP_SIZES.items():
        xmp = _replaced(xmp, name, width if side == "width" else height)
    return xmp


def _without(packet: bytes, opening: bytes, closing: bytes) -> bytes:
    """`packet` without what lies from each `opening` to the next `closing`."""
    kept, at = [], 0
    while (begin := packet.find(opening, at)) >= 0 and (end := packet.find(closing, begin)) >= 0:
        kept.append(packet[at:begin])
        at = end + len(closing)
    return b"".join((*kept, packet[at:]))


def _replaced(packet: bytes, name: str, value: int) -> bytes:
    """The number of tiff:`name` or exif:`name`, as an attribute or as an element."""
    packet = re.sub(rf'((?:tiff|exif):{name}=["\'])\d+'.encode(), rf"\g<1>{value}".encode(), packet)
    return re.sub(rf"(<(?:tiff|exif):{name}>)\d+".encode(), rf"\g<1>{value}".encode(), packet)


def _read_dpi(picture: PIL.Image.Image) -> tuple[float, float] | None:
    """Pixels per inch, when the file tells."""
    try:
        across, down = (float(number) for number in picture.info["dpi"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return plausible_dpi(across, down)


def plausible_dpi(across: float, down: float) -> tuple[float, float] | None:
    """Both, or None when they cannot be meant; 1 stands for an unknown resolution."""
    return (across, down) if 1 < across <= 1e5 and 1 < down <= 1e5 else None
