"""JPEG, PNG, WebP and TIFF through Pillow."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from kdsr.codecs.colour import convert_to_srgb, profile_space, to_srgb
from kdsr.codecs.formats import ImageHeader
from kdsr.errors import ImageCorrupt, ImageTooLarge, ImageUnsupported, RequestError
from kdsr.image import Image

# Pillow's own limit is a constant of the process. `codecs.decode` reads the size from the header and
# holds it against the caller's limit before anything is decoded.
PIL.Image.MAX_IMAGE_PIXELS = None

# The classes themselves, not PIL.Image.open: that tries dozens of further formats on hostile bytes.
_READERS: dict[str, type[ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
    "tiff": TiffImageFile,
}

_LARGEST_SIDE = {"jpeg": 65500, "webp": 16383, "png": 2**31 - 1, "tiff": 2**31 - 1}

# What Pillow's parsers raise on broken bytes, found by feeding it such bytes.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# Modes that Pillow turns into one that has our layout.
_SIMPLER_MODE = {"1": "L", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB"}

# Pillow keeps the high byte of 16-bit colour. Read as the other byte order, the same bytes give the low one.
_LOW_BYTES = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGB;16N": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B",
}

# Quarter turns and mirrors that make EXIF orientation 2..8 upright: (transpose, flip rows, flip columns).
_UPRIGHT = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def probe(data: bytes, kind: str) -> ImageHeader:
    """Size of the upright image from the header. An orientation behind a PNG's pixels is not looked for."""
    with _malformed_is_corrupt():
        picture = _open(data, kind)
        width, height = picture.size
    if kind in ("jpeg", "webp") or "exif" in picture.info:
        height, width = (width, height) if _orientation(picture) >= 5 else (height, width)
    return ImageHeader(kind, height, width)


def decode(data: bytes, kind: str) -> Image:
    """The first frame, upright, 8 or 16 bits as in the file; CMYK comes out in sRGB."""
    with _malformed_is_corrupt():
        picture = _open(data, kind)
        raw_modes = {_raw_mode(tile) for tile in picture.tile}
        planes = _deep_planes(data, kind, raw_modes)
        picture.load()
        if planes is None:
            planes = _planes(picture, raw_modes)
    # CMYK has been through its profile already.
    icc_profile = None if picture.mode == "CMYK" else picture.info.get("icc_profile")
    image = _image(planes, icc_profile)
    return _upright(image, picture, kind)


def encode(image: Image, *, format: str, quality: int = 95) -> bytes:  # noqa: A002 the word of the jobs' flags
    """The file's bytes, 8 bits, with ICC profile and EXIF.

    `quality` is that of JPEG (4:4:4) and WebP; PNG and TIFF are lossless. JPEG has no alpha: over white.
    Raises ImageTooLarge for more pixels a side than the format holds, RequestError for other formats.
    """
    if format not in _LARGEST_SIDE:
        raise RequestError(f"cannot write {format!r}; known formats are {', '.join(_LARGEST_SIDE)}")
    side = max(image.height, image.width)
    if side > _LARGEST_SIDE[format]:
        raise ImageTooLarge(
            f"{image.width} x {image.height}: {format} holds at most {_LARGEST_SIDE[format]} pixels a side; "
            f"choose png or tiff"
        )
    image = image.opaque() if format == "jpeg" else image.eight_bit()
    if format == "webp" and profile_space(image.icc_profile or b"") == "GRAY":
        image = to_srgb(image)  # WebP has no grey pixels that the profile would fit
    return _saved(_picture(image), format, **_options(image, format, quality))


def encode_png(pixels: np.ndarray, *, level: int = 1) -> bytes:
    """`pixels` (H, W, 1 or 3) uint8 as a bare PNG; `level` 0..9 is zlib's."""
    return _saved(_picture(Image(pixels)), "png", compress_level=level)


def decode_png(data: bytes) -> np.ndarray:
    """(H, W, 1 or 3) uint8 of a PNG that `encode_png` made. Raises ImageCorrupt."""
    with _malformed_is_corrupt():
        picture = _open(data, "png")
        picture.load()
    if picture.mode not in ("L", "RGB"):
        raise ImageCorrupt(f"expected a grey or RGB PNG of 8 bits, found mode {picture.mode}")
    return _three_axes(np.asarray(picture))


# ---------------------------------------------------------------- reading


@contextmanager
def _malformed_is_corrupt() -> Iterator[None]:
    try:
        yield
    except _MALFORMED as error:
        raise ImageCorrupt(f"broken or cut off: {error}") from error


def _open(data: bytes, kind: str) -> ImageFile:
    """The header is read, the pixels are not."""
    picture = _READERS[kind](io.BytesIO(data))
    if min(picture.size) < 1:
        raise ImageCorrupt(f"the header announces {picture.size[0]} x {picture.size[1]} pixels")
    return picture


