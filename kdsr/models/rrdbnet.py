"""RRDBNet, the generator of ESRGAN: Wang et al., Enhanced Super-Resolution GANs, ECCV Workshops 2018.

Submodules have the names of the public checkpoints, and `from_public` reads these with their older names too.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.models.contract import SrModel, mirrored_up, receptive_radius
from kdsr.spec import RrdbnetSpec

NEGATIVE_SLOPE = 0.2
RESIDUAL_SCALE = 0.2
INITIAL_SCALE = 0.1
"""Of the residual blocks' first weights: deep networks without normalisation begin better small."""


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of which sees the input and all before it; added to the input."""

    def __init__(self, num_features: int, num_growth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_features, num_growth, 3, padding=1)
        self.conv2 = nn.Conv2d(num_features + num_growth, num_growth, 3, padding=1)
        self.conv3 = nn.Conv2d(num_features + 2 * num_growth, num_growth, 3, padding=1)
        self.conv4 = nn.Conv2d(num_features + 3 * num_growth, num_growth, 3, padding=1)
        self.conv5 = nn.Conv2d(num_features + 4 * num_growth, num_features, 3, padding=1)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5):
            nn.init.kaiming_normal_(convolution.weight)
            convolution.weight.data.mul_(INITIAL_SCALE)
            nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        seen = features
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, F.leaky_relu(convolution(seen), NEGATIVE_SLOPE)], dim=1)
        return features + RESIDUAL_SCALE * self.conv5(seen)


class ResidualInResidual(nn.Module):
    """Three dense blocks, added to the input."""

    def __init__(self, num_features: int, num_growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(num_features, num_growth)
        self.rdb2 = DenseBlock(num_features, num_growth)
        self.rdb3 = DenseBlock(num_features, num_growth)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        return features + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(features)))


class Rrdbnet(SrModel):
    """Dense trunk on the LR grid, nearest-neighbour enlargement with convolutions. See `RrdbnetSpec`."""

    spec: RrdbnetSpec

    def __init__(self, spec: RrdbnetSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.num_features
        self.unshuffle = nn.PixelUnshuffle(spec.multiple_of)
        self.conv_first = nn.Conv2d(spec.channels * spec.multiple_of**2, width, 3, padding=1)
        self.body = nn.Sequential(
            *(ResidualInResidual(width, spec.num_growth) for _ in range(spec.num_blocks))
        )
        self.conv_body = nn.Conv2d(width, width, 3, padding=1)
        self._factors = (2, 2) if spec.scale * spec.multiple_of == 4 else (spec.scale,)
        self.conv_up1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_up2 = nn.Conv2d(width, width, 3, padding=1) if len(self._factors) == 2 else None
        self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, spec.channels, 3, padding=1)

    @property
    def receptive_radius(self) -> int:
        """Sixteen pixels for each block and more: an exact halo for the whole trunk."""
        layers: list[nn.Module] = [self.unshuffle, self.conv_first, self.body, self.conv_body]
        for factor, convolution in zip(self._factors, self._enlarging(), strict=True):
            layers += [nn.Upsample(scale_factor=factor), convolution]
        layers += [self.conv_hr, self.conv_last]
        return receptive_radius(layers, self.spec.scale, multiple_of=self.spec.multiple_of)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`. With `unshuffle`, an odd size is mirrored up by a pixel and cut back."""
        self.check_channels(lr)
        height, width = (side * self.spec.scale for side in lr.shape[-2:])
        shallow = self.conv_first(self.unshuffle(mirrored_up(lr, multiple_of=self.spec.multiple_of)))
        features = shallow + self.conv_body(self.body(shallow))
        for factor, convolution in zip(self._factors, self._enlarging(), strict=True):
            features = F.leaky_relu(convolution(F.interpolate(features, scale_factor=factor)), NEGATIVE_SLOPE)
        sr: Tensor = self.conv_last(F.leaky_relu(self.conv_hr(features), NEGATIVE_SLOPE))
        return sr[..., :height, :width]

    def _enlarging(self) -> list[nn.Conv2d]:
        return [self.conv_up1] if self.conv_up2 is None else [self.conv_up1, self.conv_up2]


# ---------------------------------------------------------------- public checkpoints

_OLDER_NAMES = (
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"trunk_conv\.", "conv_body."),
    (r"upconv(\d)\.", r"conv_up\1."),
    (r"HRconv\.", "conv_hr."),
    (r"model\.0\.", "conv_first."),
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1"),
    (r"model\.3\.", "conv_up1."),
)
_OLDER_TAILS = {
    (5, 7): {5: "conv_hr", 7: "conv_last"},
    (6, 8, 10): {6: "conv_up2", 8: "conv_hr", 10: "conv_last"},
}
"""In numbered checkpoints the layers behind `conv_up1` tell the scale."""


def from_public(tensors: Mapping[str, Tensor]) -> Rrdbnet | None:
    """The network with these weights; None when they are of another architecture, or of a scale but x2 or x4.

    Raises RuntimeError when the names are right and the sizes are not.
    """
    given = _renamed(tensors)
    blocks = {int(name.split(".")[1]) for name in given if re.match(r"body\.\d+\.rdb1\.conv1\.weight$", name)}
    first, last = given.get("conv_first.weight"), given.get("conv_last.weight")
    if not blocks or first is None or last is None or any("conv1x1" in name for name in given):
        return None
    channels, by_two = len(last), 2 if "conv_up2.weight" not in given else 4
    unshuffle = len(first[0]) == 4 * channels and by_two == 4
    if channels not in (1, 3) or not (unshuffle or len(first[0]) == channels):
        return None
    growth = given["body.0.rdb1.conv1.weight"] if 0 in blocks else first
    spec = RrdbnetSpec(
        scale=2 if unshuffle or by_two == 2 else 4,
        channels=1 if channels == 1 else 3,
        num_features=len(first),
        num_growth=len(growth),
        num_blocks=len(blocks),
        unshuffle=unshuffle,
    )
    with torch.device("meta"):
        network = Rrdbnet(spec)
    network.load_state_dict({name: tensor.float() for name, tensor in given.items()}, assign=True)
    return network.requires_grad_(True)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    numbered = sorted({int(m[1]) for name in tensors if (m := re.match(r"model\.(\d+)\.", name))})
    tail = _OLDER_TAILS.get(tuple(number for number in numbered if number > 3), {})
    names = {name: name for name in tensors}
    for older, newer in (*_OLDER_NAMES, *((rf"model\.{n}\.", f"{name}.") for n, name in tail.items())):
        names = {name: re.sub(f"^{older}", newer, changed) for name, changed in names.items()}
    return {names[name]: tensor for name, tensor in tensors.items()}
