"""One page of a TIFF: what Pillow would spoil is read by tifffile, all is written by it.

`tiff_pages` knows several pages.

Sources: TIFF 6.0, 1992; Adobe Photoshop TIFF Technical Notes, 2002; Exif 3.0, CIPA DC-008-2023.
"""

import io
import struct
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import tifffile
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from kdsr.codecs import metadata
from kdsr.codecs.colour import cmyk_to_srgb_16
from kdsr.codecs.tiff_pages import Layout
from kdsr.config import EncodeConfig
from kdsr.errors import ImageTooLarge, ImageUnsupported
from kdsr.image import Image

_WHITE_IS_ZERO, _SEPARATED = 0, 5
_COLOURS = {0: 1, 1: 1, 2: 3}
"""Samples of a pixel beside its extra ones, by photometric interpretation."""
_PLANAR = 2
_ASSOCIATED, _UNASSOCIATED = 1, 2
_ICC_TAG = 34675
_RESOLUTION_UNITS = {2: 1.0, 3: 2.54}
"""How many of them an inch has: inches, centimetres."""
_KNOWN_TO_PILLOW = (1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34925, 50000)
"""Compressions: none, fax, LZW, JPEG, deflate, PackBits, ThunderScan, LZMA, Zstandard."""
_LARGEST_CLASSIC = 4 * 10**9
_STRIP_BYTES = 2**20
_COMPRESSION = {"deflate": "adobe_deflate", "lzw": "lzw", "none": None}
_DEFLATE_LEVEL = 1  # three times as fast as the usual 6, and files 5 % larger
_INKS = 4

Directories = dict[int, dict[int, Any]]
"""Contents by the tag that points to each."""

# Tiles reach beyond the picture's edge, by less than one tile; what is far larger is made to fill memory.
_MOST_TILE_PIXELS = 2**24


def first_page(data: bytes) -> Any:
    """As tifffile has it. Raises ImageTooLarge for tiles that have nothing to do with the picture's size."""
    page: Any = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    if page.is_tiled and page.tilewidth * page.tilelength > _MOST_TILE_PIXELS + _pixels(page):
        raise ImageTooLarge(f"tiles of {page.tilewidth} x {page.tilelength} pixels are not read")
    return page


def is_ours(page: Any) -> bool:
    """Whether `decode` reads it: 9 to 16 bits and floats, which Pillow would round, and rare compressions.

    Raises ImageUnsupported for compressions that nobody reads.
    """
    is_rare = page.compression not in _KNOWN_TO_PILLOW
    is_deep = page.dtype is not None and (page.dtype == np.uint16 or page.dtype.kind == "f")
    is_plain = _is_plain(page) and _pixels(page) > 0
    if is_rare and not (is_plain and (is_deep or page.dtype == np.uint8)):
        raise ImageUnsupported(f"TIFF of compression {int(page.compression)} is not read; save it as deflate")
    return is_plain and (is_deep or is_rare)


def _pixels(page: Any) -> int:
    return int(page.imagelength * page.imagewidth)


def _is_plain(page: Any) -> bool:
    """Grey, RGB, either with extra samples, or four inks of 16 bits."""
    if page.imagedepth != 1:
        return False
    if page.photometric == _SEPARATED:
        return bool(page.samplesperpixel == _INKS and page.dtype == np.uint16)
    return bool(page.samplesperpixel >= _COLOURS.get(page.photometric, np.inf))


def size(page: Any) -> tuple[int, int]:
    """(height, width) of the upright picture."""
    height, width = int(page.imagelength), int(page.imagewidth)
    return (width, height) if orientation(page) in metadata.TURNED_ASIDE else (height, width)


def bits(page: Any) -> int:
    """Of a sample when it is decoded: 8, 16, or 32 for floating point."""
    return 32 if page.dtype.kind == "f" else 8 * int(page.dtype.itemsize)


