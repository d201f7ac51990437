"""What every network promises, and how its receptive radius follows from its layers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kdsr.errors import RequestError
from kdsr.models.before_shuffle import BeforeShuffle
from kdsr.spec import ModelSpec


class SrModel(nn.Module, ABC):
    """`(B, C, h, w)` in [0, 1] to `(B, C, h*scale, w*scale)`, unclamped, any h and w."""

    spec: ModelSpec

    @property
    @abstractmethod
    def receptive_radius(self) -> int:
        """LR pixels around a pixel that can change its output block; the halo that tiles need."""

    @abstractmethod
    def forward(self, lr: Tensor) -> Tensor:
        """Upscale `lr`."""

    @property
    def last_convolution(self) -> nn.Module | None:
        """What makes the output from the last features: the convolution that was registered last, if any."""
        kinds = (nn.Conv2d, nn.ConvTranspose2d, Convolves)
        found = [module for module in self.modules() if isinstance(module, kinds)]
        return found[-1] if found else None

    def before_shuffle(self, dtype: torch.dtype, layout: torch.memory_format) -> BeforeShuffle | None:
        """This network's weights up to its pixel shuffle, for inference; None where it does not end in one.

        It takes grey levels 0 to 255 and gives what pixels are rounded from, where that costs least.
        """
        del dtype, layout
        return None

    def check_channels(self, lr: Tensor) -> None:
        """Raise RequestError unless `lr` has the channels that the spec names."""
        if lr.dim() != 4 or lr.shape[1] != self.spec.channels:
            raise RequestError(
                f"{self.spec.kind}: expected input (B, {self.spec.channels}, h, w), found {tuple(lr.shape)}; "
                f"use a model with as many channels as the image"
            )


@runtime_checkable
class Convolves(Protocol):
    """A module that acts as one convolution, whatever it is made of."""

    radius: int


@runtime_checkable
class Spans(Protocol):
    """A module that says itself what it looks at."""

    def span(self, low: int, high: int) -> tuple[int, int]:
        """First and last row of its input that rows `low` to `high` of its output depend on."""
        ...


def receptive_radius(layers: Iterable[nn.Module], scale: int, *, multiple_of: int = 1) -> int:
    """LR radius of a network that runs `layers` one after the other and ends on the `scale` grid.

    Walks back from one LR pixel's block of outputs and keeps the interval of pixels it depends on, so
    that convolutions behind a pixel shuffle count for what they are on the LR grid. Where the network has
    a grid of its own, `multiple_of` LR pixels wide, the widest interval of all places in it counts.
    """
    leaves = list(_leaves(layers))
    return max(_radius(leaves, scale, place) for place in range(multiple_of))


def _radius(leaves: list[nn.Module], scale: int, place: int) -> int:
    low, high = place * scale, place * scale + scale - 1
    for layer in reversed(leaves):
        if isinstance(layer, Convolves):
            low, high = low - layer.radius, high + layer.radius
        elif isinstance(layer, Spans):
            low, high = layer.span(low, high)
        elif isinstance(layer, nn.PixelUnshuffle):
            factor = layer.downscale_factor
            low, high = low * factor, high * factor + factor - 1
        elif isinstance(layer, nn.Upsample):  # nearest
            assert isinstance(layer.scale_factor, float)
            low, high = low // int(layer.scale_factor), high // int(layer.scale_factor)
        elif isinstance(layer, nn.PixelShuffle):
            low, high = low // layer.upscale_factor, high // layer.upscale_factor
        elif isinstance(layer, nn.ConvTranspose2d):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
            low, high = -((kernel - 1 - padding - low) // stride), (high + padding) // stride
        elif isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
            first = -int(layer.padding[0])
            low, high = (
                low * layer.stride[0] + first,
                high * layer.stride[0] + first + layer.kernel_size[0] - 1,
            )
        elif isinstance(layer, nn.Conv2d):
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1) // 2
            low, high = low - reach, high + reach
    return max(place - low, high - place)


def mirrored_up(lr: Tensor, *, multiple_of: int, min_size: int = 1) -> Tensor:
    """`lr` (B, C, h, w) mirrored at the bottom and right, back and forth where that is not enough."""
    for dim in (-2, -1):
        side = lr.shape[dim]
        accepted = max(min_size, side + -side % multiple_of)
        if accepted > side:
            period = max(1, 2 * (side - 1))
            place = torch.arange(accepted, device=lr.device) % period
            lr = lr.index_select(dim, torch.minimum(place, period - place))
    return lr


def _leaves(layers: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for layer in layers:
        children = list(layer.children())
        if isinstance(layer, Convolves | Spans) or not children:
            yield layer
        else:
            yield from _leaves(children)