def _raw_mode(tile: Any) -> str:
    """Pillow's name for the samples as they lie in the file."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _deep_planes(data: bytes, kind: str, raw_modes: set[str]) -> np.ndarray | None:
    """(H, W, 2..4) uint16 of a file with several 16-bit channels, None for every other file."""
    if raw_modes == {"LA;16B"}:
        split = _load_as(data, kind, lambda _: "RGBA")
        return _joined(split[:, :, 0::2], split[:, :, 1::2])
    if raw_modes and raw_modes <= _LOW_BYTES.keys():
        high = _load_as(data, kind, lambda raw_mode: raw_mode)
        return _joined(high, _load_as(data, kind, _LOW_BYTES.__getitem__))
    return None


def _load_as(data: bytes, kind: str, rename: Any) -> np.ndarray:
    """Pixels (H, W, 3 or 4) uint8 with each raw mode replaced by `rename` of it."""
    picture = _open(data, kind)
    picture.tile = [
        tile._replace(
            args=(rename(tile.args[0]), *tile.args[1:]) if isinstance(tile.args, tuple) else rename(tile.args)
        )
        for tile in picture.tile
    ]
    picture.load()
    return np.asarray(picture)


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return high.astype(np.uint16) << 8 | low


def _planes(picture: ImageFile, raw_modes: set[str]) -> np.ndarray:
    """(H, W, 1..4) uint8 or uint16 of a loaded picture. Raises ImageUnsupported."""
    if picture.mode.startswith("I;16"):
        return _three_axes(_deep_grey(picture, raw_modes))
    if picture.mode == "CMYK":
        return np.asarray(_rgb_from_cmyk(picture))
    mode = _SIMPLER_MODE.get(picture.mode, picture.mode)
    if mode in ("P", "PA"):
        mode = "RGBA" if picture.has_transparency_data else "RGB"
    elif mode in ("L", "RGB") and "transparency" in picture.info:
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageUnsupported(f"{picture.mode} pixels are not read; save it with 8 or 16 bits a sample")
    return _three_axes(np.asarray(picture if mode == picture.mode else picture.convert(mode)))


def _deep_grey(picture: ImageFile, raw_modes: set[str]) -> np.ndarray:
    """(H, W) uint16 over the whole range, dark to bright."""
    values: np.ndarray = np.asarray(picture).astype(np.uint16)
    if raw_modes == {"I;12"}:
        values = values << 4 | values >> 8
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(Base.PhotometricInterpretation) == 0:
        values = ~values
    return values


def _rgb_from_cmyk(picture: ImageFile) -> PIL.Image.Image:
    profile = picture.info.get("icc_profile")
    converted = convert_to_srgb(picture, profile) if profile else None
    return picture.convert("RGB") if converted is None else converted


def _three_axes(planes: np.ndarray) -> np.ndarray:
    return planes[:, :, None] if planes.ndim == 2 else planes


def _image(planes: np.ndarray, icc_profile: bytes | None) -> Image:
    """Colour and alpha apart."""
    if planes.shape[2] in (1, 3):
        return Image(planes, icc_profile=icc_profile)
    return Image(planes[:, :, :-1], alpha=planes[:, :, -1], icc_profile=icc_profile)


# ---------------------------------------------------------------- orientation


def _orientation(picture: ImageFile) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF is broken."""
    try:
        found = picture.getexif().get(Base.Orientation, 1)
    except _MALFORMED:
        return 1
    return found if found in _UPRIGHT else 1


def _upright(image: Image, picture: ImageFile, kind: str) -> Image:
    """Turned as its EXIF says. Pillow has turned TIFF already, and its EXIF are the file's own tags."""
    if kind == "tiff":
        return image
    orientation = _orientation(picture)
    exif = _reset_exif(picture)
    if orientation == 1:
        return replace(image, exif=exif)
    alpha = None if image.alpha is None else _turned(image.alpha, orientation)
    return replace(image, pixels=_turned(image.pixels, orientation), alpha=alpha, exif=exif)


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    transpose, flip_rows, flip_columns = _UPRIGHT[orientation]
    array = array.swapaxes(0, 1) if transpose else array
    array = array[::-1] if flip_rows else array
    return np.ascontiguousarray(array[:, ::-1] if flip_columns else array)


def _reset_exif(picture: ImageFile) -> bytes | None:
    """EXIF with orientation 1; None where there is none or it is broken."""
    try:
        exif = picture.getexif()
        if not exif:
            return None
        if Base.Orientation in exif:
            exif[Base.Orientation] = 1
        return exif.tobytes()
    except _MALFORMED:
        return None


# ---------------------------------------------------------------- writing


def _picture(image: Image) -> PIL.Image.Image:
    """Mode L, LA, RGB or RGBA."""
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    return PIL.Image.fromarray(planes[:, :, 0] if planes.shape[2] == 1 else planes)


def _options(image: Image, kind: str, quality: int) -> dict[str, Any]:
    """What Pillow's writer of the format takes."""
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": quality, "subsampling": "4:4:4"},
        "webp": {"quality": quality},
        "png": {"compress_level": 1},
        "tiff": {"compression": "tiff_adobe_deflate"},
    }
    kept = {"icc_profile": image.icc_profile, "exif": None if kind == "tiff" else image.exif}
    return options[kind] | {name: value for name, value in kept.items() if value}


def _saved(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
