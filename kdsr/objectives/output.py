"""Train against the teacher's output for the same LR: what remains of the classical soft targets in SR.

Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; He et al., FAKD, ICIP 2020.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdsr.config import PixelLoss
from kdsr.errors import RequestError
from kdsr.losses import LOSSES
from kdsr.pairs import PairBatch


def output_distance(loss: PixelLoss, teacher: nn.Module | None) -> Callable[[Tensor, PairBatch], Tensor]:
    """Distance of SR (B, C, H, W) to the teacher's SR; stored outputs are taken where the batch has them."""
    distance = LOSSES[loss]

    def term(sr: Tensor, pair: PairBatch) -> Tensor:
        return distance(sr, teacher_output(teacher, pair))

    return term


def teacher_output(teacher: nn.Module | None, pair: PairBatch) -> Tensor:
    """The teacher's SR for `pair.lr`, without a gradient, clamped to [0, 1] as a stored one would be."""
    if pair.teacher_sr is not None:
        return pair.teacher_sr
    if teacher is None:
        raise RequestError("an output term needs a teacher, or shards with its outputs; found neither")
    with torch.inference_mode():
        sr = teacher(pair.lr)
    # An inference tensor may not be saved for a backward pass; its copy may.
    return sr.float().clamp(0, 1).clone()
