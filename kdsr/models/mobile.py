"""Inverted residuals: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.

Without normalisation, which costs super-resolution its contrast (Lim et al., EDSR, CVPRW 2017).
"""

import torch
from torch import Tensor, nn

from kdsr.models.over_bicubic import OverBicubic
from kdsr.spec import MobileSpec

NEGATIVE_SLOPE = 0.1
FIRST_SHARE = 0.5
"""Of its usual start that the last convolution of a block has, so that many blocks in a row stay small."""


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 back without activation, added to the input."""

    def __init__(self, num_features: int, expansion: int) -> None:
        super().__init__()
        hidden = num_features * expansion
        self.expand = nn.Conv2d(num_features, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, num_features, 1)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        with torch.no_grad():
            self.project.weight.mul_(FIRST_SHARE)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        hidden = self.activation(self.expand(features))
        hidden = self.activation(self.depthwise(hidden))
        return features + self.project(hidden)


class Mobile(OverBicubic):
    """Inverted residuals. See `MobileSpec`."""

    spec: MobileSpec

    def __init__(self, spec: MobileSpec) -> None:
        super().__init__(
            spec, (InvertedResidual(spec.num_features, spec.expansion) for _ in range(spec.num_blocks))
        )
