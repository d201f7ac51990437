"""Single pictures of every format.

Pillow reads and writes most. What it would spoil is done elsewhere: 16 bits, deep TIFF, 10-bit AVIF and HEIC,
GIF, and the PNG writer, which is faster.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pillow_heif import HeifImageFile

from kdsr.codecs import jpeg, metadata, png, pnm, ten_bit, tiff
from kdsr.codecs.colour import convert_to_srgb, profile_space, to_srgb
from kdsr.codecs.exif import with_preview, without_field
from kdsr.codecs.formats import ImageHeader, largest_side
from kdsr.codecs.gif import canvas_size, decode_gif, encode_gif
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt, ImageTooLarge, ImageUnsupported
from kdsr.image import Frame, Image

# Pillow's own limit is a constant of the process. `codecs.decode` reads the size from the header and
# holds it against the caller's limit before anything is decoded.
PIL.Image.MAX_IMAGE_PIXELS = None

# The classes themselves, not PIL.Image.open: that tries dozens of further formats on hostile bytes.
_READERS: dict[str, type[ImageFile]] = {
    "jpeg": JpegImageFile,
    "png": PngImageFile,
    "webp": WebPImageFile,
    "tiff": TiffImageFile,
    "avif": AvifImageFile,
    "heic": HeifImageFile,
    "bmp": BmpImageFile,
    "ppm": PpmImageFile,
}

# Formats whose EXIF turns the pixels. Pillow has turned TIFF already, and libheif HEIC.
_TURNED_BY_EXIF = ("jpeg", "png", "webp", "avif")

# What Pillow's parsers raise on broken bytes, found by feeding it such bytes.
_MALFORMED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)

_PREVIEW_SIDE, _PREVIEW_QUALITY = 160, 85  # as the Exif standard recommends

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

# Pillow stretches grey of 2 and 4 bits to 8, but not the grey that a PNG calls transparent.
_STRETCHED = {"L;2": 85, "L;4": 17}


def probe(data: bytes, kind: str) -> ImageHeader:
    """Size of the upright image, from the header."""
    with malformed_is_corrupt():
        if kind == "ppm" and data[:2] in pnm.MAGICS:
            width, height = pnm.read_header(data)[:2]
            return ImageHeader(kind, height, width, bits=pnm.bits(data))
        if kind == "tiff" and tiff.is_ours(page := tiff.first_page(data)):
            return ImageHeader(kind, *tiff.size(page), bits=tiff.bits(page))
        if kind == "gif":
            return ImageHeader(kind, *canvas_size(data))
        if kind == "jpeg":
            jpeg.require_few_parts(data)
        picture = _open(png.with_metadata_first(data) if kind == "png" else data, kind)
        width, height = picture.size
        bits = _bits(data, picture, kind)
        if kind in _TURNED_BY_EXIF and metadata.orientation(picture) in metadata.TURNED_ASIDE:
            height, width = width, height
    return ImageHeader(kind, height, width, bits=bits)


def decode(data: bytes, kind: str) -> Image:
    """The first frame, upright, 8 or 16 bits or floating point as in the file; CMYK comes out in sRGB."""
    with malformed_is_corrupt():
        if kind == "ppm" and data[:2] in pnm.MAGICS:
            return pnm.decode(data)
        if kind == "gif":
            return next(decode_gif(data)).image
        page = tiff.first_page(data) if kind == "tiff" else None
        if page is not None and tiff.is_ours(page):
            return tiff.described(tiff.decode(page).turned(tiff.orientation(page)), page)
        picture = _open(data, kind)
        raw_modes = {_raw_mode(tile) for tile in picture.tile}
        planes = _deep_planes(data, picture, kind, raw_modes)
        if kind != "heic" or planes is None:
            picture.load()
        if planes is None:
            planes = _planes(picture, raw_modes)
        if kind == "avif" and planes.shape[2] == 4 and ten_bit.is_grey_avif(data):
            planes = planes[:, :, 2:]
        planes = _with_transparent_colour(planes, picture)
        # CMYK has been through its profile already.
        icc_profile = None if picture.mode == "CMYK" else picture.info.get("icc_profile")
        image = _image(planes, icc_profile)
        if page is not None:
            return tiff.described(image, page)
        described = replace(image, **metadata.described(picture))
        return described.turned(metadata.orientation(picture)) if kind in _TURNED_BY_EXIF else described


def encode(image: Image, *, format: str, options: EncodeConfig = EncodeConfig()) -> bytes:  # noqa: A002 the flags' word
    """The file's bytes in the depth that the format holds, with ICC profile, EXIF, XMP and resolution.

    PNG and PPM hold 16 bits, TIFF floating point too, the others 8: deeper pictures are rounded. JPEG has
    no alpha: over white, and so BMP and PPM. GIF, BMP and PPM have no profiles: in sRGB. Raises ImageTooLarge
    for more pixels a side than the format holds, RequestError for formats that are not written.
    """
    side = max(image.height, image.width)
    if side > largest_side(format):
        raise ImageTooLarge(
            f"{image.width} x {image.height}: {format} holds at most {largest_side(format)} pixels a side; "
            f"choose png or tiff"
        )
    match format:
        case "jpeg":
            return jpeg.encode(_with_metadata_for(image, options).opaque(), options)
        case "png":
            deep = _at_most_16_bits(_with_metadata_for(image, options))
            return png.encode(deep, level=options.png_level)
        case "tiff":
            return tiff.encode(_with_metadata_for(image, options), options)
        case "ppm":
            return pnm.encode(_at_most_16_bits(image))
        case "gif":
            return encode_gif([Frame(image)], plays=1)
        case _:
            picture, fields = for_pillow(image, format, options)
            return _saved(picture, format, **fields)


def encode_png(pixels: np.ndarray, *, level: int = 1) -> bytes:
    """`pixels` (H, W, 1 or 3) uint8 as a bare PNG; `level` 0..9 as in `PngWriter`."""
    return png.encode(Image(pixels), level=level)


def decode_png(data: bytes) -> np.ndarray:
    """(H, W, 1 or 3) uint8 of a PNG that `encode_png` made. Raises ImageCorrupt."""
    if (own := png.decode_own(data)) is not None:
        return own
    with malformed_is_corrupt():
        picture = _open(data, "png")
        picture.load()
    if picture.mode not in ("L", "RGB"):
        raise ImageCorrupt(f"expected a grey or RGB PNG of 8 bits, found mode {picture.mode}")
    return _three_axes(np.asarray(picture))


# ---------------------------------------------------------------- reading


@contextmanager
def malformed_is_corrupt() -> Iterator[None]:
    """What parsers raise on broken bytes is an ImageCorrupt."""
    try:
        yield
    except _MALFORMED as error:
        raise ImageCorrupt(f"broken or cut off: {error or type(error).__name__}") from error
    except MemoryError:
        raise ImageTooLarge("its header asks for more memory than there is") from None


def _open(data: bytes, kind: str) -> ImageFile:
    """The header is read, the pixels are not."""
    try:
        picture = _READERS[kind](io.BytesIO(data))
    except SyntaxError as error:
        if str(error) == "unknown pixel mode":
            raise ImageUnsupported(
                f"{kind} of this kind is not read; save it as RGB of 8 or 16 bits"
            ) from None
        raise
    if min(picture.size) < 1:
        raise ImageCorrupt(f"the header announces {picture.size[0]} x {picture.size[1]} pixels")
    return picture


def _raw_mode(tile: Any) -> str:
    """Pillow's name for the samples as they lie in the file."""
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _deep_planes(data: bytes, picture: ImageFile, kind: str, raw_modes: set[str]) -> np.ndarray | None:
    """(H, W, 1..4) uint16 of a file of which Pillow would give the high bytes, None for every other file."""
    if kind in ("avif", "heic"):
        planes = _ten_bit_planes(data, picture, kind)
        return None if planes is None else _three_axes(planes)
    if raw_modes == {"LA;16B"}:
        split = _load_as(data, kind, lambda _: "RGBA")
        return _joined(split[:, :, 0::2], split[:, :, 1::2])
    if raw_modes and raw_modes <= _LOW_BYTES.keys():
        high = _load_as(data, kind, lambda raw_mode: raw_mode)
        return _joined(high, _load_as(data, kind, _LOW_BYTES.__getitem__))
    return None


