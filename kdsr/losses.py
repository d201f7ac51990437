"""Distances between two batches of images: plain functions of tensors, in float32, averaged over all."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr.errors import ImageTooSmall
from kdsr.metrics import C1, C2, PEAK, WINDOW_SIZE, gaussian_window
from kdsr.terms import PixelLoss

Loss = Callable[[Tensor, Tensor], Tensor]

CHARBONNIER_EPSILON = 1e-3

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, finest first (Wang et al., Asilomar 2003)."""


def l1(sr: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return F.l1_loss(sr.float(), target.float())


def mse(sr: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference; PSNR is its logarithm."""
    return F.mse_loss(sr.float(), target.float())


def charbonnier(sr: Tensor, target: Tensor) -> Tensor:
    """Smooth L1, sqrt(d^2 + eps^2) (Charbonnier et al., ICIP 1994; Lai et al., LapSRN, CVPR 2017)."""
    difference = sr.float() - target.float()
    return torch.sqrt(difference * difference + CHARBONNIER_EPSILON**2).mean()


def ssim(sr: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM of (B, C, H, W), channel by channel (Wang et al., IEEE TIP 2004). At least 11 x 11 pixels."""
    luminance, structure = _ssim_parts(sr.float(), target.float())
    return 1 - (luminance * structure).mean()


def ms_ssim(sr: Tensor, target: Tensor) -> Tensor:
    """1 - MS-SSIM of (B, C, H, W) (Wang et al., Asilomar 2003), over as many of five scales as fit.

    With fewer scales (five need 176 pixels a side) their weights are stretched to sum to 1.
    """
    sr, target = sr.float(), target.float()
    scales = 1
    while scales < len(MS_SSIM_WEIGHTS) and min(sr.shape[-2:]) >> scales >= WINDOW_SIZE:
        scales += 1
    weights = [weight / sum(MS_SSIM_WEIGHTS[:scales]) for weight in MS_SSIM_WEIGHTS[:scales]]
    product = sr.new_ones(sr.shape[0])
    for scale, weight in enumerate(weights):
        luminance, structure = _ssim_parts(sr, target)
        here = structure * luminance if scale == scales - 1 else structure
        # Early in training structure can be negative, and a root of it is no number.
        product = product * here.mean(dim=(1, 2, 3)).clamp(min=1e-4) ** weight
        sr, target = F.avg_pool2d(sr, 2), F.avg_pool2d(target, 2)
    return 1 - product.mean()


def _ssim_parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, where the window fits."""
    if min(x.shape[-2:]) < WINDOW_SIZE:
        raise ImageTooSmall(
            f"SSIM looks through a window of {WINDOW_SIZE} x {WINDOW_SIZE} pixels; found images of "
            f"{x.shape[-2]} x {x.shape[-1]}; use a larger data.patch_size"
        )
    c1, c2 = C1 / PEAK**2, C2 / PEAK**2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x * mean_x
    var_y = _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (var_x + var_y + c2)


def _blur(images: Tensor) -> Tensor:
    """(B, C, H, W) to (B, C, H - 10, W - 10)."""
    channels = images.shape[1]
    window = torch.tensor(gaussian_window(), dtype=images.dtype, device=images.device)
    rows = F.conv2d(images, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def fft_l1(sr: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the spectra, real and imaginary parts apart (Cho et al., ICCV 2021)."""
    difference = torch.fft.rfft2(sr.float()) - torch.fft.rfft2(target.float())
    return torch.view_as_real(difference).abs().mean()


LOSSES: Mapping[PixelLoss, Loss] = {
    "l1": l1,
    "mse": mse,
    "charbonnier": charbonnier,
    "ssim": ssim,
    "ms_ssim": ms_ssim,
    "fft_l1": fft_l1,
}
