"""Single pictures of every format: Pillow, tifffile for deep TIFF, libheif for HEIC, our own PNG writer."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import tifffile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ExifTags import Base
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pillow_heif import HeifImageFile

from kdsr.codecs import metadata, png
from kdsr.codecs.colour import convert_to_srgb, profile_space, to_srgb
from kdsr.codecs.formats import ImageHeader, largest_side
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt, ImageTooLarge, ImageUnsupported
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
    "avif": AvifImageFile,
    "heic": HeifImageFile,
    "gif": GifImageFile,
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

# Formats without colour profiles: their results are in sRGB.
_WITHOUT_PROFILE = ("gif", "bmp", "ppm")
_LARGEST_JPEG_SEGMENT = 65_000

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
        deep = _deep_page(data) if kind == "tiff" else None
        if deep is not None:
            height, width = deep.shape[:2] if deep.planarconfig == 1 else deep.shape[-2:]
            turned = _tiff_orientation(deep) >= 5
            bits = 8 * _sample_type(deep.dtype).itemsize
            return ImageHeader(kind, *((width, height) if turned else (height, width)), bits=bits)
        picture = _open(data, kind)
        width, height = picture.size
        bits = _bits(data, picture, kind)
    if kind in ("jpeg", "webp", "avif") or (kind == "png" and "exif" in picture.info):
        height, width = (width, height) if metadata.orientation(picture) >= 5 else (height, width)
    return ImageHeader(kind, height, width, bits=bits)


def decode(data: bytes, kind: str) -> Image:
    """The first frame, upright, 8 or 16 bits or floating point as in the file; CMYK comes out in sRGB."""
    with _malformed_is_corrupt():
        if kind == "ppm" and data[:2] in (b"P5", b"P6"):
            return Image(_pnm_planes(data))
        deep = _deep_page(data) if kind == "tiff" else None
        if deep is not None:
            return _decode_deep_tiff(data, deep)
        picture = _open(data, kind)
        raw_modes = {_raw_mode(tile) for tile in picture.tile}
        planes = _deep_planes(data, kind, raw_modes)
        picture.load()
        if planes is None:
            planes = _planes(picture, raw_modes)
    # CMYK has been through its profile already.
    icc_profile = None if picture.mode == "CMYK" else picture.info.get("icc_profile")
    return _upright(_image(planes, icc_profile), picture, kind)


def encode(image: Image, *, format: str, options: EncodeConfig = EncodeConfig()) -> bytes:  # noqa: A002 the flags' word
    """The file's bytes in the depth that the format holds, with ICC profile, EXIF, XMP and resolution.

    PNG and PPM hold 16 bits, TIFF floating point too, the others 8. JPEG has no alpha: over white, and so
    BMP and PPM. GIF, BMP and PPM have no profiles: in sRGB. Raises ImageTooLarge for more pixels a side than
    the format holds, RequestError for formats that are not written.
    """
    side = max(image.height, image.width)
    if side > largest_side(format):
        raise ImageTooLarge(
            f"{image.width} x {image.height}: {format} holds at most {largest_side(format)} pixels a side; "
            f"choose png or tiff"
        )
    image = _with_metadata_for(image, options)
    match format:
        case "png":
            return png.encode(
                _at_most_16_bits(image), level=options.png_level, exif=image.exif, xmp=image.xmp
            )
        case "tiff":
            return _encode_tiff(image, options)
        case "ppm":
            return _encode_pnm(_at_most_16_bits(image))
        case _:
            return _encode_with_pillow(image, format, options)


def encode_png(pixels: np.ndarray, *, level: int = 1) -> bytes:
    """`pixels` (H, W, 1 or 3) uint8 as a bare PNG; `level` 0..9 as in `PngWriter`."""
    return png.encode(Image(pixels), level=level)


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
        raise ImageCorrupt(f"broken or cut off: {error or type(error).__name__}") from error
    except MemoryError:
        raise ImageTooLarge("its header asks for more memory than there is") from None


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
    if picture.mode.startswith("I;16") or (picture.mode == "I" and raw_modes == {"I;16B"}):
        return _three_axes(_deep_grey(picture, raw_modes))
    if picture.mode == "CMYK":
        return np.asarray(_rgb_from_cmyk(picture))
    mode = _SIMPLER_MODE.get(picture.mode, picture.mode)
    if mode in ("P", "PA"):
        mode = "RGBA" if picture.has_transparency_data else "L" if _has_grey_palette(picture) else "RGB"
    elif mode in ("L", "RGB") and "transparency" in picture.info:
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
    return Image(planes[:, :, :-1], alpha=planes[:, :, -1], icc_profile=icc_profile)


def _bits(data: bytes, picture: ImageFile, kind: str) -> int:
    """Of a sample when it is decoded."""
    if kind == "ppm" and data[:2] in (b"P5", b"P6"):
        return 16 if _pnm_header(data)[2] > 255 else 8
    if picture.mode.startswith("I") or {_raw_mode(tile) for tile in picture.tile} & {*_LOW_BYTES, "LA;16B"}:
        return 16
    return 8


# ---------------------------------------------------------------- PPM and PGM in binary


def _pnm_header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, largest value, and where the samples begin. Comments run to the end of a line."""
    fields: list[int] = []
    at = 2
    while len(fields) < 3:
        while data[at : at + 1].isspace():
            at += 1
        end = at
        if data[at : at + 1] == b"#":
            at = data.index(b"\n", at)
            continue
        while data[end : end + 1].isdigit():
            end += 1
        fields.append(int(data[at : min(end, at + 10)]))
        at = end
    width, height, largest = fields
    if not 1 <= largest <= 65535:
        raise ValueError(f"its largest value is {largest}; expected 1 to 65535")
    return width, height, largest, at + 1


