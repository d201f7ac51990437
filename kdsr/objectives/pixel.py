"""Train against HR."""

from torch import Tensor

from kdsr.losses import LOSSES
from kdsr.objectives.step import Parts, Step, Term
from kdsr.terms import PixelTerm


class PixelDistance(Term):
    """Distance of SR to HR."""

    def __init__(self, config: PixelTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._distance = LOSSES[config.loss]

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        return self._distance(step.sr, step.pair.hr)
