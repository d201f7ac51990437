"""Images larger than memory: read, upscaled, resized and written some rows at a time.

    rows of a TIFF (or of a decoded image) -> bands of tiles -> the resize, if any -> BigTIFF or PNG file

The bytes of the pixels are those that the whole image would give. Knows local files only.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Protocol, TypeVar

import imagecodecs
import numpy as np
import tifffile
from isal import isal_zlib

from kdsr.codecs import tiff
from kdsr.codecs.metadata import sized_exif, sized_xmp
from kdsr.codecs.png import PngWriter, metadata_chunks
from kdsr.config import EncodeConfig
from kdsr.errors import ImageCorrupt
from kdsr.image import Image
from kdsr.resize import joined, resize_rows
from kdsr.upscale import UNIT, Levels, Upscaler, levels_of, range_of

IN_MEMORY_PIXELS = 256_000_000
"""Results with more pixels are made in windows, where their format allows it."""

FORMATS = ("tiff", "png")
"""Formats that are written row by row."""

TIFF_TILE = 512
"""Height and width of a tile of the TIFF that is written."""

KEPT_SEGMENT_ROWS = 3
"""Rows of tiles, or strips, of the input that stay decoded, since bands overlap."""

Item = TypeVar("Item")


class RowSource(Protocol):
    """An image whose rows can be asked for."""

    height: int
    width: int
    has_alpha: bool
    is_float: bool

    def rows(self, top: int, bottom: int) -> Image:
        """The rows from `top` to just above `bottom`, with the metadata of the image."""


class ArrayRows:
    """Rows of an image in memory."""

    def __init__(self, image: Image) -> None:
        self.height, self.width = image.height, image.width
        self.has_alpha = image.alpha is not None
        self.is_float = image.pixels.dtype == np.float32
        self._image = image

    def rows(self, top: int, bottom: int) -> Image:
        """A view of the rows."""
        alpha = None if self._image.alpha is None else self._image.alpha[top:bottom]
        return replace(self._image, pixels=self._image.pixels[top:bottom], alpha=alpha)


class TiffRows:
    """Rows of the first page of a TIFF, read from its strips or tiles when they are asked for.

    Holds `KEPT_SEGMENT_ROWS` rows of decoded tiles, or strips; a TIFF with all its pixels in one strip is
    held whole. For pages that `can_read` accepts.
    """

    def __init__(self, file: tifffile.TiffFile, metadata: Image | None = None) -> None:
        page = file.pages.first
        self._page, self._tiff = page, file
        self._file = file.filehandle
        self.bits = 8 * page.dtype.itemsize
        self.height, self.width = page.imagelength, page.imagewidth
        self.has_alpha = page.samplesperpixel in (2, 4)
        self.is_float = page.dtype == np.float32
        self._metadata = metadata or _described_pixel(page)
        self._segment_height = page.tilelength if page.is_tiled else page.rowsperstrip
        self._per_row = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def pages(self) -> int:
        """How many images the file has."""
        return len(self._tiff.pages)

    def rows(self, top: int, bottom: int) -> Image:
        """Decode what is not decoded yet. Raises ImageCorrupt."""
        first, last = top // self._segment_height, (bottom - 1) // self._segment_height
        planes = np.concatenate([self._segment_row(index) for index in range(first, last + 1)])
        start = top - first * self._segment_height
        planes = planes[start : start + bottom - top]
        if not self.has_alpha:
            return replace(self._metadata, pixels=planes)
        return replace(
            self._metadata, pixels=np.ascontiguousarray(planes[:, :, :-1]), alpha=planes[:, :, -1].copy()
        )

    def _segment_row(self, index: int) -> np.ndarray:
        """(h, W, C): one strip, or the tiles that lie side by side."""
        if index not in self._decoded:
            while len(self._decoded) >= KEPT_SEGMENT_ROWS:
                self._decoded.popitem(last=False)
            height = min(self._segment_height, self.height - index * self._segment_height)
            planes = np.empty((height, self.width, self._page.samplesperpixel), self._page.dtype)
            for column in range(self._per_row):
                self._decode_into(planes, index * self._per_row + column, column)
            self._decoded[index] = planes
        self._decoded.move_to_end(index)
        return self._decoded[index]

    def _decode_into(self, planes: np.ndarray, segment: int, column: int) -> None:
        page = self._page
        try:
            self._file.seek(page.dataoffsets[segment])
            data = self._file.read(page.databytecounts[segment])
            pixels, _, _ = page.decode(data, segment, jpegtables=page.jpegtables)
        except _MALFORMED as error:
            raise ImageCorrupt(f"broken or cut off: segment {segment} of the TIFF: {error}") from error
        if pixels is None:
            raise ImageCorrupt(f"segment {segment} of the TIFF is missing")
        left = column * page.tilewidth if page.is_tiled else 0
        place = planes[:, left : left + pixels.shape[2]]
        place[:] = pixels[0, : place.shape[0], : place.shape[1]]


# What tifffile and its codecs raise on broken bytes.
_MALFORMED = (OSError, ValueError, TypeError, LookupError, RuntimeError, tifffile.TiffFileError)

_UNASSOCIATED_ALPHA = 2


def open_tiff(file: BinaryIO) -> TiffRows | None:
    """The rows of a TIFF, or None when it is of a kind, or so broken, that `codecs` has to judge it."""
    file.seek(0)
    try:
        tiff = tifffile.TiffFile(file)
        return TiffRows(tiff) if can_read(tiff) else None
    except _MALFORMED:
        return None


def can_read(file: tifffile.TiffFile) -> bool:
    """Whether `TiffRows` reads its first page as `codecs.decode` would: plain grey or RGB, upright."""
    page = file.pages.first
    kind = (page.photometric, page.samplesperpixel, tuple(page.extrasamples))
    known = {
        (tifffile.PHOTOMETRIC.MINISBLACK, 1, ()),
        (tifffile.PHOTOMETRIC.RGB, 3, ()),
        (tifffile.PHOTOMETRIC.MINISBLACK, 2, (_UNASSOCIATED_ALPHA,)),
        (tifffile.PHOTOMETRIC.RGB, 4, (_UNASSOCIATED_ALPHA,)),
    }
    orientation = page.tags.get("Orientation")
    return (
        kind in known
        and page.dtype in (np.uint8, np.uint16, np.float32)
        and page.bitspersample == 8 * page.dtype.itemsize
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and page.fillorder == 1
        and (orientation is None or orientation.value == 1)
        and len(page.dataoffsets) > 0
    )


def _described_pixel(page: Any) -> Image:
    """One pixel with all that the page says about itself."""
    return tiff.described(Image(np.zeros((1, 1, 1), np.uint8), icc_profile=tiff.profile(page)), page)


# ---------------------------------------------------------------- upscaling


def upscaled_rows(source: RowSource, upscaler: Upscaler, target: tuple[int, int]) -> Iterator[Image]:
    """Bands of the result of `target` size, from the top down, one of them made ahead."""
    scale = upscaler.engine.scale
    size = source.height * scale, source.width * scale
    bands = _ahead(_upscaled_bands(source, upscaler))
    return bands if size == target else resize_rows(bands, size, target)


def _upscaled_bands(source: RowSource, upscaler: Upscaler) -> Iterator[Image]:
    levels = _levels(source)
    for band in upscaler.bands(source.height, source.width, has_alpha=source.has_alpha):
        yield upscaler.upscale_band(source.rows(band.read_top, band.read_bottom), band, levels=levels)


def _levels(source: RowSource) -> Levels:
    """The range of the whole image, for which floats have to be read once before."""
    if not source.is_float:
        return UNIT
    tops = range(0, source.height, TIFF_TILE)
    ranges = np.array(
        [range_of(source.rows(top, min(top + TIFF_TILE, source.height)).pixels) for top in tops]
    )
    return levels_of(float(ranges[:, 0].min()), float(ranges[:, 1].max()))


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made while the one before is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="bands") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


# ---------------------------------------------------------------- writing


def write_tiff(
    file: BinaryIO, bands: Iterable[Image], target: tuple[int, int], options: EncodeConfig
) -> None:
    """Bands of rows to a tiled TIFF of `target` size; a BigTIFF when it may pass 4 GB.

    `file` must be readable too.
    """
    first, bands = _peeked(bands)
    channels = first.pixels.shape[2] + (first.alpha is not None)
    is_grey, dtype = first.pixels.shape[2] == 1, first.pixels.dtype
    compression, predictor = _COMPRESSION[options.tiff_compression], 2 if dtype != np.float32 else 1
    compressed = options.tiff_compression != "none"
    encode = partial(_tiff_tile, compression=options.tiff_compression)
    is_big = target[0] * target[1] * channels * dtype.itemsize > 2**32 - 2**25
    described = _described(first, target, options)
    directories = tiff.exif_directories(described)
    with tifffile.TiffWriter(file, bigtiff=is_big, byteorder="<") as writer:
        writer.write(
            _tiff_tiles(bands, encode),
            shape=(*target, channels) if channels > 1 else target,
            dtype=dtype,
            tile=(TIFF_TILE, TIFF_TILE),
            photometric="minisblack" if is_grey else "rgb",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=None if first.alpha is None else ["unassalpha"],
            compression=compression,
            predictor=predictor if compressed else None,
            metadata=None,
            software=False,
            **tiff.tag_arguments(described, directories, is_big=is_big),
        )
    tiff.append_directories(file, directories, is_big=is_big)


_COMPRESSION = {"deflate": "adobe_deflate", "lzw": "lzw", "none": None}


def _tiff_tiles(bands: Iterable[Image], encode: Any) -> Iterator[bytes]:
    """The file's tiles, compressed by as many threads as there are cores."""
    with ThreadPoolExecutor(thread_name_prefix="tiff") as threads:
        for rows in _regrouped(bands, TIFF_TILE):
            planes = _planes(rows)
            height, width = planes.shape[:2]
            bottom, right = -height % TIFF_TILE, -width % TIFF_TILE
            lefts = range(0, width, TIFF_TILE)
            if bottom:
                planes = np.pad(planes, ((0, bottom), (0, 0), (0, 0)), mode="edge")
            cuts = (planes[:, left : left + TIFF_TILE] for left in lefts)
            padded = (_padded_right(cut, right if cut.shape[1] < TIFF_TILE else 0) for cut in cuts)
            yield from threads.map(encode, padded)


