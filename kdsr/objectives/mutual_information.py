"""Train the student's features to say as much as they can about the teacher's, in nats.

For networks without noise the mutual information of features has no finite value: the bounds are losses for
a representation, and what they report compares runs, nothing else.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.objectives.features import TappedDistance, standardised
from kdsr.objectives.step import Parts, Step
from kdsr.terms import CriticTerm, TappedTerm, VariationalTerm

LEAST_SPREAD = 1e-2
FIRST_SPREAD = 1.0


class Bound(TappedDistance):
    """A bound that the student raises; each step tells what it is, free of weights."""

    def __init__(self, config: TappedTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._nats: list[float] = []

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        self._nats = []
        return super().forward(step)

    def compare(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """The bound with its sign turned."""
        bound = self.bound(student, teacher, number)
        self._nats.append(bound.item())
        return -bound

    @abstractmethod
    def bound(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """Features (B, F, h, w) of pair `number` to a scalar in nats."""

    def after_step(self, steps: Sequence[Step]) -> dict[str, float]:
        """The bound in nats, in the mean over taps, for the last batch."""
        del steps
        return {"nats": sum(self._nats) / len(self._nats)}


class VariationalBound(Bound):
    """E log q(teacher | student), with one spread per teacher channel: I(t; s) >= H(t) + E log q(t | s).

    Sources: Ahn et al., VID, CVPR 2019, equations 4 to 7; Lee et al., PISR, ECCV 2020, for Laplace.
    """

    def __init__(self, config: VariationalTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._density = config.density
        self.means, self.spreads = nn.ModuleList(), nn.ParameterList()
        for pair in config.taps:
            wide, wanted = parts.student_widths[pair.student], parts.teacher_widths[pair.teacher]
            self.means.append(
                nn.Sequential(
                    nn.Conv2d(wide, config.num_hidden, 1),
                    nn.LeakyReLU(0.1),
                    nn.Conv2d(config.num_hidden, wanted, 1),
                )
            )
            start = math.log(math.expm1(FIRST_SPREAD - LEAST_SPREAD))
            self.spreads.append(torch.full((1, wanted, 1, 1), start))

    def bound(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """Nats for each feature of the teacher; the bound without H(t), which no training changes."""
        mean = self.means[number](student).float()
        spread = F.softplus(self.spreads[number].float()) + LEAST_SPREAD
        distance = (standardised(teacher) - mean).abs()
        if self._density == "laplace":
            return -(math.log(2.0) + spread.log() + distance / spread).mean()
        return -(0.5 * math.log(2 * math.pi) + spread.log() + 0.5 * (distance / spread).square()).mean()


class CriticBound(Bound):
    """A critic tells features of one place from features of two places; student and critic both help it.

    Sources: van den Oord et al., 2018 (InfoNCE); Hjelm et al., Deep InfoMax, ICLR 2019 (Jensen-Shannon).
    """

    def __init__(self, config: CriticTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._bound, self._positions, self._temperature = config.bound, config.positions, config.temperature
        self.students, self.teachers = nn.ModuleList(), nn.ModuleList()
        for pair in config.taps:
            self.students.append(_embedding(parts.student_widths[pair.student], config.num_embedded))
            self.teachers.append(_embedding(parts.teacher_widths[pair.teacher], config.num_embedded))
        self._negatives = 0

    def bound(self, student: Tensor, teacher: Tensor, number: int) -> Tensor:
        """See `Bound`."""
        places = torch.randperm(student.shape[2] * student.shape[3], device=student.device)[: self._positions]
        scores = self._scores(student, standardised(teacher), places, number)
        self._negatives = len(scores) - 1
        return info_nce(scores) if self._bound == "info_nce" else jensen_shannon(scores)

    def _scores(self, student: Tensor, teacher: Tensor, places: Tensor, number: int) -> Tensor:
        """(N, N): row i is the student's place i, column j the teacher's place j, over the whole batch."""
        embedded = []
        for features, network in ((student, self.students[number]), (teacher, self.teachers[number])):
            chosen = network(features).float().flatten(2)[:, :, places]
            embedded.append(F.normalize(chosen.transpose(1, 2).flatten(0, 1), dim=1))
        return embedded[0] @ embedded[1].T / self._temperature

    def after_step(self, steps: Sequence[Step]) -> dict[str, float]:
        """The same, and among how many others the right one was to be found."""
        return super().after_step(steps) | {"negatives": float(self._negatives)}


def _embedding(width: int, num_embedded: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, num_embedded, 1), nn.LeakyReLU(0.1), nn.Conv2d(num_embedded, num_embedded, 1)
    )


def info_nce(scores: Tensor) -> Tensor:
    """Lower bound of the mutual information in nats from scores (N, N), true pairs on the diagonal.

    It can never be more than log N (van den Oord et al., 2018; Poole et al., ICML 2019).
    """
    right = torch.arange(len(scores), device=scores.device)
    return math.log(len(scores)) - F.cross_entropy(scores, right)


def jensen_shannon(scores: Tensor) -> Tensor:
    """Lower bound of 2 JSD - log 4 in nats, at most 0, from scores (N, N), true pairs on the diagonal.

    JSD is the Jensen-Shannon divergence of pairs and strangers, not the mutual information. Scores that tell
    nothing apart give - log 4 (Nowozin et al., f-GAN, 2016; Hjelm et al., 2019).
    """
    strangers = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    return -F.softplus(-scores.diagonal()).mean() - F.softplus(scores[strangers]).mean()
