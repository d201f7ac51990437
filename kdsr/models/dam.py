"""Domain-aware attention: residual convolutions gated by what kind of place each pixel lies in.

Each block estimates from the mean and the deviation of a small window which domain a place belongs to (flat,
edge, texture, ...: they are learned), and each domain has its own gain for every channel. Windows of fixed
size stand where global pooling is usual, so the network is local and its tiles equal the whole image.
Related: Hu et al., Squeeze-and-Excitation, CVPR 2018 (gains from pooled features); Kong et al., ClassSR, CVPR
2021 (restoring easy and hard places differently).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.models.over_bicubic import OverBicubic
from kdsr.spec import DamSpec

NEGATIVE_SLOPE = 0.1
FIRST_SHARE = 0.5
"""Of its usual start that the last convolution of a block has, so that many blocks in a row stay small."""
WINDOW = 5
"""Side of the window whose statistics tell domains apart."""
SMALLEST_VARIANCE = 1e-4
"""Added to a variance, so that its root has a bounded gradient where all is flat."""


class Extractor(nn.Module):
    """A 3x3 convolution and a residual one: the shallow features that teacher and student can share."""

    radius = 2

    def __init__(self, channels: int, num_features: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, num_features, 3, padding=1)
        self.refine = nn.Conv2d(num_features, num_features, 3, padding=1)

    def forward(self, lr: Tensor) -> Tensor:
        """(B, C, h, w) to (B, F, h, w)."""
        shallow = self.first(lr)
        return shallow + self.refine(F.leaky_relu(shallow, NEGATIVE_SLOPE))


class DomainAttention(nn.Module):
    """A gain around 1 for each channel at each place, from the domain that its surroundings belong to."""

    radius = WINDOW // 2 + 1

    def __init__(self, num_features: int, num_domains: int) -> None:
        super().__init__()
        squeezed = squeezed_width(num_features)
        self.squeeze = nn.Conv2d(num_features, squeezed, 1)
        self.around = nn.Conv2d(2 * squeezed, 2 * squeezed, 3, padding=1, groups=2 * squeezed)
        self.assign = nn.Conv2d(2 * squeezed, num_domains, 1)
        self.domains = nn.Softmax(dim=1)
        self.gains = nn.Conv2d(num_domains, num_features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to gains of the same shape, between 0 and 2."""
        statistics = local_statistics(self.squeeze(features))
        domains = self.domains(self.assign(F.leaky_relu(self.around(statistics), NEGATIVE_SLOPE)))
        return 2 * torch.sigmoid(self.gains(domains))


class DamBlock(nn.Module):
    """conv, leaky ReLU, conv, weighted by the domain of the block's input and added to it."""

    radius = max(2, DomainAttention.radius)

    def __init__(self, num_features: int, num_domains: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.second = nn.Conv2d(num_features, num_features, 3, padding=1)
        self.attention = DomainAttention(num_features, num_domains)
        with torch.no_grad():
            self.second.weight.mul_(FIRST_SHARE)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) to the same."""
        change = self.second(F.leaky_relu(self.first(features), NEGATIVE_SLOPE))
        return features + self.attention(features) * change


class Dam(OverBicubic):
    """Extractor, blocks with a long residual, tail. See `DamSpec`."""

    spec: DamSpec

    def __init__(self, spec: DamSpec) -> None:
        blocks = (DamBlock(spec.num_features, spec.num_domains) for _ in range(spec.num_blocks))
        super().__init__(spec, blocks, head=Extractor(spec.channels, spec.num_features))

    def body(self, shallow: Tensor) -> Tensor:
        """See `OverBicubic`."""
        return shallow + super().body(shallow)


def squeezed_width(num_features: int) -> int:
    """Channels whose statistics are taken."""
    return max(4, num_features // 4)


def local_statistics(features: Tensor) -> Tensor:
    """(B, G, h, w) to (B, 2G, h, w): mean and deviation over the window, cut off at the border."""
    # A small difference of large squares: float32 whatever the rest is computed in.
    with torch.autocast(features.device.type, enabled=False):
        precise = features if features.dtype == torch.float64 else features.float()
        mean = _window_mean(precise)
        variance = (_window_mean(precise.square()) - mean.square()).clamp(min=0)
        found = torch.cat([mean, (variance + SMALLEST_VARIANCE).sqrt()], dim=1)
    return found.to(features.dtype)


def _window_mean(features: Tensor) -> Tensor:
    return F.avg_pool2d(features, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)
