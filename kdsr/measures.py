"""What a sub-image is worth to training, in a few numbers. Knows numpy only: no files, no thresholds.

All of them look at luma (BT.601, full range, 0 to 255), so a grey picture is measured like a coloured one.
"""

import hashlib
from typing import NamedTuple

import numpy as np

Array = np.ndarray

THUMBNAIL_ROWS, THUMBNAIL_COLUMNS = 16, 18
"""Sides of a thumbnail: two by two cells of it are one cell of a 9 x 8 difference hash."""

_WINDOW = 64
"""Pixels in a row or column whose spectrum is taken."""
_FINE = 0.6
"""Share of Nyquist's frequency from which detail counts as fine: an enlargement by 2 ends at 0.5."""


class Measures(NamedTuple):
    """What is known of a sub-image once its pixels are gone."""

    sharpness: float
    """See `sharpness`."""
    detail: float
    """See `detail`."""
    blockiness: float
    """See `blockiness`."""
    fine_share: float
    """See `fine_share`."""
    thumbnail: Array
    """See `thumbnail`."""
    content: int
    """64 bits of a hash of size and pixels: equal for equal pictures."""


def measure(pixels: Array) -> Measures:
    """All measures of (H, W, 3) uint8, each side at least 16."""
    grey = luma(pixels)
    return Measures(
        sharpness(grey), detail(grey), blockiness(grey), fine_share(grey), thumbnail(grey), content(pixels)
    )


def luma(pixels: Array) -> Array:
    """(H, W, 3) uint8 to (H, W) float32, 0 to 255."""
    return pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def content(pixels: Array) -> int:
    """64 bits of a hash of size and pixels."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=8, salt=b"%d" % pixels.shape[1])
    return int.from_bytes(digest.digest(), "big")


def sharpness(grey: Array) -> float:
    """Variance of the Laplacian of four neighbours: low where nothing is in focus.

    It grows with contrast and noise too, so it compares pictures of one set. Source: Pech-Pacheco et al.,
    Diatom autofocusing in brightfield microscopy, ICPR 2000; Pertuz et al., Pattern Recognition 46, 2013.
    """
    inner = 4 * grey[1:-1, 1:-1]
    across, down = grey[1:-1, :-2] + grey[1:-1, 2:], grey[:-2, 1:-1] + grey[2:, 1:-1]
    return float((inner - across - down).var())


def detail(grey: Array) -> float:
    """RMS, in levels of 255, of what is lost when every 2 x 2 pixels become their mean.

    The least that super-resolution could bring back; below 1 a picture half as large says it all.
    """
    height, width = (side // 2 * 2 for side in grey.shape)
    cells = grey[:height, :width].reshape(height // 2, 2, width // 2, 2)
    return float(np.sqrt(((cells - cells.mean((1, 3), keepdims=True)) ** 2).mean()))


def blockiness(grey: Array) -> float:
    """How much larger steps are on one grid of 8 x 8 pixels, wherever it begins, than beside it; 1 for none.

    A sub-image is cut anywhere, so each of the 8 offsets is tried, in rows and in columns, and the smaller
    of the two ratios is the answer: stripes have one direction. The ratio is to the next largest offset,
    so that what repeats every 2 or 4 pixels is no grid. Steps count up to 16 levels, because edges of
    things would drown the grid. Sides below 64 pixels are too short to tell and give 1. Source: after Wang,
    Sheikh and Bovik, No-reference perceptual quality assessment of JPEG compressed images, ICIP 2002, and
    Fan and de Queiroz, IEEE TIP 12, 2003.
    """
    return min(_grid_of_columns(grey), _grid_of_columns(grey.T)) if min(grey.shape) >= 64 else 1.0


def _grid_of_columns(grey: Array) -> float:
    steps = np.minimum(np.abs(np.diff(grey, axis=1)), 16).mean(axis=0)
    by_offset = np.sort(steps[: len(steps) // 8 * 8].reshape(-1, 8).mean(axis=0))
    # Below a twentieth of a level there is nothing but rounding.
    return float(max(1.0, by_offset[-1] / max(by_offset[-2], 0.05)))


def fine_share(grey: Array) -> float:
    """Share of the energy of the gradient above 0.6 of Nyquist's frequency, over rows and columns.

    Photographs at their own size fill the spectrum; what was enlarged or smoothed leaves its upper part
    empty. The gradient, because the spectrum of a scene falls with the square of the frequency and that
    of its gradient does not: Field, Relations between the statistics of natural images, JOSA A 4, 1987.
    """
    energy = _spectrum(grey) + _spectrum(grey.T)
    frequency = np.linspace(0, 1, len(energy))
    # The window spreads the mean into the first two places.
    return float(energy[frequency >= _FINE].sum() / max(energy[2:].sum(), 1e-9))


def _spectrum(grey: Array) -> Array:
    """Mean power of the gradient along rows, from 0 to Nyquist, in 33 places."""
    steps = np.diff(grey, axis=1)
    length = min(_WINDOW, steps.shape[1])
    parts = steps[:, : steps.shape[1] // length * length].reshape(-1, length)
    window = np.hanning(length).astype(np.float32)
    power = np.abs(np.fft.rfft(parts * window, n=_WINDOW, axis=1)) ** 2
    mean: Array = power.mean(axis=0)
    return mean


def thumbnail(grey: Array) -> Array:
    """(16, 18) uint8, means of near-equal cells: what near duplicates are found by."""
    sums, counts = grey, np.ones((1, 1), np.float32)
    for axis, cells in enumerate((THUMBNAIL_ROWS, THUMBNAIL_COLUMNS)):
        edges = np.arange(cells) * grey.shape[axis] // cells
        sums = np.add.reduceat(sums, edges, axis=axis)
        sizes = np.maximum(1, np.diff(edges, append=grey.shape[axis]))
        counts = counts * np.expand_dims(sizes, 1 - axis)
    return np.rint(sums / counts).astype(np.uint8)
