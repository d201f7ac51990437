"""Animations and documents of several pages: all their frames, one at a time, and back.

A frame of an animation is what is seen at its time, the whole canvas. Pages may differ in size and depth.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
from PIL.AvifImagePlugin import AvifImageFile

from kdsr.codecs import animated_webp, apng, raster, tiff_pages
from kdsr.codecs.formats import ImageHeader, identify, largest_side
from kdsr.codecs.gif import GifScanner, canvas_size, decode_gif, encode_gif
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt, ImageTooLarge, ImageUnsupported
from kdsr.image import Frame, Image

MOST_FRAMES = 100_000
"""Counting stops here; nobody wants more, and hostile files claim it."""

HOLD_FRAMES = frozenset({"gif", "png", "webp", "tiff", "avif"})
"""Formats of several frames."""


def count_frames(
    data: bytes,
    format: str,  # noqa: A002 the word of the jobs' flags
    *,
    at_most: int = MOST_FRAMES,
) -> tuple[int, int]:
    """(frames, plays) of a file of this format; 0 plays are for ever, and what pages and stills have.

    No pixel is decoded. Raises ImageCorrupt for a file that ends too early, so that a part of an animation
    is never taken for all of it, and for pages that follow each other in a circle; ImageTooLarge above
    `at_most`, where counting stops.
    """
    count = _COUNTERS.get(format)
    with raster.malformed_is_corrupt():
        frames, plays = (1, 0) if count is None else count(data, at_most)
    if frames > at_most:
        raise ImageTooLarge(f"the file has more than {at_most} frames; at most as many are read")
    return frames, plays


def with_pages(header: ImageHeader, data: bytes) -> ImageHeader:
    """`header`, that of the first page, with what all pages of a TIFF have."""
    pages = tiff_pages.scan_pages(data, at_most=header.frames)
    pixels = tuple(page.height * page.width for page in pages)
    return replace(header, page_pixels=pixels, bits=max(header.bits, *(page.bits for page in pages)))


def _count_gif(data: bytes, at_most: int) -> tuple[int, int]:
    scanner = GifScanner(data)
    frames = sum(1 for _ in islice(scanner.frames(), at_most + 1))
    return (frames, scanner.plays) if frames > 1 else (1, 0)


def _count_png(data: bytes, _at_most: int) -> tuple[int, int]:
    return apng.announced_frames(data)


def _count_webp(data: bytes, at_most: int) -> tuple[int, int]:
    structure = animated_webp.scan(data, at_most=at_most)
    if structure is None or len(structure.boxes) < 2:
        return 1, 0
    return len(structure.boxes), structure.plays


def _count_tiff(data: bytes, at_most: int) -> tuple[int, int]:
    return len(tiff_pages.scan_pages(data, at_most=at_most)), 0


def _count_avif(data: bytes, _at_most: int) -> tuple[int, int]:
    """Pillow does not tell how often it is shown."""
    if b"avis" not in data[8:64]:
        return 1, 0
    return int(_open_avif(data).n_frames), 0


_COUNTERS: dict[str, Callable[[bytes, int], tuple[int, int]]] = {
    "gif": _count_gif,
    "png": _count_png,
    "webp": _count_webp,
    "tiff": _count_tiff,
    "avif": _count_avif,
}


# ---------------------------------------------------------------- reading


def decode_frames(data: bytes, *, max_pixels: int, max_frames: int) -> Iterator[Frame]:
    """All frames or pages, upright, each decoded when it is asked for; a still image is one frame.

    Raises ImageTooLarge at once, before anything is decoded, for more than `max_frames` frames or
    `max_pixels` pixels in one. Raises ImageCorrupt and ImageUnsupported, later ones while iterating.
    """
    kind = identify(data)
    frames, _ = count_frames(data, kind)
    if frames > max_frames:
        raise ImageTooLarge(
            f"{frames} frames are more than max_frames {max_frames}; raise it if they are wanted"
        )
    read = _READERS[kind] if frames > 1 or kind == "gif" else _read_still
    with raster.malformed_is_corrupt():
        return _guarded(read(data, max_pixels))


def _guarded(frames: Iterator[Frame]) -> Iterator[Frame]:
    with raster.malformed_is_corrupt():
        yield from frames


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise ImageTooLarge(
            f"{width} x {height} pixels are more than max_pixels {max_pixels}; "
            f"raise it if the image is wanted"
        )


def _read_still(data: bytes, max_pixels: int) -> Iterator[Frame]:
    kind = identify(data)
    header = raster.probe(data, kind)
    _check_size(header.height, header.width, max_pixels)
    return (Frame(raster.decode(data, kind)) for _ in range(1))


def _read_gif(data: bytes, max_pixels: int) -> Iterator[Frame]:
    _check_size(*canvas_size(data), max_pixels)
    for frame in GifScanner(data).frames():
        _check_size(frame.box.height, frame.box.width, max_pixels)
    return decode_gif(data)


def _read_png(data: bytes, max_pixels: int) -> Iterator[Frame]:
    structure = apng.scan(data)
    _check_size(structure.height, structure.width, max_pixels)
    return apng.decode_apng(data, structure)


def _read_webp(data: bytes, max_pixels: int) -> Iterator[Frame]:
    structure = animated_webp.scan(data, at_most=MOST_FRAMES)
    assert structure is not None, "count_frames found several frames"
    _check_size(structure.height, structure.width, max_pixels)
    for box in structure.boxes:
        _check_size(box.height, box.width, max_pixels)
    return animated_webp.decode_webp(data, structure)


def _read_tiff(data: bytes, max_pixels: int) -> Iterator[Frame]:
    pages = tiff_pages.scan_pages(data, at_most=MOST_FRAMES)
    for page in pages:
        _check_size(page.height, page.width, max_pixels)
    return (_page(data, page, max_pixels) for page in pages)


def _page(data: bytes, page: tiff_pages.Page, max_pixels: int) -> Frame:
    alone = tiff_pages.starting_at(data, page)
    header = raster.probe(alone, "tiff")
    _check_size(header.height, header.width, max_pixels)
    # What was let in by its directory is not to be larger.
    if header.height * header.width != page.height * page.width:
        raise ImageCorrupt(
            f"the TIFF directory at byte {page.offset} tells its size otherwise than as two whole numbers"
        )
    return Frame(raster.decode(alone, "tiff"))


def _read_avif(data: bytes, max_pixels: int) -> Iterator[Frame]:
    picture = _open_avif(data)
    _check_size(picture.height, picture.width, max_pixels)
    return _avif_frames(picture)


def _open_avif(data: bytes) -> Any:
    return AvifImageFile(io.BytesIO(data))


def _avif_frames(picture: Any) -> Iterator[Frame]:
    """8 bits. Times are in milliseconds."""
    for image in raster.composed_frames(picture):
        yield Frame(image, picture.info["duration"] / 1000)


_READERS: dict[str, Callable[[bytes, int], Iterator[Frame]]] = {
    "gif": _read_gif,
    "png": _read_png,
    "webp": _read_webp,
    "tiff": _read_tiff,
    "avif": _read_avif,
}


# ---------------------------------------------------------------- writing


def encode_frames(
    frames: Iterable[Frame],
    *,
    format: str,  # noqa: A002 the word of the jobs' flags
    loop: int,
    options: EncodeConfig = EncodeConfig(),
) -> bytes:
    """One file of all frames, shown `loop` times, 0 for ever; times and transparency are kept.

    GIF, APNG and WebP hold the file and at most two frames, TIFF the file twice, AVIF all frames.
    Raises ImageUnsupported for other formats, no frame, and frames that do not fit together,
    ImageTooLarge for more pixels a side than the format holds.
    """
    if format not in HOLD_FRAMES:
        raise ImageUnsupported(f"{format} holds no frames; choose one of {', '.join(sorted(HOLD_FRAMES))}")
    rest = _fitting(frames, format)
    first = next(rest, None)
    if first is None:
        raise ImageUnsupported("there is no frame to write")
    everything = chain([first], rest)
    if format == "tiff":
        pages = [raster.encode(frame.image, format="tiff", options=options) for frame in everything]
        return pages[0] if len(pages) == 1 else tiff_pages.join_pages(pages)
    alike = (replace(frame, image=_like(frame.image, first.image)) for frame in everything)
    if format == "gif":
        return encode_gif(alike, plays=loop)
    if format == "png":
        return apng.encode_apng(alike, plays=loop, options=options)
    if format == "webp":
        return animated_webp.encode_webp(alike, plays=loop, options=options)
    return _encode_avif(alike, options)


def _fitting(frames: Iterable[Frame], kind: str) -> Iterator[Frame]:
    """The frames as they come. Raises ImageTooLarge."""
    side = largest_side(kind)
    for frame in frames:
        width, height = frame.image.width, frame.image.height
        if max(width, height) > side:
            raise ImageTooLarge(
                f"{width} x {height}: {kind} holds at most {side} pixels a side; choose png or tiff"
            )
        yield frame


def _like(image: Image, first: Image) -> Image:
    """`image` with the depth and the channels of `first`. Raises ImageUnsupported when it has more."""
    if (image.height, image.width) != (first.height, first.width):
        raise ImageUnsupported(
            f"frames of {first.width} x {first.height} and {image.width} x {image.height} pixels cannot be "
            f"one animation; choose tiff"
        )
    if image.pixels.shape[2] > first.pixels.shape[2] or (image.alpha is not None and first.alpha is None):
        raise ImageUnsupported(
            "a later frame has colours or transparency that the first has not; choose tiff"
        )
    if image.pixels.dtype != first.pixels.dtype:
        raise ImageUnsupported(
            f"frames of {first.pixels.dtype} and {image.pixels.dtype} cannot be one animation; choose tiff"
        )
    alpha, pixels = image.alpha, image.pixels
    if first.alpha is not None and alpha is None:
        opaque = 1 if pixels.dtype == np.float32 else np.iinfo(pixels.dtype).max
        alpha = np.full(pixels.shape[:2], opaque, pixels.dtype)
    if pixels.shape[2] < first.pixels.shape[2]:
        pixels = np.repeat(pixels, 3, axis=2)
    return replace(image, pixels=pixels, alpha=alpha)


def _encode_avif(frames: Iterable[Frame], options: EncodeConfig) -> bytes:
    """8 bits; Pillow wants all frames at once."""
    pictures, times = [], []
    seconds, milliseconds = 0.0, 0
    fields: dict[str, Any] = {}
    for frame in frames:
        picture, fields_of_frame = raster.for_pillow(frame.image, "avif", options)
        fields = fields or fields_of_frame
        seconds += frame.seconds
        times.append(round(seconds * 1000) - milliseconds)
        milliseconds += times[-1]
        pictures.append(picture)
    file = io.BytesIO()
    pictures[0].save(file, "AVIF", save_all=True, append_images=pictures[1:], duration=times, **fields)
    return file.getvalue()