def _padded_right(tile: np.ndarray, right: int) -> np.ndarray:
    return np.pad(tile, ((0, 0), (0, right), (0, 0)), mode="edge") if right else tile


def _tiff_tile(tile: np.ndarray, *, compression: str) -> bytes:
    """(T, T, C) as it lies in the file: differences of neighbours, but for floats, and compressed."""
    if compression == "none":
        return tile.tobytes()
    if tile.dtype != np.float32:
        before, tile = tile, tile.copy()
        tile[:, 1:] -= before[:, :-1]
    if compression == "lzw":
        return bytes(imagecodecs.lzw_encode(tile.tobytes()))
    return bytes(isal_zlib.compress(tile.tobytes(), 1))


def write_png(file: BinaryIO, bands: Iterable[Image], target: tuple[int, int], options: EncodeConfig) -> None:
    """Bands of rows to a PNG of `target` size; floats in 16 bits."""
    first, bands = _peeked(bands)
    channels = first.pixels.shape[2] + (first.alpha is not None)
    chunks = metadata_chunks(_described(first, target, options))
    bits = 8 if first.pixels.dtype == np.uint8 else 16
    writer = PngWriter(file, *target, channels, bits, level=options.png_level, chunks=chunks)
    for band in bands:
        planes = _planes(band)
        writer.write(planes if planes.dtype != np.float32 else _sixteen_bits(planes))
    writer.close()


