"""PSNR and SSIM of the luma channel, as the super-resolution papers compute them.

uint8 in, float64 inside. The outer `border` pixels on each side are left out; the field sets it to the
scale. Luma is not rounded before it is compared: BasicSR keeps its decimals, MATLAB's `rgb2ycbcr` on uint8
rounds, and the two differ by about 0.01 dB.

Sources: ITU-R BT.601 (studio swing) in the form of MATLAB's `rgb2ycbcr`; BasicSR,
`basicsr/metrics/psnr_ssim.py` and `basicsr/utils/color_util.py`, for the protocol; Wang et al., "Image
quality assessment", IEEE TIP 2004, for SSIM with its 11x11 Gaussian window.
"""

import math

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from kdsr.errors import ImageTooSmall, RequestError

Pixels = npt.NDArray[np.uint8]
Plane = npt.NDArray[np.float64]

PEAK = 255.0
WINDOW_SIZE = 11
WINDOW_SIGMA = 1.5
C1 = (0.01 * PEAK) ** 2
C2 = (0.03 * PEAK) ** 2
LUMA_WEIGHTS = np.array([65.481, 128.553, 24.966]) / PEAK
"""Of red, green and blue; they sum to 219 / 255, the studio swing."""


def luma(rgb: Pixels) -> Plane:
    """BT.601 luma, 16 to 235, of `rgb` (H, W, 3) uint8, as (H, W) float64, not rounded.

    (H, W, 1) is grey and reads as three equal channels, which is what the field does with grey images.
    Raises RequestError for another type or channel count.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] not in (1, 3):
        raise RequestError(f"luma: expected (H, W, 3) or (H, W, 1) uint8, found {rgb.shape} {rgb.dtype}")
    weights = LUMA_WEIGHTS if rgb.shape[2] == 3 else LUMA_WEIGHTS.sum(keepdims=True)
    result: Plane = rgb.astype(np.float64) @ weights + 16.0
    return result


def psnr_y(sr: Pixels, hr: Pixels, border: int) -> float:
    """Peak signal-to-noise ratio of luma in dB; infinite when no pixel differs.

    `sr` and `hr` (H, W, 3) or (H, W, 1) uint8. Raises RequestError when their sizes differ and
    ImageTooSmall when nothing is left inside the border.
    """
    sr_luma, hr_luma = _inner_luma(sr, hr, border=border, least=1)
    error = float(np.mean((sr_luma - hr_luma) ** 2))
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim_y(sr: Pixels, hr: Pixels, border: int) -> float:
    """Structural similarity of luma, at most 1, over the positions where the 11x11 window fits.

    `sr` and `hr` (H, W, 3) or (H, W, 1) uint8. Raises RequestError when their sizes differ and
    ImageTooSmall when no window fits inside the border.
    """
    x, y = _inner_luma(sr, hr, border=border, least=WINDOW_SIZE)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return float(np.mean(luminance * structure))


def gaussian_window() -> Plane:
    """The 11 weights of one axis, sum 1."""
    offsets = np.arange(WINDOW_SIZE) - WINDOW_SIZE // 2
    weights = np.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    result: Plane = weights / weights.sum()
    return result


def _inner_luma(sr: Pixels, hr: Pixels, *, border: int, least: int) -> tuple[Plane, Plane]:
    """Luma of both without the border. The size check comes before any arithmetic."""
    if sr.shape[:2] != hr.shape[:2]:
        raise RequestError(f"SR and HR differ in size: SR is {_size(sr)}, HR is {_size(hr)} (height x width)")
    height, width = hr.shape[0] - 2 * border, hr.shape[1] - 2 * border
    if border < 0 or min(height, width) < least:
        raise ImageTooSmall(
            f"image of {_size(hr)} (height x width) is too small to compare: without a border of {border} "
            f"it must still be {least}x{least}"
        )
    inner = slice(border, border + height), slice(border, border + width)
    return luma(sr[inner]), luma(hr[inner])


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def _blur(plane: Plane) -> Plane:
    """Weighted mean of every whole window: (H, W) to (H - 10, W - 10), one axis after the other."""
    window = gaussian_window()
    rows = sliding_window_view(plane, WINDOW_SIZE, axis=0) @ window
    result: Plane = sliding_window_view(rows, WINDOW_SIZE, axis=1) @ window
    return result
