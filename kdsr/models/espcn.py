"""ESPCN: Shi et al., Real-Time Single Image and Video SR Using an Efficient Sub-Pixel CNN, CVPR 2016."""

from torch import Tensor, nn

from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import EspcnSpec


class Espcn(SrModel):
    """5x5, 3x3, 3x3 with tanh, then a pixel shuffle. See `EspcnSpec`."""

    def __init__(self, spec: EspcnSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.body = nn.Sequential(
            nn.Conv2d(spec.channels, width, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(width // 2, spec.channels * spec.scale**2, 3, padding=1),
            nn.PixelShuffle(spec.scale),
        )

    @property
    def receptive_radius(self) -> int:
        """Four pixels."""
        return receptive_radius([self.body], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        return self.body(lr)
