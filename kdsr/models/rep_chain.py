"""A plain chain of 3x3 convolutions with branches that exist only in training.

Sources: Ding et al., RepVGG, CVPR 2021; Zhang et al., ECBSR, ACM MM 2021 (branches for SR); Hu et al.,
Online Convolutional Re-parameterization, CVPR 2022 (fold first, then convolve once, in training too).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.before_shuffle import BeforeShuffle
from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import RepChainSpec

BICUBIC_RADIUS = 2

NEGATIVE_SLOPE = 0.1
"""Of the leaky ReLU. With zero, all features can fall silent, and the chain stays bicubic for ever."""


class RepConv(nn.Module):
    """3x3 convolution = 3x3 + 1x1 + (1x1, 3x3), folded on every forward pass.

    The branches are linear and only the 3x3 carries a bias, so zero padding commutes with them and the fold
    is exact. Folding kernels costs less than a hundredth of convolving with three branches. There is no
    identity branch: without normalisation it makes features so large that the first steps go astray.
    """

    radius = 1

    def __init__(self, num_in: int, num_out: int, expansion: int) -> None:
        super().__init__()
        hidden = num_in * expansion
        self.kernel = nn.Parameter(torch.empty(num_out, num_in, 3, 3))
        self.point = nn.Parameter(torch.zeros(num_out, num_in, 1, 1))
        self.expand = nn.Parameter(torch.empty(hidden, num_in))
        self.wide = nn.Parameter(torch.zeros(num_out, hidden, 3, 3))
        self.bias = nn.Parameter(torch.zeros(num_out))
        nn.init.kaiming_normal_(self.kernel, a=NEGATIVE_SLOPE)
        # So small that a step of the wide branch moves the fold by as much as a step of the 3x3 does.
        nn.init.normal_(self.expand, std=1 / hidden)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel (num_out, num_in, 3, 3) and bias (num_out,) of the single convolution."""
        with torch.autocast(self.kernel.device.type, enabled=False):
            kernel = self.kernel + torch.einsum("ohyx,hi->oiyx", self.wide, self.expand)
            return kernel + F.pad(self.point, (1, 1, 1, 1)), self.bias

    @torch.no_grad()
    def set_folded(self, kernel: Tensor, bias: Tensor) -> None:
        """Move the 3x3 branch so that the fold becomes `kernel` and `bias`."""
        self.kernel.add_(kernel - self.folded()[0])
        self.bias.copy_(bias)

    @torch.no_grad()
    def set_single(self, kernel: Tensor, bias: Tensor) -> None:
        """Let the other branches give nothing, so that the fold is `kernel` and `bias` to the last bit."""
        self.point.zero_()
        self.wide.zero_()
        self.kernel.copy_(kernel)
        self.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        """(B, num_in, h, w) to (B, num_out, h, w)."""
        kernel, bias = self.folded()
        return F.conv2d(features, kernel, bias, padding=1)


class RepChain(SrModel):
    """3x3 convolutions with leaky ReLU, pixel shuffle, residual over the bicubic input. See `RepChainSpec`.

    The tail starts at zero, so that an untrained chain is bicubic interpolation.
    """

    spec: RepChainSpec

    def __init__(self, spec: RepChainSpec) -> None:
        super().__init__()
        self.spec = spec
        width, out = spec.num_features, spec.channels * spec.scale**2
        widths = [spec.channels] + [width] * (spec.num_layers - 1) + [out]
        self.layers = nn.ModuleList([_convolution(spec, *pair) for pair in pairwise(widths)])
        self.shuffle = nn.PixelShuffle(spec.scale)
        _start_at_zero(self.layers[-1])

    @property
    def receptive_radius(self) -> int:
        """One pixel a layer, or that of the bicubic residual where it is larger."""
        chain = receptive_radius([self.layers, self.shuffle], self.spec.scale)
        return max(chain, BICUBIC_RADIUS)

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        features = lr
        for layer in self.layers[:-1]:
            features = F.leaky_relu(layer(features), NEGATIVE_SLOPE, inplace=True)
        return self.shuffle(self.layers[-1](features)) + bicubic_upscale(lr, self.spec.scale)

    def before_shuffle(self, dtype: torch.dtype, layout: torch.memory_format) -> BeforeShuffle:
        """See `SrModel`; folded once, and not on every pass."""
        return BeforeShuffle(
            [_folded(layer) for layer in self.layers],
            scale=self.spec.scale,
            negative_slope=NEGATIVE_SLOPE,
            dtype=dtype,
            layout=layout,
        )

    @torch.no_grad()
    def inherit(self, source: "RepChain") -> int:
        """Take the folded layers of `source` that have the same shape; returns how many."""
        taken = 0
        for layer, given in zip(self.layers, source.fold().layers, strict=False):
            kernel, bias = _folded(given)
            if _kernel(layer).shape != kernel.shape:
                continue
            if isinstance(layer, RepConv):
                layer.set_folded(kernel, bias)
            else:
                layer.load_state_dict(given.state_dict())
            taken += 1
        return taken

    def fold(self) -> "RepChain":
        """A copy in which each layer is one 3x3 convolution; the output is equal."""
        if self.spec.folded:
            return self
        copy = RepChain(self.spec.model_copy(update={"folded": True}))
        with torch.no_grad():
            for source, target in zip(self.layers, copy.layers, strict=True):
                kernel, bias = _folded(source)
                target.load_state_dict({"weight": kernel, "bias": bias})
        return copy.train(self.training)


def _convolution(spec: RepChainSpec, num_in: int, num_out: int) -> nn.Module:
    if spec.folded:
        return nn.Conv2d(num_in, num_out, 3, padding=1)
    return RepConv(num_in, num_out, spec.expansion)


def _start_at_zero(tail: nn.Module) -> None:
    """Only the outermost factor of each branch, so that gradients still reach all of them."""
    assert isinstance(tail.bias, Tensor)
    nn.init.zeros_(_kernel(tail))
    nn.init.zeros_(tail.bias)


def _kernel(layer: nn.Module) -> Tensor:
    """The 3x3 weights that `layer` learns."""
    kernel = layer.kernel if isinstance(layer, RepConv) else layer.weight
    assert isinstance(kernel, Tensor)
    return kernel


def _folded(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Kernel and bias of the single convolution that `layer` is, or folds into."""
    if isinstance(layer, RepConv):
        return layer.folded()
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    return layer.weight, layer.bias
