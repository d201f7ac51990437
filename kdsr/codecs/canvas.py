"""The canvas of an animation: frames are laid onto it, and each state of it is one picture."""

import numpy as np

from kdsr.image import Image
from kdsr.tiles import Box


class Canvas:
    """(H, W, C + 1) uint8 or uint16, alpha last, transparent black at first."""

    def __init__(self, height: int, width: int, *, channels: int, dtype: np.dtype) -> None:
        self._planes = np.zeros((height, width, channels + 1), dtype=dtype)
        self._opaque = int(np.iinfo(dtype).max)

    def clear(self, box: Box) -> None:
        """Make `box` transparent."""
        self._planes[box.slices] = 0

    def cut(self, box: Box) -> np.ndarray:
        """A copy of what `box` shows, for `replace`."""
        return self._planes[box.slices].copy()

    def replace(self, box: Box, planes: np.ndarray) -> None:
        """Put `planes` (h, w, C + 1) into `box`, their alpha too."""
        self._planes[box.slices] = planes

    def lay_over(self, box: Box, planes: np.ndarray) -> None:
        """Blend `planes` (h, w, C + 1) over what `box` shows, by their alpha, which is not premultiplied."""
        under = self._planes[box.slices]
        alpha = planes[:, :, -1]
        covers = alpha == self._opaque
        under[covers] = planes[covers]
        mixes = (alpha > 0) & ~covers
        if mixes.any():
            under[mixes] = self._mixed(planes[mixes], under[mixes])

    def _mixed(self, over: np.ndarray, under: np.ndarray) -> np.ndarray:
        """(N, C + 1) of both; the alpha of `over` is above zero."""
        over_weight = over[:, -1:] / self._opaque
        under_weight = under[:, -1:] / self._opaque * (1 - over_weight)
        alpha = over_weight + under_weight
        colours = (over[:, :-1] * over_weight + under[:, :-1] * under_weight) / alpha
        mixed: np.ndarray = np.concatenate([colours, alpha * self._opaque], axis=1).round()
        return mixed.astype(over.dtype)

    def picture(self, *, with_alpha: bool) -> Image:
        """A copy of all of it."""
        colours = np.ascontiguousarray(self._planes[:, :, :-1])
        return Image(colours, alpha=self._planes[:, :, -1].copy() if with_alpha else None)


def planes_of(image: Image) -> np.ndarray:
    """(H, W, C + 1): colours and alpha, which is opaque where the image has none."""
    alpha = image.alpha
    if alpha is None:
        alpha = np.full(image.pixels.shape[:2], np.iinfo(image.pixels.dtype).max, image.pixels.dtype)
    return np.concatenate([image.pixels, alpha[:, :, None]], axis=2)


def changed_box(before: Image, after: Image) -> Box:
    """The smallest box with all differences of two pictures of one size; one pixel when there are none."""
    differs = (before.pixels != after.pixels).any(axis=2)
    if before.alpha is not None or after.alpha is not None:
        differs |= planes_of(before)[:, :, -1] != planes_of(after)[:, :, -1]
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    if not rows.size:
        return Box(0, 0, 1, 1)
    return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def cropped(image: Image, box: Box) -> Image:
    """The colours and the alpha in `box`, nothing else of the image."""
    alpha = None if image.alpha is None else np.ascontiguousarray(image.alpha[box.slices])
    return Image(np.ascontiguousarray(image.pixels[box.slices]), alpha=alpha)
