"""One page of a TIFF: deep ones read by tifffile, all written by it. `tiff_pages` knows several pages.

Sources: TIFF 6.0, 1992; Adobe Photoshop TIFF Technical Notes, 2002; Exif 3.0, CIPA DC-008-2023.
"""

import io
import struct
from typing import Any

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
_GREY_OR_RGB = (0, 1, 2)
_PLANAR = 2
_ASSOCIATED = 1
_ICC_TAG = 34675
_LARGEST_CLASSIC = 4 * 10**9
_STRIP_BYTES = 2**20
_COMPRESSION = {"deflate": "adobe_deflate", "lzw": "lzw", "none": None}
_DEFLATE_LEVEL = 1  # three times as fast as the usual 6, and files 5 % larger
_INKS = 4

# Tiles reach beyond the picture's edge, by less than one tile; what is far larger is made to fill memory.
_MOST_TILE_PIXELS = 2**24


def deep_page(data: bytes) -> Any:
    """The first page as tifffile has it, when Pillow would lose samples of 9 to 16 bits or floats; or None.

    Raises ImageTooLarge for tiles that have nothing to do with the picture's size.
    """
    page: Any = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    if page.is_tiled and page.tilewidth * page.tilelength > _MOST_TILE_PIXELS + _pixels(page):
        raise ImageTooLarge(f"tiles of {page.tilewidth} x {page.tilelength} pixels are not read")
    is_deep = page.dtype is not None and (page.dtype == np.uint16 or page.dtype.kind == "f")
    return page if is_deep and _is_plain(page) and _pixels(page) > 0 else None


def _pixels(page: Any) -> int:
    return int(page.imagelength * page.imagewidth)


def _is_plain(page: Any) -> bool:
    """Grey, RGB, either with alpha, or four inks of 16 bits."""
    if page.imagedepth != 1:
        return False
    if page.photometric == _SEPARATED:
        return bool(page.samplesperpixel == _INKS and page.dtype == np.uint16)
    return page.photometric in _GREY_OR_RGB and page.samplesperpixel in (1, 2, 3, 4)


def size(page: Any) -> tuple[int, int]:
    """(height, width) of the upright picture."""
    height, width = int(page.imagelength), int(page.imagewidth)
    return (width, height) if orientation(page) in metadata.TURNED_ASIDE else (height, width)


def bits(page: Any) -> int:
    """Of a sample when it is decoded: 16, or 32 for floating point."""
    return 16 if page.dtype == np.uint16 else 32


def orientation(page: Any) -> int:
    """1..8."""
    tag = page.tags.get(Base.Orientation)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def decode(page: Any) -> Image:
    """Pixels and profile of a `deep_page`, as it lies in the file; four inks come out in sRGB.

    Raises ImageUnsupported for pixels that are not finite.
    """
    values = page.asarray(maxworkers=1)
    if page.samplesperpixel > 1 and page.planarconfig == _PLANAR:
        values = np.moveaxis(values, 0, -1)
    kind = np.uint16 if bits(page) == 16 else np.float32
    planes = np.ascontiguousarray(values, dtype=kind)
    planes = planes[:, :, None] if planes.ndim == 2 else planes
    if not np.isfinite(planes).all():
        raise ImageUnsupported("it has NaN or infinite pixels; replace them first")
    if kind is np.uint16:
        planes = _over_16_bits(planes, page.bitspersample)
    icc = page.tags.get(_ICC_TAG)
    icc_profile = bytes(icc.value) if icc is not None else None
    if page.photometric == _SEPARATED:
        return Image(cmyk_to_srgb_16(planes, icc_profile))
    if page.photometric == _WHITE_IS_ZERO:
        planes[:, :, 0] = 65535 - planes[:, :, 0] if kind is np.uint16 else 1 - planes[:, :, 0]
    if planes.shape[2] in (1, 3):
        return Image(planes, icc_profile=icc_profile)
    if page.extrasamples and page.extrasamples[0] == _ASSOCIATED:
        planes = _unassociated(planes)
    return Image(planes[:, :, :-1], alpha=planes[:, :, -1], icc_profile=icc_profile)


def _over_16_bits(planes: np.ndarray, stored: int) -> np.ndarray:
    """Samples of `stored` bits, 9 to 16, over the whole range: white is 65535."""
    return planes if stored == 16 else planes << (16 - stored) | planes >> (2 * stored - 16)


def _unassociated(planes: np.ndarray) -> np.ndarray:
    """Colours that were multiplied by their alpha, divided by it."""
    top = 1.0 if planes.dtype == np.float32 else 65535.0
    alpha = planes[:, :, -1:].astype(np.float64)
    colours = np.divide(
        planes[:, :, :-1] * top, alpha, out=np.zeros_like(alpha + planes[:, :, :-1]), where=alpha > 0
    )
    result = planes.copy()
    if planes.dtype == np.float32:
        result[:, :, :-1] = colours
    else:
        result[:, :, :-1] = np.clip(colours + 0.5, 0, top).astype(np.uint16)
    return result


# ---------------------------------------------------------------- writing


def encode(image: Image, options: EncodeConfig) -> bytes:
    """8 and 16 bits and floats, with profile, resolution, XMP and EXIF; a BigTIFF where 4 GB do not do."""
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    is_big = planes.nbytes > _LARGEST_CLASSIC
    directories = metadata.exif_directories(image.exif)
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
        iccprofile=image.icc_profile,
        resolution=image.dpi,
        resolutionunit=2 if image.dpi else None,
        metadata=None,
        software=False,
        extratags=extra_tags(image, directories, is_big=is_big),
    )
    if directories:
        append_directories(file, directories, is_big=is_big)
    return file.getvalue()


def extra_tags(image: Image, directories: dict[int, dict[int, Any]], *, is_big: bool) -> list[Any]:
    """What tifffile writes beside its own: texts, XMP, and room for where `directories` will stand.

    It writes no tags of directories. The tags before them, which nobody has, are renamed afterwards.
    """
    tags: list[Any] = [
        (tag, 2, 0, text.encode() + b"\0", True) for tag, text in metadata.texts(image.exif).items()
    ]
    if image.xmp:
        tags.append((int(Base.XMLPacket), 1, len(image.xmp), image.xmp, True))
    tags += [(tag - 1, 16 if is_big else 4, 1, 0, True) for tag in directories]
    return tags


def append_directories(file: io.BytesIO, directories: dict[int, dict[int, Any]], *, is_big: bool) -> None:
    """Put EXIF and GPS behind the file's end, and their places into the tags that wait for them."""
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
