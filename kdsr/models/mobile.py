"""Inverted residuals: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.

Without normalisation, which costs super-resolution its contrast (Lim et al., EDSR, CVPRW 2017).
"""

import torch
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, receptive_radius
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


class Mobile(SrModel):
    """Inverted residuals on the LR grid, pixel shuffle, residual over the bicubic input. See `MobileSpec`.

    The tail starts at zero, so that an untrained network is bicubic interpolation.
    """

    spec: MobileSpec

    def __init__(self, spec: MobileSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.head = nn.Conv2d(spec.channels, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(InvertedResidual(width, spec.expansion) for _ in range(spec.num_blocks))
        )
        self.tail = nn.Conv2d(width, spec.channels * spec.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(spec.scale)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    @property
    def receptive_radius(self) -> int:
        """One pixel for the head, for each block and for the tail."""
        return receptive_radius([self.head, self.blocks, self.tail, self.shuffle], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        # The residual keeps the 8 bits of its input, which bfloat16 does not.
        with torch.autocast(lr.device.type, enabled=False):
            upscaled = bicubic_upscale(lr, self.spec.scale)
        return self.shuffle(self.tail(self.blocks(self.head(lr)))) + upscaled
