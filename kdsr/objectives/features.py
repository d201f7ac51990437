"""Train inner features against the teacher's, at pairs of taps.

The functions take features (B, F, h, w) of both in float32 and give a scalar. Grids that differ are averaged
down to the smaller one first; features are compared free of their scale, which a teacher chooses at will.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.objectives.step import Parts, Step, Term
from kdsr.terms import AffinityTerm, AttentionTerm, FeatureTerm, StatisticsTerm, TappedTerm

EPSILON = 1e-6


class OverTaps(Term):
    """Mean over pairs of taps."""

    def __init__(self, config: TappedTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._taps = config.taps

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        values = [self._at(step, number) for number in range(len(self._taps))]
        return torch.stack(values).mean()

    def _at(self, step: Step, number: int) -> Tensor:
        pair = self._taps[number]
        student, teacher = step.features[pair.student], step.teacher_features[pair.teacher]
        return self.at(step, *on_one_grid(student.float(), teacher.float()), number)

    @abstractmethod
    def at(self, step: Step, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """Features (B, F, h, w) of pair `number`, and the step that they are of, to a scalar."""


class TappedDistance(OverTaps):
    """A distance of features that depends on nothing else."""

    def at(self, step: Step, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `OverTaps`."""
        del step
        return self.compare(student, teacher, number)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """Features (B, F, h, w) of pair `number` to a scalar."""


def on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged to the smaller height and width."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def standardised(features: Tensor) -> Tensor:
    """Divided by their root mean square over all but the image, so that only the pattern counts."""
    return features * torch.rsqrt(features.square().mean(dim=(1, 2, 3), keepdim=True) + EPSILON)


class ProjectedDistance(TappedDistance):
    """Student features through a 1x1 convolution of its own, against the teacher's (FitNets, ICLR 2015)."""

    def __init__(self, config: FeatureTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._distance = F.l1_loss if config.loss == "l1" else F.mse_loss
        self.projections = projections(config, parts)

    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `TappedDistance`."""
        return self._distance(self.projections[number](student).float(), standardised(teacher))


def projections(config: TappedTerm, parts: Parts) -> nn.ModuleList:
    """For each pair of taps a 1x1 convolution from the student's width to the teacher's."""
    return nn.ModuleList(
        nn.Conv2d(parts.student_widths[pair.student], parts.teacher_widths[pair.teacher], 1)
        for pair in config.taps
    )


class StatisticsDistance(TappedDistance):
    """Maps of one number a pixel, standardised (SRKD, ACCV 2018)."""

    def __init__(self, config: StatisticsTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._statistic = STATISTICS[config.statistic]

    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `TappedDistance`."""
        del number
        return F.mse_loss(standardised(self._statistic(student)), standardised(self._statistic(teacher)))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "mean_then_square": lambda features: features.mean(dim=1, keepdim=True).square(),
    "square_then_mean": lambda features: features.square().mean(dim=1, keepdim=True),
    "max": lambda features: features.amax(dim=1, keepdim=True),
    "min": lambda features: features.amin(dim=1, keepdim=True),
}


class AttentionDistance(TappedDistance):
    """Where both networks are active: sum over channels of |F|^p, as a direction (ICLR 2017)."""

    def __init__(self, config: AttentionTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._power = config.power

    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `TappedDistance`."""
        del number
        difference = attention(student, self._power) - attention(teacher, self._power)
        return difference.square().sum(dim=1).mean()


def attention(features: Tensor, power: float) -> Tensor:
    """(B, F, h, w) to (B, h*w) of length 1."""
    return F.normalize(features.abs().clamp(min=EPSILON).pow(power).sum(dim=1).flatten(1), dim=1)


class AffinityDistance(TappedDistance):
    """How alike pixels are to each other, or channels, in either network (FAKD, ICIP 2020)."""

    def __init__(self, config: AffinityTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._over, self._pool = config.over, config.pool
        self.projections = nn.ModuleList()
        if config.over == "channels":
            self.projections.extend(
                _as_wide(parts.student_widths[pair.student], parts.teacher_widths[pair.teacher])
                for pair in config.taps
            )

    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `TappedDistance`."""
        size = min(self._pool, student.shape[2]), min(self._pool, student.shape[3])
        student, teacher = (F.adaptive_avg_pool2d(features, size) for features in (student, teacher))
        if self._over == "space":
            return F.l1_loss(spatial_affinity(student), spatial_affinity(teacher))
        student = self.projections[number](student).float()
        return F.l1_loss(channel_affinity(student), channel_affinity(teacher))


def _as_wide(width: int, wanted: int) -> nn.Module:
    return nn.Identity() if width == wanted else nn.Conv2d(width, wanted, 1, bias=False)


def spatial_affinity(features: Tensor) -> Tensor:
    """(B, F, h, w) to the cosines (B, h*w, h*w) between all pairs of pixels."""
    flat = F.normalize(features.flatten(2), dim=1)
    return flat.transpose(1, 2) @ flat


def channel_affinity(features: Tensor) -> Tensor:
    """(B, F, h, w) to the cosines (B, F, F) between all pairs of channels."""
    flat = F.normalize(features.flatten(2), dim=2)
    return flat @ flat.transpose(1, 2)