def _sixteen_bits(planes: np.ndarray) -> np.ndarray:
    return np.rint(planes.clip(0, 1) * 65535).astype(np.uint16)


def _described(image: Image, target: tuple[int, int], options: EncodeConfig) -> Image:
    """`image` with what its file will say about it beside the pixels."""
    if options.metadata == "strip":
        return replace(image, exif=None, xmp=None, dpi=None)
    height, width = target
    return replace(
        image,
        exif=sized_exif(image.exif, height=height, width=width),
        xmp=sized_xmp(image.xmp, height=height, width=width),
    )


def _peeked(bands: Iterable[Image]) -> tuple[Image, Iterator[Image]]:
    """The first row, and the bands as they were."""
    iterator = iter(bands)
    first = next(iterator)
    corner = ArrayRows(first).rows(0, 1)
    # A copy: a view would keep the whole band.
    alpha = None if corner.alpha is None else corner.alpha.copy()
    return replace(corner, pixels=corner.pixels.copy(), alpha=alpha), chain(iter([first]), iterator)


def _planes(image: Image) -> np.ndarray:
    """(H, W, C) with alpha as the last channel."""
    if image.alpha is None:
        return image.pixels
    return np.concatenate([image.pixels, image.alpha[:, :, None]], axis=2)


def _regrouped(bands: Iterable[Image], height: int) -> Iterator[Image]:
    """The same rows, `height` at a time."""
    waiting: list[Image] = []
    for band in bands:
        rows = ArrayRows(band)
        top = 0
        while top < band.height:
            room = height - sum(part.height for part in waiting)
            waiting.append(rows.rows(top, min(top + room, band.height)))
            top += waiting[-1].height
            if sum(part.height for part in waiting) == height:
                yield joined(waiting)
                waiting = []
    if waiting:
        yield joined(waiting)
