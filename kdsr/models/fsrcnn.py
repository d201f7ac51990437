"""FSRCNN: Dong et al., Accelerating the Super-Resolution Convolutional Neural Network, ECCV 2016."""

from torch import Tensor, nn

from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import FsrcnnSpec


class Fsrcnn(SrModel):
    """Extract, shrink, map, expand, transposed convolution. See `FsrcnnSpec`."""

    def __init__(self, spec: FsrcnnSpec) -> None:
        super().__init__()
        self.spec = spec
        wide, narrow = spec.num_features, spec.num_shrunk_features
        layers: list[nn.Module] = [nn.Conv2d(spec.channels, wide, 5, padding=2), nn.PReLU(wide)]
        layers += [nn.Conv2d(wide, narrow, 1), nn.PReLU(narrow)]
        for _ in range(spec.num_mapping_layers):
            layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.PReLU(narrow)]
        layers += [nn.Conv2d(narrow, wide, 1), nn.PReLU(wide)]
        self.body = nn.Sequential(*layers)
        self.tail = nn.ConvTranspose2d(
            wide, spec.channels, 9, stride=spec.scale, padding=4, output_padding=spec.scale - 1
        )

    @property
    def receptive_radius(self) -> int:
        """5x5, the mapping layers, and the taps of the transposed convolution on the LR grid."""
        return receptive_radius([self.body, self.tail], self.spec.scale)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        return self.tail(self.body(lr))