def _pnm_planes(data: bytes) -> np.ndarray:
    """(H, W, 1 or 3) uint8 or uint16 over the whole range."""
    width, height, largest, begin = _pnm_header(data)
    channels = 3 if data[:2] == b"P6" else 1
    kind = np.dtype(np.uint8 if largest < 256 else ">u2")
    values = np.frombuffer(data, kind, count=height * width * channels, offset=begin)
    planes = values.reshape(height, width, channels).astype(kind.newbyteorder("="))
    full = 255 if largest < 256 else 65535
    if largest != full:
        scaled = (np.minimum(planes, largest).astype(np.uint32) * full + largest // 2) // largest
        planes = scaled.astype(planes.dtype)
    return planes


def _encode_pnm(image: Image) -> bytes:
    image = _in_srgb(_over_white(image))
    deep = image.pixels.dtype == np.uint16
    magic = "P6" if image.pixels.shape[2] == 3 else "P5"
    header = f"{magic}\n{image.width} {image.height}\n{65535 if deep else 255}\n".encode()
    return header + (image.pixels.astype(">u2") if deep else image.pixels).tobytes()


# ---------------------------------------------------------------- deep TIFF


def _deep_page(data: bytes) -> Any:
    """The first page as tifffile has it, when Pillow would lose 16-bit or floating-point samples; or None."""
    page: Any = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    is_deep = page.dtype is not None and (
        (page.dtype == np.uint16 and page.bitspersample == 16) or page.dtype.kind == "f"
    )
    is_plain = page.photometric in (0, 1, 2) and page.samplesperpixel in (1, 2, 3, 4) and page.imagedepth == 1
    return page if is_deep and is_plain and min(page.imagelength, page.imagewidth) > 0 else None


_ICC_TAG = 34675


def _sample_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint16) if dtype == np.uint16 else np.dtype(np.float32)


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(Base.Orientation)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _decode_deep_tiff(data: bytes, page: Any) -> Image:
    values = page.asarray()
    if page.samplesperpixel > 1 and page.planarconfig == 2:
        values = np.moveaxis(values, 0, -1)
    planes = _three_axes(np.ascontiguousarray(values, dtype=_sample_type(page.dtype)))
    if not np.isfinite(planes).all():
        raise ImageUnsupported("it has NaN or infinite pixels; replace them first")
    if page.photometric == 0:
        planes = 65535 - planes if planes.dtype == np.uint16 else 1 - planes
    turn = _tiff_orientation(page)
    if turn != 1:
        planes = _turned(planes, turn)
    if planes.shape[2] in (2, 4) and page.extrasamples and page.extrasamples[0] == 1:
        planes = _unassociated(planes)
    icc = page.tags.get(_ICC_TAG)
    image = _image(planes, bytes(icc.value) if icc is not None else None)
    with _described_by_pillow(data) as picture:
        if picture is None:
            return image
        return replace(
            image,
            exif=metadata.read_exif(picture, is_tiff=True),
            xmp=metadata.read_xmp(picture),
            dpi=metadata.read_dpi(picture),
        )


@contextmanager
def _described_by_pillow(data: bytes) -> Iterator[ImageFile | None]:
    """Pillow's view of a TIFF, whose tags it reads well; None for samples that it does not know."""
    try:
        picture = TiffImageFile(io.BytesIO(data))
    except _MALFORMED:
        yield None
    else:
        yield picture


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


_TIFF_COMPRESSION = {"deflate": "adobe_deflate", "lzw": "lzw", "none": None}
_PILLOW_COMPRESSION = {"deflate": "tiff_adobe_deflate", "lzw": "tiff_lzw", "none": None}


