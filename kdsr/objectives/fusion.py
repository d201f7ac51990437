"""Features guided by attention, and fused: what the teacher's places of interest are good for in training.

At use there is no teacher, so its attention weighs a loss and is never part of the student's forward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.objectives.features import OverTaps, projections, standardised
from kdsr.objectives.step import Parts, Step
from kdsr.terms import AttendedTerm, FusionTerm

EPSILON = 1e-6
NEGATIVE_SLOPE = 0.1
FIRST_SHARE = 0.1
"""Of its usual start that the last layer of a head has, so that its first images are close to bicubic."""


class AttendedDistance(OverTaps):
    """mean of A * |P F_S - F_T|, plus |A_T - A_S|: maps have mean 1, and A is A_T or that of the error."""

    def __init__(self, config: AttendedTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._config = config
        self.projections = projections(config, parts)

    def at(self, step: Step, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `OverTaps`."""
        wanted = standardised(teacher)
        difference = (self.projections[number](student).float() - wanted).abs().mean(dim=1)
        active = self._map(activity(wanted, self._config.power))
        own = self._map(activity(standardised(student), self._config.power))
        weights = active if self._config.by == "teacher" else self._map(self._error(step, student))
        return (weights * difference).mean() + F.l1_loss(own, active)

    def _map(self, values: Tensor) -> Tensor:
        return attention_map(values, self._config.temperature)

    def _error(self, step: Step, like: Tensor) -> Tensor:
        """(B, h, w): how far the outputs are apart, with a root mean square of 1; without a gradient."""
        error = (step.sr.detach().float() - step.teacher_sr).abs().mean(dim=1, keepdim=True)
        return standardised(F.adaptive_avg_pool2d(error, (like.shape[2], like.shape[3])))[:, 0]


def activity(features: Tensor, power: float) -> Tensor:
    """(B, F, h, w) to (B, h, w): mean over channels of |F|^power."""
    return features.abs().clamp(min=EPSILON).pow(power).mean(dim=1)


def attention_map(values: Tensor, temperature: float) -> Tensor:
    """(B, h, w) to softmax over all places times their number, so that its mean is 1."""
    batch, height, width = values.shape
    shares = torch.softmax(values.flatten(1) / temperature, dim=1)
    return (height * width * shares).view(batch, height, width)


class Fusion(nn.Module):
    """What learns for one pair of taps: a projection, a gate, and a head that makes an image."""

    def __init__(self, student: int, teacher: int, config: FusionTerm, parts: Parts) -> None:
        super().__init__()
        self._scale = parts.scale
        self.project = nn.Conv2d(student, teacher, 1)
        self.gate = nn.Conv2d(2 * teacher, teacher, 3, padding=1)
        tail = nn.Conv2d(config.num_hidden, parts.channels * parts.scale**2, 3, padding=1)
        with torch.no_grad():
            tail.weight.mul_(FIRST_SHARE)
        self.head = nn.Sequential(
            nn.Conv2d(teacher, config.num_hidden, 3, padding=1),
            nn.LeakyReLU(NEGATIVE_SLOPE),
            tail,
            nn.PixelShuffle(parts.scale),
        )

    def forward(self, student: Tensor, teacher: Tensor, lr: Tensor, may_look: Tensor) -> Tensor:
        """Features of both (B, F, h, w) to an image; `may_look` (B, 1, 1, 1) is 1 where F_T takes part."""
        own = self.project(student)
        gate = may_look * torch.sigmoid(self.gate(torch.cat([teacher, own], dim=1)))
        fused = F.adaptive_avg_pool2d(gate * teacher + (1 - gate) * own, (lr.shape[2], lr.shape[3]))
        image: Tensor = self.head(fused).float() + bicubic_upscale(lr, self._scale)
        return image


class FusionDistance(OverTaps):
    """|y_M - y| + |S - y_M| of an image y_M from fused features; the second moves the student alone.

    With both always in the fusion the gate opens to the teacher, whose features are better, and no gradient
    is left for the student's. So images drawn anew each time have to do with the student's alone.
    """

    def __init__(self, config: FusionTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._teacher_share = config.teacher_share
        self.fusions = nn.ModuleList(
            Fusion(parts.student_widths[pair.student], parts.teacher_widths[pair.teacher], config, parts)
            for pair in config.taps
        )

    def at(self, step: Step, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `OverTaps`."""
        drawn = torch.rand(len(student), 1, 1, 1, device=student.device)
        may_look = (drawn < self._teacher_share).float()
        image = self.fusions[number](student, standardised(teacher), step.pair.lr, may_look)
        return F.l1_loss(image, step.pair.hr) + F.l1_loss(step.sr.float(), image.detach())
