"""Train against HR."""

from collections.abc import Callable

from torch import Tensor

from kdsr.config import PixelLoss
from kdsr.losses import LOSSES
from kdsr.pairs import PairBatch


def pixel_distance(loss: PixelLoss) -> Callable[[Tensor, PairBatch], Tensor]:
    """Distance of SR (B, C, H, W) to HR."""
    distance = LOSSES[loss]

    def term(sr: Tensor, pair: PairBatch) -> Tensor:
        return distance(sr, pair.hr)

    return term
