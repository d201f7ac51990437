"""Distances between two batches of images: plain functions of tensors, in float32, averaged over all."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr.config import PixelLoss

Loss = Callable[[Tensor, Tensor], Tensor]

CHARBONNIER_EPSILON = 1e-3


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


LOSSES: Mapping[PixelLoss, Loss] = {"l1": l1, "mse": mse, "charbonnier": charbonnier}
