"""SRResNet: Ledig et al., Photo-Realistic Single Image Super-Resolution Using a GAN, CVPR 2017."""

from torch import Tensor, nn

from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import SrresnetSpec


class ResidualBlock(nn.Module):
    """conv, PReLU, conv, added to the input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_features, num_features, 3, padding=1),
            nn.PReLU(num_features),
            nn.Conv2d(num_features, num_features, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        return features + self.body(features)


class Srresnet(SrModel):
    """9x9 head and tail around a residual trunk, pixel shuffles between them. See `SrresnetSpec`."""

    def __init__(self, spec: SrresnetSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.head = nn.Sequential(nn.Conv2d(spec.channels, width, 9, padding=4), nn.PReLU(width))
        blocks = [ResidualBlock(width) for _ in range(spec.num_blocks)]
        self.trunk = nn.Sequential(*blocks, nn.Conv2d(width, width, 3, padding=1))
        layers: list[nn.Module] = []
        for factor in (2, 2) if spec.scale == 4 else (spec.scale,):
            widening = nn.Conv2d(width, width * factor**2, 3, padding=1)
            layers += [widening, nn.PixelShuffle(factor), nn.PReLU(width)]
        self.upsampler = nn.Sequential(*layers)
        self.tail = nn.Conv2d(width, spec.channels, 9, padding=4)

    @property
    def receptive_radius(self) -> int:
        """Sum over all convolutions, those behind a shuffle at their own grid."""
        return receptive_radius([self.head, self.trunk, self.upsampler, self.tail], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        shallow = self.head(lr)
        return self.tail(self.upsampler(shallow + self.trunk(shallow)))