def _encode_tiff(image: Image, options: EncodeConfig) -> bytes:
    """8 bits through Pillow, deeper ones through tifffile. Of EXIF only the main tags are kept."""
    if image.pixels.dtype == np.uint8:
        tags = metadata.main_tags(image.exif)
        if image.xmp:
            tags[Base.XMLPacket] = image.xmp
        if options.tiff_compression != "none":
            tags[Base.Predictor] = 2
        return _saved(
            _picture(image),
            "tiff",
            compression=_PILLOW_COMPRESSION[options.tiff_compression],
            exif=tags,
            **_kept(icc_profile=image.icc_profile, dpi=image.dpi),
        )
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    compressed = options.tiff_compression != "none"
    file = io.BytesIO()
    texts = metadata.texts(image.exif)
    extratags: list[Any] = [(tag, 2, 0, text, True) for tag, text in texts.items() if text.isascii()]
    if image.xmp:
        extratags.append((int(Base.XMLPacket), 1, len(image.xmp), image.xmp, True))
    tifffile.imwrite(
        file,
        planes[:, :, 0] if planes.shape[2] == 1 else planes,
        photometric="rgb" if image.pixels.shape[2] == 3 else "minisblack",
        planarconfig="contig" if planes.shape[2] > 1 else None,
        extrasamples=["unassalpha"] if image.alpha is not None else None,
        compression=_TIFF_COMPRESSION[options.tiff_compression],
        predictor=compressed,
        iccprofile=image.icc_profile,
        resolution=image.dpi,
        resolutionunit=2 if image.dpi else None,
        metadata=None,
        software=False,
        extratags=extratags,
        bigtiff=planes.nbytes > 4 * 10**9,
        rowsperstrip=max(1, 2**20 // (planes.nbytes // planes.shape[0])),
    )
    return file.getvalue()


# ---------------------------------------------------------------- orientation


def _upright(image: Image, picture: ImageFile, kind: str) -> Image:
    """Turned as its EXIF says, and with all that the file tells beside the pixels."""
    turn = metadata.orientation(picture) if kind in _TURNED_BY_EXIF else 1
    image = replace(
        image,
        exif=metadata.read_exif(picture, is_tiff=kind == "tiff"),
        xmp=metadata.read_xmp(picture),
        dpi=metadata.read_dpi(picture),
    )
    if turn == 1:
        return image
    alpha = None if image.alpha is None else _turned(image.alpha, turn)
    dpi = (image.dpi[1], image.dpi[0]) if image.dpi and _UPRIGHT[turn][0] else image.dpi
    return replace(image, pixels=_turned(image.pixels, turn), alpha=alpha, dpi=dpi)


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    transpose, flip_rows, flip_columns = _UPRIGHT[orientation]
    array = array.swapaxes(0, 1) if transpose else array
    array = array[::-1] if flip_rows else array
    return np.ascontiguousarray(array[:, ::-1] if flip_columns else array)


# ---------------------------------------------------------------- writing


def _with_metadata_for(image: Image, options: EncodeConfig) -> Image:
    """EXIF and XMP of this size, or none of them."""
    if options.metadata == "strip":
        return replace(image, exif=None, xmp=None, dpi=None)
    size = {"height": image.height, "width": image.width}
    return replace(
        image, exif=metadata.sized_exif(image.exif, **size), xmp=metadata.sized_xmp(image.xmp, **size)
    )


def _at_most_16_bits(image: Image) -> Image:
    return image.sixteen_bit() if image.pixels.dtype == np.float32 else image


def _over_white(image: Image) -> Image:
    """Without alpha, in 8 bits only where there was one."""
    return image if image.alpha is None else image.opaque()


def _in_srgb(image: Image) -> Image:
    return image if image.icc_profile is None else to_srgb(image)


def _picture(image: Image) -> PIL.Image.Image:
    """Mode L, LA, RGB or RGBA."""
    planes = image.pixels
    if image.alpha is not None:
        planes = np.concatenate([planes, image.alpha[:, :, None]], axis=2)
    return PIL.Image.fromarray(planes[:, :, 0] if planes.shape[2] == 1 else planes)


def _encode_with_pillow(image: Image, kind: str, options: EncodeConfig) -> bytes:
    """JPEG, WebP, AVIF, GIF and BMP: 8 bits."""
    image = image.opaque() if kind in ("jpeg", "bmp") else image.eight_bit()
    if kind in _WITHOUT_PROFILE:
        return _saved(_picture(_in_srgb(image)), kind, **_kept(dpi=image.dpi if kind == "bmp" else None))
    if kind != "jpeg" and profile_space(image.icc_profile or b"") == "GRAY":
        image = to_srgb(image)  # WebP and AVIF have no grey pixels that the profile would fit
    fits = kind != "jpeg"
    return _saved(
        _picture(image),
        kind,
        **_quality(kind, options),
        **_kept(
            icc_profile=image.icc_profile,
            exif=image.exif if fits or len(image.exif or b"") < _LARGEST_JPEG_SEGMENT else None,
            xmp=image.xmp if fits or len(image.xmp or b"") < _LARGEST_JPEG_SEGMENT else None,
            dpi=image.dpi if kind == "jpeg" else None,
        ),
    )


def _quality(kind: str, options: EncodeConfig) -> dict[str, Any]:
    match kind:
        case "jpeg":
            return {"quality": options.quality, "subsampling": options.subsampling}
        case "webp":
            return {"quality": options.quality, "lossless": options.lossless}
        case _:
            return {"quality": options.quality, "subsampling": options.subsampling}


def _kept(**fields: Any) -> dict[str, Any]:
    """The fields that are there."""
    return {name: value for name, value in fields.items() if value}


def _saved(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
