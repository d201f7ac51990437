"""One antialiased resize, from what the network gives to the size that was asked for.

Sizes: `scale` s makes round(h * s) x round(w * s); `width` w' makes w' columns and round(h * w' / w) rows;
`megapixels` m makes the factor sqrt(m * 1e6 / (h * w)) for both sides, each rounded. Halves round up, no side
is less than 1, and width and height differ from the exact aspect by less than half a pixel. The network runs
once, whatever the size; Lanczos-3 then brings its result there, up or down.

Works on a stream of rows, so that images larger than memory can be resized too. Knows numpy only.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from kdsr.config import ResultConfig
from kdsr.errors import ImageTooLarge
from kdsr.image import Image

BLOCK = 64
"""Output rows and columns that are computed at once: a small dense matrix beats a gather of taps."""

LOBES = 3

MIN_QUALITY = 40
"""Quality is not lowered further to make a file small; its size is."""


# ---------------------------------------------------------------- which size


def target_size(height: int, width: int, *, net_scale: int, config: ResultConfig) -> tuple[int, int]:
    """Rows and columns of the result for an input of `height` x `width` pixels."""
    if config.width is not None:
        return _rounded(height * config.width / width), config.width
    if config.megapixels is not None:
        factor = math.sqrt(config.megapixels * 1e6 / (height * width))
    else:
        factor = net_scale if config.scale is None else config.scale
    return _rounded(height * factor), _rounded(width * factor)


def shrunk(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """`size` times `factor` on both sides."""
    return _rounded(size[0] * factor), _rounded(size[1] * factor)


def _rounded(side: float) -> int:
    return max(1, math.floor(side + 0.5))


def fit_bytes(
    encode: Callable[[int, float], bytes], *, max_bytes: int, quality: int, has_quality: bool
) -> bytes:
    """The best of `encode(quality, factor)` with at most `max_bytes` bytes.

    `factor` is that of the sides, 1 or less. First the highest quality from `MIN_QUALITY` to `quality` is
    looked for by bisection at full size, if the format has one; when even the lowest is too large, the
    size is lowered at that quality. Raises ImageTooLarge when one pixel is too large.
    """
    best = encode(quality, 1.0)
    if len(best) <= max_bytes:
        return best
    if has_quality and quality > MIN_QUALITY:
        best = encode(MIN_QUALITY, 1.0)
        if len(best) <= max_bytes:
            return _best_quality(encode, best, max_bytes=max_bytes, above=quality)
        quality = MIN_QUALITY
    return _largest_size(encode, len(best), max_bytes=max_bytes, quality=quality)


def _best_quality(encode: Callable[[int, float], bytes], best: bytes, *, max_bytes: int, above: int) -> bytes:
    """`best` is that of `MIN_QUALITY` and fits; `above` does not."""
    low = MIN_QUALITY
    while above - low > 1:
        middle = (low + above) // 2
        found = encode(middle, 1.0)
        if len(found) <= max_bytes:
            low, best = middle, found
        else:
            above = middle
    return best


def _largest_size(encode: Callable[[int, float], bytes], size: int, *, max_bytes: int, quality: int) -> bytes:
    factor = 1.0
    while factor > 1e-6:
        # Bytes grow about as pixels do; a little less, so that one or two tries are enough.
        factor *= min(0.95, 0.98 * math.sqrt(max_bytes / size))
        found = encode(quality, factor)
        if len(found) <= max_bytes:
            return found
        if len(found) == size:
            break
        size = len(found)
    raise ImageTooLarge(f"not even one pixel of it fits into max_bytes {max_bytes}; raise it")


# ---------------------------------------------------------------- resizing


def resize(image: Image, height: int, width: int) -> Image:
    """`image` brought to `height` x `width` pixels, depth kept; see `resize_rows`."""
    if (image.height, image.width) == (height, width):
        return image
    parts = list(resize_rows([image], (image.height, image.width), (height, width)))
    alpha = None if image.alpha is None else np.concatenate([_alpha(part) for part in parts])
    return replace(image, pixels=np.concatenate([part.pixels for part in parts]), alpha=alpha)


def resize_rows(bands: Iterable[Image], size: tuple[int, int], target: tuple[int, int]) -> Iterator[Image]:
    """Bands of rows of an image of `size` (H, W) to bands of `BLOCK` rows of one of `target` size.

    Lanczos-3, antialiased where the image gets smaller, with edges repeated. Colours are weighted with
    alpha, so that what is transparent does not show. Holds the rows that the next block needs.
    """
    rows, columns = Axis(size[0], target[0]), Axis(size[1], target[1])
    buffer = _RowBuffer()
    blocks = rows.blocks()
    block = next(blocks, None)
    for band in bands:
        buffer.add(band)
        while block is not None and buffer.bottom >= block.bottom:
            yield _block(buffer.take(block.top, block.bottom), block, columns)
            block = next(blocks, None)


@dataclass(frozen=True, eq=False)
class Block:
    """Weights (n, bottom - top) of n output pixels over the input pixels from `top` to `bottom`."""

    first: int
    top: int
    bottom: int
    weights: np.ndarray


@dataclass(frozen=True)
class Axis:
    """One side of an image on its way from `before` to `after` pixels."""

    before: int
    after: int

    def blocks(self) -> Iterator[Block]:
        """The side, `BLOCK` output pixels at a time."""
        for first in range(0, self.after, BLOCK):
            yield _weights(self.before, self.after, first)


@lru_cache(maxsize=2048)
def _weights(before: int, after: int, first: int) -> Block:
    ratio = before / after
    stretch = max(ratio, 1.0)
    centres = (np.arange(first, min(first + BLOCK, after)) + 0.5) * ratio - 0.5
    begin, end = math.floor(centres[0] - LOBES * stretch), math.ceil(centres[-1] + LOBES * stretch) + 1
    taps = np.arange(begin, end)
    weights = lanczos((taps - centres[:, None]) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    top, bottom = max(begin, 0), min(end, before)
    inside = np.zeros((len(centres), bottom - top))
    # Taps beyond the edge fall on the edge pixel.
    np.add.at(inside.T, taps.clip(0, before - 1) - top, weights.T)
    return Block(first, top, bottom, inside.astype(np.float32))


def lanczos(t: np.ndarray) -> np.ndarray:
    """Lanczos-3: sinc(t) * sinc(t / 3), zero beyond 3."""
    values: np.ndarray = np.where(np.abs(t) < LOBES, np.sinc(t) * np.sinc(t / LOBES), 0.0)
    return values


class _RowBuffer:
    """Rows of an image as they come, from the first one that is still wanted."""

    def __init__(self) -> None:
        self._bands: list[Image] = []
        self._top = 0
        self.bottom = 0
        """Just below the last row that came."""

    def add(self, band: Image) -> None:
        self._bands.append(band)
        self.bottom += band.height

    def take(self, top: int, bottom: int) -> Image:
        """The rows from `top` to `bottom`. Those of bands wholly above are forgotten."""
        while self._top + self._bands[0].height <= top:
            self._top += self._bands.pop(0).height
        parts, band_top = [], self._top
        for band in self._bands:
            if band_top < bottom:
                parts.append(_rows(band, max(top - band_top, 0), bottom - band_top))
            band_top += band.height
        return joined(parts)


def _rows(image: Image, top: int, bottom: int) -> Image:
    alpha = None if image.alpha is None else image.alpha[top:bottom]
    return replace(image, pixels=image.pixels[top:bottom], alpha=alpha)


def joined(bands: list[Image]) -> Image:
    """Bands one below the other."""
    if len(bands) == 1:
        return bands[0]
    alpha = None if bands[0].alpha is None else np.concatenate([_alpha(band) for band in bands])
    return replace(bands[0], pixels=np.concatenate([band.pixels for band in bands]), alpha=alpha)


def _alpha(image: Image) -> np.ndarray:
    assert image.alpha is not None
    return image.alpha


def _block(rows: Image, block: Block, columns: Axis) -> Image:
    """One block of output rows from the input rows that it needs."""
    pixels = rows.pixels.astype(np.float32)
    dtype = rows.pixels.dtype
    if rows.alpha is None:
        return replace(rows, pixels=_rounded_to(_resampled(pixels, block, columns), dtype))
    white = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    weight = rows.alpha.astype(np.float32)[:, :, None] / np.float32(white)
    alpha = _resampled(weight, block, columns)
    # Where next to nothing is visible there is nothing to weigh with.
    is_visible = alpha > 1 / 255
    colours = _resampled(pixels * weight, block, columns) / np.where(is_visible, alpha, 1)
    if not is_visible.all():
        colours = np.where(is_visible, colours, _resampled(pixels, block, columns))
    return replace(
        rows,
        pixels=_rounded_to(colours, dtype),
        alpha=_rounded_to(alpha[:, :, 0].clip(0, 1) * np.float32(white), dtype),
    )


def _resampled(pixels: np.ndarray, block: Block, columns: Axis) -> np.ndarray:
    """(h, W, C) float32 to (n, W', C)."""
    height, width, channels = pixels.shape
    rows = block.weights @ pixels.reshape(height, width * channels)
    num_rows = len(rows)
    # Columns first, so that each of their blocks is one product of two dense matrices.
    turned = np.ascontiguousarray(rows.reshape(num_rows, width, channels).transpose(1, 0, 2))
    flat = turned.reshape(width, num_rows * channels)
    parts = [part.weights @ flat[part.top : part.bottom] for part in columns.blocks()]
    resampled = np.concatenate(parts).reshape(columns.after, num_rows, channels)
    return resampled.transpose(1, 0, 2)


def _rounded_to(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """float32 to `dtype`: whole numbers to the nearest, within their range."""
    if dtype == np.float32:
        return np.ascontiguousarray(values)
    return np.rint(values).clip(0, np.iinfo(dtype).max).astype(dtype)
