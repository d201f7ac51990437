"""A U-Net for SR: Ronneberger et al., U-Net, MICCAI 2015, with a pixel-shuffle tail and no normalisation."""

import torch
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, mirrored_up, receptive_radius
from kdsr.spec import UnetSpec

NEGATIVE_SLOPE = 0.1


class Unet(SrModel):
    """Encoder and decoder with skips on the LR grid, residual over bicubic. See `UnetSpec`.

    The tail starts at zero, so that an untrained network is bicubic interpolation.
    """

    spec: UnetSpec

    def __init__(self, spec: UnetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.num_features * 2**level for level in range(spec.num_levels + 1)]
        above, below = widths[:-1], widths[1:]
        self.head = nn.Conv2d(spec.channels, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(_two_convolutions(width, width) for width in above)
        self.down = nn.ModuleList(nn.Conv2d(*pair, 2, stride=2) for pair in zip(above, below, strict=True))
        self.bottom = _two_convolutions(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(deep, wide, 2, stride=2) for wide, deep in zip(above, below, strict=True)
        )
        self.decoder = nn.ModuleList(_two_convolutions(2 * width, width) for width in above)
        tail = nn.Conv2d(widths[0], spec.channels * spec.scale**2, 3, padding=1)
        nn.init.zeros_(tail.weight)
        nn.init.zeros_(tail.bias)  # type: ignore[arg-type]
        self.tail = nn.Sequential(tail, nn.PixelShuffle(spec.scale))

    @property
    def receptive_radius(self) -> int:
        """That of the way through the bottom; a skip sees less."""
        down = [layer for pair in zip(self.encoder, self.down, strict=True) for layer in pair]
        up = [layer for pair in zip(self.decoder, self.up, strict=True) for layer in pair]
        layers = [self.head, *down, self.bottom, *reversed(up), self.tail]
        return receptive_radius(layers, self.spec.scale, multiple_of=self.spec.multiple_of)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`. Other sizes than multiples of 2**num_levels are mirrored up and cut back."""
        self.check_channels(lr)
        height, width = (side * self.spec.scale for side in lr.shape[-2:])
        lr = mirrored_up(lr, multiple_of=self.spec.multiple_of)
        features, skips = self.head(lr), []
        for encode, down in zip(self.encoder, self.down, strict=True):
            features = encode(features)
            skips.append(features)
            features = down(features)
        features = self.bottom(features)
        for decode, up, skip in zip(reversed(self.decoder), reversed(self.up), reversed(skips), strict=True):
            features = decode(torch.cat([up(features), skip], dim=1))
        sr: Tensor = bicubic_upscale(lr, self.spec.scale) + self.tail(features)
        return sr[..., :height, :width]


def _two_convolutions(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, padding=1),
        nn.LeakyReLU(NEGATIVE_SLOPE),
        nn.Conv2d(num_out, num_out, 3, padding=1),
        nn.LeakyReLU(NEGATIVE_SLOPE),
    )
