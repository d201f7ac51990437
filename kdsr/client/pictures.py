"""Pictures of the caller's own kind to what is sent, and results back to the same kind."""

import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from kdsr.errors import RequestError

ANY_SIZE = 2**62
_SAVED_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
"""As PNG holds them."""
_SAVED_AS = dict.fromkeys(("CMYK", "YCbCr", "HSV", "LAB", "RGBX"), "RGB") | {
    "PA": "RGBA",
    "RGBa": "RGBA",
    "La": "LA",
}
_SUFFIX = {"jpeg": ".jpg", "tiff": ".tif", "x-portable-pixmap": ".ppm"}


@dataclass(frozen=True)
class Outgoing:
    """What is sent for a picture."""

    body: bytes | Path
    """A path is read while it is sent."""
    back: Callable[[bytes], Any]
    """Makes a result of the caller's kind."""
    name: str
    """For messages."""
    format: str | None = None
    """Of the result, where the caller's kind needs one."""


def outgoing(picture: Any) -> Outgoing:
    """What is sent for a path, bytes, a PIL picture or an array. Takes time: it may encode.

    Arrays are RGB, not BGR: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with alpha; uint8, uint16, or float32
    in [0, 1], which travels with 16 bits. Raises RequestError for anything else.
    """
    if isinstance(picture, str | Path):
        return _of_file(Path(picture))
    if isinstance(picture, bytes | bytearray | memoryview):
        return Outgoing(bytes(picture), _unchanged, f"{len(picture)} bytes")
    if isinstance(picture, PIL.Image.Image):
        return _of_picture(picture)
    if isinstance(picture, np.ndarray):
        return _of_array(picture)
    raise RequestError(
        f"expected a path, bytes, a PIL.Image.Image or a numpy array, found {type(picture).__name__}"
    )


def _of_file(path: Path) -> Outgoing:
    if not path.is_file():
        raise RequestError(f"{path}: expected the path of an image file, found none; check the path")
    return Outgoing(path, _unchanged, str(path))


def _unchanged(data: bytes) -> bytes:
    return data


def _of_picture(picture: PIL.Image.Image) -> Outgoing:
    """PNG without EXIF: the pixels in memory are upright already, or meant as they are."""
    if picture.mode not in _SAVED_MODES and picture.mode not in _SAVED_AS:
        raise RequestError(
            f"expected a picture of 8 bits or of mode I;16, found mode {picture.mode}; convert it"
        )
    saved = picture if picture.mode in _SAVED_MODES else picture.convert(_SAVED_AS[picture.mode])
    buffer = io.BytesIO()
    # The first of several frames: a picture in memory is one picture.
    saved.save(buffer, "PNG", compress_level=1, exif=b"")
    return Outgoing(buffer.getvalue(), _opened, f"{picture.mode} picture {picture.size}", "png")


def _opened(data: bytes) -> PIL.Image.Image:
    picture = PIL.Image.open(io.BytesIO(data))
    picture.load()
    return picture


def _of_array(array: np.ndarray) -> Outgoing:
    from kdsr import codecs
    from kdsr.image import Image

    planes = array[:, :, None] if array.ndim == 2 else array
    if planes.ndim != 3 or planes.shape[2] not in (1, 3, 4) or array.size == 0:
        raise RequestError(
            f"expected an array (H, W), or (H, W, 1, 3 or 4) in the order RGB and alpha, found {array.shape}"
        )
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise RequestError(f"expected uint8, uint16, or float32 in [0, 1], found {array.dtype}; convert it")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise RequestError("expected finite float32 in [0, 1], found NaN or infinity")
    alpha = np.ascontiguousarray(planes[:, :, 3]) if planes.shape[2] == 4 else None
    image = Image(np.ascontiguousarray(planes[:, :, : 3 if alpha is not None else None]), alpha)
    image = image.sixteen_bit() if array.dtype == np.float32 else image
    return Outgoing(
        codecs.encode(image, format="png"),
        lambda data: _array_like(array, data),
        f"{array.dtype} array {array.shape}",
        "png",
    )


def _array_like(given: np.ndarray, data: bytes) -> np.ndarray:
    """The PNG as an array of the given one's type, and with as many channels."""
    from kdsr import codecs

    image = codecs.decode(data, max_pixels=ANY_SIZE)
    channels = 1 if given.ndim == 2 else given.shape[2]
    pixels = image.pixels
    if channels >= 3 and pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if channels == 4:
        opaque = np.full(pixels.shape[:2], np.iinfo(pixels.dtype).max, pixels.dtype)
        pixels = np.dstack([pixels, opaque if image.alpha is None else image.alpha])
    if given.dtype == np.float32:
        pixels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    return pixels[:, :, 0] if given.ndim == 2 else pixels


def temporary(folder: Path) -> Path:
    """A new name in `folder`, which must exist; moving from there to a final name is atomic.

    Raises RequestError.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: expected a folder for the result, found none; make it")
    return folder / f".kdsr-{uuid.uuid4().hex}"


def result_path(source: Path, output: Path | None, *, media_type: str, scale: str) -> Path:
    """Where the result for `source` goes: to the file `output`, into that folder, or beside the source."""
    if output is not None and not output.is_dir():
        return output
    kind = media_type.partition(";")[0].strip().removeprefix("image/")
    name = f"{source.stem}_x{scale}{_SUFFIX.get(kind, f'.{kind}')}"
    return (output or source.parent) / name
