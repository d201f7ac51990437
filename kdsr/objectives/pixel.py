"""Train against HR."""

from torch import Tensor

from kdsr.losses import LOSSES
from kdsr.objectives.step import Step, Term, Widths
from kdsr.terms import PixelTerm


class PixelDistance(Term):
    """Distance of SR to HR."""

    def __init__(self, config: PixelTerm, widths: Widths) -> None:
        super().__init__(config, widths)
        self._distance = LOSSES[config.loss]

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        return self._distance(step.sr, step.pair.hr)