def orientation(page: Any) -> int:
    """1..8."""
    tag = page.tags.get(Base.Orientation)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def decode(page: Any) -> Image:
    """Pixels and profile of a page that `is_ours`, as it lies in the file; four inks come out in sRGB.

    Raises ImageUnsupported for pixels that are not finite.
    """
    values = page.asarray(maxworkers=1)
    if page.samplesperpixel > 1 and page.planarconfig == _PLANAR:
        values = np.moveaxis(values, 0, -1)
    kind = {8: np.uint8, 16: np.uint16, 32: np.float32}[bits(page)]
    planes = np.ascontiguousarray(values, dtype=kind)
    planes = planes[:, :, None] if planes.ndim == 2 else planes
    if not np.isfinite(planes).all():
        raise ImageUnsupported("it has NaN or infinite pixels; replace them first")
    if kind is np.uint16:
        planes = _over_16_bits(planes, page.bitspersample)
    icc_profile = profile(page)
    if page.photometric == _SEPARATED:
        return Image(cmyk_to_srgb_16(planes, icc_profile))
    if page.photometric == _WHITE_IS_ZERO:
        planes[:, :, 0] = _white(planes.dtype) - planes[:, :, 0]
    num_colours = _COLOURS[page.photometric]
    alpha_kind = next(iter(page.extrasamples), 0)
    if planes.shape[2] == num_colours or alpha_kind not in (_ASSOCIATED, _UNASSOCIATED):
        return Image(np.ascontiguousarray(planes[:, :, :num_colours]), icc_profile=icc_profile)
    planes = planes[:, :, : num_colours + 1]
    if alpha_kind == _ASSOCIATED:
        planes = _unassociated(planes)
    return Image(
        np.ascontiguousarray(planes[:, :, :-1]), alpha=planes[:, :, -1].copy(), icc_profile=icc_profile
    )


def profile(page: Any) -> bytes | None:
    """Its ICC profile."""
    return _bytes_of(page, _ICC_TAG)


def described(image: Image, page: Any) -> Image:
    """The upright `image` of the page with its EXIF, XMP and resolution."""
    dpi = _dpi(page)
    if dpi is not None and orientation(page) in metadata.TURNED_ASIDE:
        dpi = dpi[1], dpi[0]
    xmp = _bytes_of(page, Base.XMLPacket)
    return replace(
        image,
        exif=metadata.read_tiff_exif(
            page.parent.filehandle, page.offset, order=page.parent.byteorder, is_big=page.parent.is_bigtiff
        ),
        xmp=metadata.upright_xmp(xmp) if xmp else None,
        dpi=dpi,
    )


def _bytes_of(page: Any, tag: int) -> bytes | None:
    """The value of a tag that holds bytes; None where it is missing or holds something else."""
    value = _value(page, tag)
    return bytes(value) if isinstance(value, (bytes, np.ndarray)) and len(value) else None


def _value(page: Any, tag: int) -> Any:
    """Of a tag that the picture can do without; None where it is missing or broken."""
    try:
        return page.tags[tag].value if tag in page.tags else None
    except (OSError, ValueError, TypeError, LookupError, struct.error):
        return None


def _dpi(page: Any) -> tuple[float, float] | None:
    unit = _value(page, Base.ResolutionUnit) or 2
    sides = [_value(page, tag) for tag in (Base.XResolution, Base.YResolution)]
    try:
        across, down = (above / below * _RESOLUTION_UNITS[unit] for above, below in sides)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return metadata.plausible_dpi(across, down)


def _white(dtype: Any) -> int:
    return 1 if dtype == np.float32 else int(np.iinfo(dtype).max)


def _over_16_bits(planes: np.ndarray, stored: int) -> np.ndarray:
    """Samples of `stored` bits, 9 to 16, over the whole range: white is 65535."""
    return planes if stored == 16 else planes << (16 - stored) | planes >> (2 * stored - 16)


