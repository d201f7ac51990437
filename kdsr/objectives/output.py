"""Train against the teacher's output for the same LR: what remains of the classical soft targets in SR.

Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; He et al., FAKD, ICIP 2020.
"""

from torch import Tensor

from kdsr.losses import LOSSES
from kdsr.objectives.step import Parts, Step, Term
from kdsr.terms import OutputTerm


class OutputDistance(Term):
    """Distance of SR to the teacher's SR; stored outputs are taken where the batch has them."""

    def __init__(self, config: OutputTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._distance = LOSSES[config.loss]

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        return self._distance(step.sr, step.teacher_sr)
