"""VGG16 and VGG19 to compare images by (Simonyan and Zisserman, ICLR 2015); read from a file, not trained."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kdsr.errors import RequestError

DEPTHS = {"VGG16": (2, 2, 3, 3, 3), "VGG19": (2, 2, 4, 4, 4)}
"""Convolutions of each block; a pooling by 2 follows each."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's RGB in [0, 1], as torchvision's weights expect it."""


class Vgg(nn.Sequential):
    """`conv1_1`, `relu1_1`, ... `pool5`: each is a tap. Takes RGB or grey (B, C, H, W) in [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, depths: Iterable[int], widths: Iterable[int]) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        before, wide = 3, iter(widths)
        for block, depth in enumerate(depths, start=1):
            for number in range(1, depth + 1):
                width = next(wide)
                layers[f"conv{block}_{number}"] = nn.Conv2d(before, width, 3, padding=1)
                layers[f"relu{block}_{number}"] = nn.ReLU()
                before = width
            layers[f"pool{block}"] = nn.MaxPool2d(2)
        super().__init__(layers)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """What the last pooling gives. Grey is three equal colours."""
        normalised: Tensor = (images.expand(-1, 3, -1, -1) - self.mean) / self.deviation
        return super().forward(normalised)

    def min_size(self, taps: Iterable[str]) -> int:
        """Least height and width of images that are seen by `taps`: one pixel must be left of them."""
        names = list(dict(self.named_children()))
        poolings = [sum("pool" in name for name in names[: names.index(tap) + 1]) for tap in taps]
        return int(2 ** max(poolings))


def from_torchvision(state: Mapping[str, Tensor], *, origin: str) -> Vgg | None:
    """The network of a state dict `features.N.weight`, `features.N.bias`; None for another one.

    Raises RequestError for a VGG with batch normalisation, or with other layers.
    """
    if "features.0.weight" not in state:
        return None
    kernels = {
        int(name.split(".")[1]): tensor
        for name, tensor in state.items()
        if name.startswith("features.") and name.endswith(".weight")
    }
    for depths in DEPTHS.values():
        if sorted(kernels) == _places(depths):
            vgg = Vgg(depths, [len(kernels[place]) for place in _places(depths)])
            names = [name for name, layer in vgg.named_children() if isinstance(layer, nn.Conv2d)]
            vgg.load_state_dict(
                {
                    f"{name}.{part}": state[f"features.{place}.{part}"]
                    for name, place in zip(names, _places(depths), strict=True)
                    for part in ("weight", "bias")
                }
            )
            return vgg.eval().requires_grad_(False)
    raise RequestError(
        f"{origin}: expected a {' or '.join(DEPTHS)} without batch normalisation, found weights at "
        f"features {', '.join(map(str, sorted(kernels)))}; take torchvision's plain one"
    )


def _places(depths: Iterable[int]) -> list[int]:
    """N of `features.N` of each convolution: an activation follows each, a pooling each block."""
    places, place = [], 0
    for depth in depths:
        places += [place + 2 * number for number in range(depth)]
        place += 2 * depth + 1
    return places