def _unassociated(planes: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by their alpha, divided by it."""
    top = float(_white(planes.dtype))
    alpha = planes[:, :, -1:].astype(np.float64)
    colours = np.divide(
        planes[:, :, :-1] * top, alpha, out=np.zeros_like(alpha + planes[:, :, :-1]), where=alpha > 0
    )
    result = planes.copy()
    if planes.dtype == np.float32:
        result[:, :, :-1] = colours
    else:
        result[:, :, :-1] = np.clip(colours + 0.5, 0, top).astype(planes.dtype)
    return result


# ---------------------------------------------------------------- writing


def encode(image: Image, options: EncodeConfig) -> bytes:
    """8 and 16 bits and floats, with profile, resolution, XMP and EXIF; a BigTIFF where 4 GB do not do."""
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    is_big = planes.nbytes > _LARGEST_CLASSIC
    directories = exif_directories(image)
    compression = _COMPRESSION[options.tiff_compression]
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        planes[:, :, 0] if planes.shape[2] == 1 else planes,
        byteorder="<",
        bigtiff=is_big,
        photometric="rgb" if image.pixels.shape[2] == 3 else "minisblack",
        planarconfig="contig" if planes.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if image.alpha is not None else None,
        compression=compression,
        compressionargs={"level": _DEFLATE_LEVEL} if options.tiff_compression == "deflate" else None,
        predictor=compression is not None,
        rowsperstrip=max(1, _STRIP_BYTES // (planes.nbytes // planes.shape[0])),
        maxworkers=1,
        metadata=None,
        software=False,
        **tag_arguments(image, directories, is_big=is_big),
    )
    append_directories(file, directories, is_big=is_big)
    return file.getvalue()


def exif_directories(image: Image) -> Directories:
    """The EXIF and GPS directories of the image; those that are there."""
    return metadata.exif_directories(image.exif)


def tag_arguments(image: Image, directories: Directories, *, is_big: bool) -> dict[str, Any]:
    """What tifffile's writer is told: profile, resolution, texts, XMP, and room for `directories`.

    It writes no tags that point to directories. The tags before those, which nobody has, keep the room
    until `append_directories` renames them.
    """
    tags: list[Any] = [
        (tag, 2, 0, text.encode() + b"\0", True) for tag, text in metadata.texts(image.exif).items()
    ]
    if image.xmp:
        tags.append((int(Base.XMLPacket), 1, len(image.xmp), image.xmp, True))
    tags += [(tag - 1, 16 if is_big else 4, 1, 0, True) for tag in directories]
    return {
        "iccprofile": image.icc_profile,
        "resolution": image.dpi,
        "resolutionunit": 2 if image.dpi else None,
        "extratags": tags,
    }


def append_directories(file: BinaryIO, directories: Directories, *, is_big: bool) -> None:
    """Put EXIF and GPS behind the end of `file`, and their places into the tags that wait for them."""
    if not directories:
        return
    at = file.seek(0, io.SEEK_END)
    at += file.write(bytes(at % 2))
    parent: Any = ImageFileDirectory_v2(ifh=b"II+\0\x08\0\0\0" + bytes(8) if is_big else b"II*\0" + bytes(4))
    for tag, content in directories.items():
        parent[tag] = content
    packed = parent.tobytes(at)
    file.write(packed)
    file.seek(0)
    with tifffile.TiffFile(file) as written:
        waiting: Any = written.pages.first.tags
        rooms = {tag: waiting[tag - 1].offset for tag in directories}
    for tag, place in _places(packed, Layout("<", is_big)).items():
        file.seek(rooms[tag])
        file.write(struct.pack("<HHQQ" if is_big else "<HHII", tag, 16 if is_big else 4, 1, place))


def _places(packed: bytes, layout: Layout) -> dict[int, int]:
    """Offset by tag of the directories that the one in `packed` names."""
    (count,) = struct.unpack_from(layout.count, packed)
    begin = struct.calcsize(layout.count)
    entries = (layout.entry.unpack_from(packed, begin + index * layout.entry.size) for index in range(count))
    return {tag: int.from_bytes(value, "little") for tag, _, _, value in entries}
