"""What small networks have in common: blocks on the LR grid that correct bicubic interpolation."""

from collections.abc import Iterable

from torch import Tensor, nn

from kdsr.degrade import bicubic_upscale
from kdsr.models.contract import SrModel, receptive_radius
from kdsr.spec import DamSpec, MobileSpec, MultiScaleSpec, ShuffleSpec


class OverBicubic(SrModel):
    """3x3 head or another one, blocks, 3x3 tail, pixel shuffle, residual over the bicubic input.

    The head has the name of the spec's extractor. The tail starts at zero, so that an untrained network is
    bicubic interpolation.
    """

    spec: MobileSpec | ShuffleSpec | MultiScaleSpec | DamSpec

    def __init__(
        self,
        spec: MobileSpec | ShuffleSpec | MultiScaleSpec | DamSpec,
        blocks: Iterable[nn.Module],
        *,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.add_module(spec.extractor, head or nn.Conv2d(spec.channels, spec.num_features, 3, padding=1))
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(spec.num_features, spec.channels * spec.scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(spec.scale)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    @property
    def receptive_radius(self) -> int:
        """That of head and blocks, and one pixel for the tail."""
        head = self.get_submodule(self.spec.extractor)
        return receptive_radius([head, self.blocks, self.tail, self.shuffle], self.spec.scale)

    def body(self, shallow: Tensor) -> Tensor:
        """Features (B, F, h, w) of the head to those that the tail gets."""
        deep: Tensor = self.blocks(shallow)
        return deep

    def forward(self, lr: Tensor) -> Tensor:
        """See `SrModel`."""
        self.check_channels(lr)
        shallow = self.get_submodule(self.spec.extractor)(lr)
        sr: Tensor = self.shuffle(self.tail(self.body(shallow)))
        return sr + bicubic_upscale(lr, self.spec.scale)
