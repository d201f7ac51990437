"""Channel split and shuffle: Ma et al., ShuffleNet V2: Practical Guidelines, ECCV 2018."""

import torch
from torch import Tensor, nn

from kdsr.models.over_bicubic import OverBicubic
from kdsr.spec import ShuffleSpec

NEGATIVE_SLOPE = 0.1


class ShuffleUnit(nn.Module):
    """Half of the channels pass as they are, half go through 1x1, depthwise 3x3, 1x1; then both are mixed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        half = num_features // 2
        self.body = nn.Sequential(
            nn.Conv2d(half, half, 1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half),
            nn.Conv2d(half, half, 1),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )
        self.mix = nn.ChannelShuffle(2)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        passed, worked = features.chunk(2, dim=1)
        mixed: Tensor = self.mix(torch.cat([passed, self.body(worked)], dim=1))
        return mixed


class Shuffle(OverBicubic):
    """Shuffle units. See `ShuffleSpec`."""

    spec: ShuffleSpec

    def __init__(self, spec: ShuffleSpec) -> None:
        super().__init__(spec, (ShuffleUnit(spec.num_features) for _ in range(spec.num_blocks)))