def _ten_bit_planes(data: bytes, picture: ImageFile, kind: str) -> np.ndarray | None:
    bits = _bits_as_stored(data, picture, kind)
    if bits == 8 or getattr(picture, "n_frames", 1) > 1:
        return None
    if kind == "avif":
        return ten_bit.avif_planes(data, bits, picture.size)
    return ten_bit.heic_planes(data, bits)


def _bits_as_stored(data: bytes, picture: ImageFile, kind: str) -> int:
    """Of an AVIF or HEIC."""
    return ten_bit.avif_bits(data) if kind == "avif" else ten_bit.heic_bits(picture)


def _with_transparent_colour(planes: np.ndarray, picture: ImageFile) -> np.ndarray:
    """A 16-bit PNG's one colour that is transparent becomes alpha; Pillow does that for 8 bits."""
    colour = picture.info.get("transparency")
    if planes.dtype != np.uint16 or planes.shape[2] not in (1, 3) or colour is None:
        return planes
    alpha = np.where((planes == np.array(colour, np.uint16)).all(axis=2), 0, 65535)
    return np.dstack([planes, alpha.astype(np.uint16)])


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
    if picture.mode.startswith("I;16") or (picture.mode == "I" and raw_modes == {"I;16B"}):
        return _three_axes(_deep_grey(picture, raw_modes))
    if picture.mode == "CMYK":
        return np.asarray(_rgb_from_cmyk(picture))
    mode = _SIMPLER_MODE.get(picture.mode, picture.mode)
    if mode in ("P", "PA"):
        mode = "RGBA" if picture.has_transparency_data else "L" if _has_grey_palette(picture) else "RGB"
    elif mode in ("L", "RGB") and "transparency" in picture.info:
        if raw_modes <= _STRETCHED.keys() and raw_modes:
            picture.info["transparency"] *= _STRETCHED[raw_modes.pop()]
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    if mode not in ("L", "LA", "RGB", "RGBA"):
        raise ImageUnsupported(f"{picture.mode} pixels are not read; save it with 8 or 16 bits a sample")
    return _three_axes(np.asarray(picture if mode == picture.mode else picture.convert(mode)))


