"""Bicubic interpolation as a model: the row that every table starts with."""

from torch import Tensor

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel
from kdsr.models.rep_chain import BICUBIC_RADIUS
from kdsr.spec import BicubicSpec


class Bicubic(SrModel):
    """MATLAB's imresize enlarging, a = -0.5. No parameters."""

    def __init__(self, spec: BicubicSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def receptive_radius(self) -> int:
        """Four taps in each direction."""
        return BICUBIC_RADIUS

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        return bicubic_upscale(lr, self.spec.scale)
