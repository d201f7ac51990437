"""EDSR: Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, CVPRW 2017."""

from torch import Tensor, nn

from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import EdsrSpec


class ResidualBlock(nn.Module):
    """conv, ReLU, conv, added to the input; no normalisation."""

    def __init__(self, num_features: int, residual_scale: float) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.body = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_features, num_features, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        return features + self.residual_scale * self.body(features)


class Edsr(SrModel):
    """Residual trunk on the LR grid, pixel-shuffle tail. See `EdsrSpec`."""

    def __init__(self, spec: EdsrSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.head = nn.Conv2d(spec.channels, width, 3, padding=1)
        blocks = [ResidualBlock(width, spec.residual_scale) for _ in range(spec.num_blocks)]
        self.trunk = nn.Sequential(*blocks, nn.Conv2d(width, width, 3, padding=1))
        self.upsampler = nn.Sequential(*_shuffles(width, spec.scale))
        self.tail = nn.Conv2d(width, spec.channels, 3, padding=1)

    @property
    def receptive_radius(self) -> int:
        """Sum over all 3x3 convolutions, those behind a shuffle at their own grid."""
        return receptive_radius([self.head, self.trunk, self.upsampler, self.tail], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        shallow = self.head(lr)
        return self.tail(self.upsampler(shallow + self.trunk(shallow)))


def _shuffles(num_features: int, scale: int) -> list[nn.Module]:
    """One pixel shuffle for x2 and x3, two of x2 for x4, as published."""
    layers: list[nn.Module] = []
    for factor in (2, 2) if scale == 4 else (scale,):
        layers += [nn.Conv2d(num_features, num_features * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return layers
