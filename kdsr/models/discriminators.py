"""Networks that judge pictures or features: trained beside a network, never exported.

Logits above zero mean "real". There is no batch normalisation, which would let one sample's verdict depend on
the others of its batch.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from kdsr.errors import RequestError
from kdsr.spec import (
    DiscriminatorBase,
    DiscriminatorSpec,
    Frozen,
    PatchDiscriminatorSpec,
    SrganDiscriminatorSpec,
    UnetDiscriminatorSpec,
)

NEGATIVE_SLOPE = 0.2
MOST_WIDENING = 8
"""Layers have at most so many times the features of the first one, as published."""


class Discriminator(nn.Module):
    """(B, C, h, w) to logits (B, 1, h', w'), for any h and w from `spec.min_size` on."""

    spec: DiscriminatorSpec

    def check(self, judged: Tensor) -> None:
        """Raise RequestError unless the channels are those of the spec and the patch is large enough."""
        spec = self.spec
        if judged.dim() != 4 or judged.shape[1] != spec.channels or min(judged.shape[2:]) < spec.min_size:
            raise RequestError(
                f"discriminator {spec.kind}: expected input (B, {spec.channels}, h, w) with h and w at least "
                f"{spec.min_size}, found {tuple(judged.shape)}; use larger patches or another discriminator"
            )


class SrganDiscriminator(Discriminator):
    """3x3 convolutions that halve the grid four times, then one verdict. See `SrganDiscriminatorSpec`.

    The mean over the grid stands where the published network has a dense layer for one size of patch.
    """

    def __init__(self, spec: SrganDiscriminatorSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        num_in = spec.channels
        for level in range(4):
            width = spec.num_features * 2**level
            layers += [_convolution(spec, num_in, width, 3), nn.LeakyReLU(NEGATIVE_SLOPE)]
            layers += [_convolution(spec, width, width, 3, stride=2), nn.LeakyReLU(NEGATIVE_SLOPE)]
            num_in = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            _convolution(spec, num_in, 2 * num_in, 1),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            _convolution(spec, 2 * num_in, 1, 1),
        )

    def forward(self, judged: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 1, 1, 1)."""
        self.check(judged)
        logits: Tensor = self.head(self.body(judged))
        return logits


class PatchDiscriminator(Discriminator):
    """4x4 convolutions, each logit from its own patch. See `PatchDiscriminatorSpec`."""

    def __init__(self, spec: PatchDiscriminatorSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        num_in = spec.channels
        for level in range(spec.num_levels + 1):
            width = spec.num_features * min(2**level, MOST_WIDENING)
            stride = 2 if level < spec.num_levels else 1
            layers += [_convolution(spec, num_in, width, 4, stride=stride), nn.LeakyReLU(NEGATIVE_SLOPE)]
            num_in = width
        self.body = nn.Sequential(*layers, _convolution(spec, num_in, 1, 4))

    def forward(self, judged: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 1, h/2**L - 2, w/2**L - 2), rounded down, with L the spec's `num_levels`."""
        self.check(judged)
        logits: Tensor = self.body(judged)
        return logits


class UnetDiscriminator(Discriminator):
    """Three levels down and up with added skips, one logit for each pixel. See `UnetDiscriminatorSpec`."""

    def __init__(self, spec: UnetDiscriminatorSpec) -> None:
        super().__init__()
        self.spec = spec
        widths = [spec.num_features * 2**level for level in range(4)]
        pairs = list(pairwise(widths))
        self.head = _convolution(spec, spec.channels, widths[0], 3)
        self.down = nn.ModuleList(_convolution(spec, wide, deep, 4, stride=2) for wide, deep in pairs)
        self.up = nn.ModuleList(_convolution(spec, deep, wide, 3) for wide, deep in reversed(pairs))
        self.tail = nn.Sequential(
            _convolution(spec, widths[0], widths[0], 3),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            _convolution(spec, widths[0], widths[0], 3),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            _convolution(spec, widths[0], 1, 3),
        )

    def forward(self, judged: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 1, h, w)."""
        self.check(judged)
        features, skips = F.leaky_relu(self.head(judged), NEGATIVE_SLOPE), []
        for down in self.down:
            skips.append(features)
            features = F.leaky_relu(down(features), NEGATIVE_SLOPE)
        for up, skip in zip(self.up, reversed(skips), strict=True):
            features = F.interpolate(features, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            features = F.leaky_relu(up(features), NEGATIVE_SLOPE) + skip
        logits: Tensor = self.tail(features)
        return logits


DISCRIMINATORS: Mapping[type[Frozen], type[Discriminator]] = {
    SrganDiscriminatorSpec: SrganDiscriminator,
    PatchDiscriminatorSpec: PatchDiscriminator,
    UnetDiscriminatorSpec: UnetDiscriminator,
}


def build_discriminator(spec: DiscriminatorSpec) -> Discriminator:
    """A freshly initialised discriminator for `spec`."""
    return DISCRIMINATORS[type(spec)](spec)


def _convolution(
    spec: DiscriminatorBase, num_in: int, num_out: int, kernel_size: int, *, stride: int = 1
) -> nn.Module:
    padding = 0 if kernel_size == 1 else 1
    layer = nn.Conv2d(num_in, num_out, kernel_size, stride=stride, padding=padding)
    return parametrizations.spectral_norm(layer) if spec.spectral_norm else layer
