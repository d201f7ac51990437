"""Multi-scale depthwise convolutions that gate each other, and a partly dense mixing of channels.

Sources: Sun et al., SAFMN, ICCV 2023 (depthwise at several scales as a gate); Zhou et al., VapSR, ECCVW 2022
(large depthwise kernels as attention, pixel normalisation); Zheng et al., SMFANet, ECCV 2024 (3x3 on a part
of the channels). All of it is local: where those pool, kernels of three sizes look around.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.models.over_bicubic import OverBicubic
from kdsr.spec import MultiScaleSpec

KERNEL_SIZES = (3, 5, 7)
FIRST_SHARE = 0.5
"""Of its usual start that the last convolution of a branch has, so that many blocks in a row stay small."""
SMALLEST_VARIANCE = 1e-4
"""Added to a pixel's variance, so that rounding is not blown up where all features are equal."""


class PixelNorm(nn.Module):
    """Each pixel's features without their mean, divided by their deviation, times a learned gain."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        # Sums are float32 inside in any case; autocast would copy all features there and back.
        with torch.autocast(features.device.type, enabled=False):
            gain = self.gain.to(features.dtype)
            last = F.layer_norm(features.permute(0, 2, 3, 1), gain.shape, gain, eps=SMALLEST_VARIANCE)
        return last.permute(0, 3, 1, 2)


class MultiScaleDepthwise(nn.Module):
    """Depthwise convolution: 3x3 for the first third of the channels, 5x5 and 7x7 for the others.

    Run as one 7x7: three small convolutions cost more than the multiplications by zero.
    """

    radius = max(KERNEL_SIZES) // 2

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.randn(width, 1, size, size) / size)
            for width, size in zip(kernel_widths(num_features), KERNEL_SIZES, strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        kernel = torch.cat([F.pad(k, (self.radius - k.shape[-1] // 2,) * 4) for k in self.kernels])
        return F.conv2d(features, kernel, self.bias, padding=self.radius, groups=len(self.bias))


class Attention(nn.Module):
    """A 1x1 of the features, weighted by what lies around each pixel, then a 1x1."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.value = nn.Conv2d(num_features, num_features, 1)
        self.context = nn.Conv2d(num_features, num_features, 1)
        self.around = MultiScaleDepthwise(num_features)
        self.project = nn.Conv2d(num_features, num_features, 1)
        with torch.no_grad():
            self.project.weight.mul_(FIRST_SHARE)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        gate = self.around(F.silu(self.context(features)))
        return self.project(gate * self.value(features))


class PartialMixing(nn.Module):
    """1x1 to twice the channels, 3x3 on a quarter of them, 1x1 back."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_dense = dense_width(num_features)
        hidden = 2 * num_features
        self.expand = nn.Conv2d(num_features, hidden, 1)
        self.dense = nn.Conv2d(self.num_dense, self.num_dense, 3, padding=1)
        self.project = nn.Conv2d(hidden, num_features, 1)
        with torch.no_grad():
            self.project.weight.mul_(FIRST_SHARE)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        hidden = F.silu(self.expand(features))
        dense, rest = hidden.tensor_split([self.num_dense], dim=1)
        return self.project(torch.cat([F.silu(self.dense(dense)), rest], dim=1))


class MultiScaleBlock(nn.Module):
    """Attention, then mixing, each normalised before and added to its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm1 = PixelNorm(num_features)
        self.attention = Attention(num_features)
        self.norm2 = PixelNorm(num_features)
        self.mixing = PartialMixing(num_features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        features = features + self.attention(self.norm1(features))
        return features + self.mixing(self.norm2(features))


class MultiScale(OverBicubic):
    """Blocks with a long residual. See `MultiScaleSpec`."""

    spec: MultiScaleSpec

    def __init__(self, spec: MultiScaleSpec) -> None:
        super().__init__(spec, (MultiScaleBlock(spec.num_features) for _ in range(spec.num_blocks)))

    def body(self, shallow: Tensor) -> Tensor:
        """See `OverBicubic`."""
        return shallow + super().body(shallow)


def kernel_widths(num_features: int) -> list[int]:
    """Channels that the kernels of each size work on; the smallest one takes the remainder."""
    share = num_features // len(KERNEL_SIZES)
    return [num_features - share * (len(KERNEL_SIZES) - 1)] + [share] * (len(KERNEL_SIZES) - 1)


def dense_width(num_features: int) -> int:
    """Channels of a block's hidden layer that the 3x3 works on."""
    return num_features // 2
