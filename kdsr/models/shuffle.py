"""Channel split and shuffle: Ma et al., ShuffleNet V2: Practical Guidelines, ECCV 2018."""

import torch
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, receptive_radius
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


class Shuffle(SrModel):
    """Shuffle units on the LR grid, pixel shuffle, residual over the bicubic input. See `ShuffleSpec`.

    The tail starts at zero, so that an untrained network is bicubic interpolation.
    """

    spec: ShuffleSpec

    def __init__(self, spec: ShuffleSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.head = nn.Conv2d(spec.channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ShuffleUnit(width) for _ in range(spec.num_blocks)))
        self.tail = nn.Conv2d(width, spec.channels * spec.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(spec.scale)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    @property
    def receptive_radius(self) -> int:
        """One pixel for the head, for each unit and for the tail."""
        return receptive_radius([self.head, self.blocks, self.tail, self.shuffle], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        # The residual keeps the 8 bits of its input, which bfloat16 does not.
        with torch.autocast(lr.device.type, enabled=False):
            upscaled = bicubic_upscale(lr, self.spec.scale)
        return self.shuffle(self.tail(self.blocks(self.head(lr)))) + upscaled
