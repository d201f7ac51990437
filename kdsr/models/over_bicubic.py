"""What small networks have in common: blocks on the LR grid that correct bicubic interpolation."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import MobileSpec, MultiScaleSpec, ShuffleSpec


class OverBicubic(SrModel):
    """3x3 head, blocks, 3x3 tail, pixel shuffle, residual over the bicubic input.

    The tail starts at zero, so that an untrained network is bicubic interpolation.
    """

    def __init__(self, spec: MobileSpec | ShuffleSpec | MultiScaleSpec, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.spec = spec
        self.head = nn.Conv2d(spec.channels, spec.num_features, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(spec.num_features, spec.channels * spec.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(spec.scale)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    @property
    def receptive_radius(self) -> int:
        """That of the blocks, and one pixel each for head and tail."""
        return receptive_radius([self.head, self.blocks, self.tail, self.shuffle], self.spec.scale)

    def body(self, shallow: Tensor) -> Tensor:
        """Features (B, F, h, w) of the head to those that the tail gets."""
        deep: Tensor = self.blocks(shallow)
        return deep

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        # The residual keeps the 8 bits of its input, which bfloat16 does not.
        with torch.autocast(lr.device.type, enabled=False):
            upscaled = bicubic_upscale(lr, self.spec.scale)
        sr: Tensor = self.shuffle(self.tail(self.body(self.head(lr))))
        return sr + upscaled