def _has_grey_palette(picture: ImageFile) -> bool:
    entries = np.array(picture.getpalette() or (), dtype=np.uint8).reshape(-1, 3)
    counts = picture.histogram()[: len(entries)]
    used = entries[np.flatnonzero(counts)]
    return len(used) > 0 and bool((used == used[:, :1]).all())


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
    colours, alpha = np.ascontiguousarray(planes[:, :, :-1]), np.ascontiguousarray(planes[:, :, -1])
    return Image(colours, alpha=alpha, icc_profile=icc_profile)


def _bits(data: bytes, picture: ImageFile, kind: str) -> int:
    """Of a sample when it is decoded."""
    if kind in ("avif", "heic"):
        return 8 if _bits_as_stored(data, picture, kind) == 8 else 16
    if picture.mode.startswith("I") or {_raw_mode(tile) for tile in picture.tile} & {*_LOW_BYTES, "LA;16B"}:
        return 16
    return 8


def composed_frames(picture: Any) -> Iterator[Image]:
    """Each picture of an animation that Pillow composes, upright, in 8 bits. `picture` stands at it."""
    turn, described = metadata.orientation(picture), metadata.described(picture)
    for number in range(picture.n_frames):
        picture.seek(number)
        picture.load()
        image = _image(_three_axes(np.asarray(picture)), picture.info.get("icc_profile"))
        yield replace(image, **described).turned(turn)


# ---------------------------------------------------------------- writing


def _with_metadata_for(image: Image, options: EncodeConfig) -> Image:
    """EXIF and XMP of this size, or none of them."""
    if options.metadata == "strip":
        return replace(image, exif=None, xmp=None, dpi=None)
    size = {"height": image.height, "width": image.width}
    exif = metadata.sized_exif(image.exif, **size)
    if exif is not None and metadata.has_preview(image.exif):
        exif = with_preview(exif, _preview(image))
    return replace(image, exif=exif, xmp=metadata.sized_xmp(image.xmp, **size))


def _preview(image: Image) -> bytes:
    """A small JPEG of the picture, in sRGB."""
    step = max(1, max(image.height, image.width) // (4 * _PREVIEW_SIDE))
    small = Image(
        image.pixels[::step, ::step],
        alpha=None if image.alpha is None else image.alpha[::step, ::step],
        icc_profile=image.icc_profile,
    )
    picture = _picture(to_srgb(small.opaque()))
    picture.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    return _saved(picture, "jpeg", quality=_PREVIEW_QUALITY)


def _at_most_16_bits(image: Image) -> Image:
    return image.sixteen_bit() if image.pixels.dtype == np.float32 else image


def _picture(image: Image) -> PIL.Image.Image:
    """Mode L, LA, RGB or RGBA."""
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    return PIL.Image.fromarray(planes[:, :, 0] if planes.shape[2] == 1 else planes)


def for_pillow(image: Image, kind: str, options: EncodeConfig) -> tuple[PIL.Image.Image, dict[str, Any]]:
    """The picture in 8 bits, and all that has to be said to save it as WebP, AVIF or BMP."""
    image = _with_metadata_for(image, options)
    image = image.opaque() if kind == "bmp" else image.eight_bit()
    if kind == "bmp":
        return _picture(to_srgb(image)), _kept(dpi=image.dpi)
    if kind == "avif" and image.exif is not None:
        # Pillow would take it out itself, and write the rest in its own way.
        image = replace(image, exif=without_field(image.exif, Base.Orientation))
    if kind == "webp" and profile_space(image.icc_profile or b"") == "GRAY":
        image = to_srgb(image)  # it has no grey pixels that the profile would fit
    return _picture(image), {
        **_quality(kind, options, is_grey=image.pixels.shape[2] == 1),
        **_kept(icc_profile=image.icc_profile, exif=image.exif, xmp=image.xmp),
    }


def _quality(kind: str, options: EncodeConfig, *, is_grey: bool) -> dict[str, Any]:
    if kind == "webp":
        return {"quality": options.quality, "lossless": options.lossless}
    is_without_colours = kind == "avif" and is_grey
    return {
        "quality": options.quality,
        "subsampling": "4:0:0" if is_without_colours else options.subsampling,
    }


def _kept(**fields: Any) -> dict[str, Any]:
    """The fields that are there."""
    return {name: value for name, value in fields.items() if value}


def _saved(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
