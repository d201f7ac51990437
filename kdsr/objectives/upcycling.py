"""Train on more pairs from the same images: the teacher labels what HR cannot.

Source: Zhang et al., Data Upcycling Knowledge Distillation for Image Super-Resolution, arXiv 2309.14162.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr.degrade import bicubic_lr
from kdsr.objectives.step import Parts, Step, Term
from kdsr.terms import UpcyclingTerm


@dataclass(frozen=True)
class Change:
    """What is done to an input, and undone to the output: both networks should agree under it."""

    inverted: bool = False
    mirrored: bool = False
    flipped: bool = False
    transposed: bool = False

    def apply(self, images: Tensor) -> Tensor:
        """(B, C, H, W) changed."""
        images = 1 - images if self.inverted else images
        images = images.flip(-1) if self.mirrored else images
        images = images.flip(-2) if self.flipped else images
        return images.transpose(-1, -2) if self.transposed else images

    def undo(self, images: Tensor) -> Tensor:
        """What `apply` was given."""
        images = images.transpose(-1, -2) if self.transposed else images
        images = images.flip(-2) if self.flipped else images
        images = images.flip(-1) if self.mirrored else images
        return 1 - images if self.inverted else images


class UpcyclingDistance(Term):
    """|S'(u) - T(u)| for crops u of HR, S' under a change; |S(d) - x| + |S(d) - T(d)| for reduced LR d."""

    def __init__(self, config: UpcyclingTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._config, self._scale = config, parts.scale

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        total = step.sr.new_zeros((), dtype=torch.float32)
        if self._config.zoom_in:
            total = total + self._zoom_in(step)
        if self._config.zoom_out:
            total = total + self._zoom_out(step)
        return total

    def _zoom_in(self, step: Step) -> Tensor:
        zoom = step.pair.zoom
        crop = self._crop(step.pair.hr, step.pair.lr.shape[-2:]) if zoom is None else zoom.lr
        change = Change(*(bool(torch.rand(()) < self._config.probability) for _ in range(4)))
        answer = change.undo(step.upscale(change.apply(crop).contiguous()).float())
        return F.l1_loss(answer, step.teach(crop) if zoom is None else zoom.teacher_sr)

    def _crop(self, hr: Tensor, size: torch.Size) -> Tensor:
        """A part of HR that is as large as LR, at the same place for the whole batch."""
        height, width = size
        top = int(torch.randint(hr.shape[-2] - height + 1, ()))
        left = int(torch.randint(hr.shape[-1] - width + 1, ()))
        return hr[..., top : top + height, left : left + width].contiguous()

    def _zoom_out(self, step: Step) -> Tensor:
        lr = step.pair.lr
        height, width = (side // self._scale * self._scale for side in lr.shape[-2:])
        target = lr[..., :height, :width]
        reduced = bicubic_lr(target, self._scale).clamp(0, 1).mul(255).round().div(255)
        answer = step.upscale(reduced).float()
        return F.l1_loss(answer, target.float()) + F.l1_loss(answer, step.teach(reduced))
