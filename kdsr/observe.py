"""Look inside a teacher: features at its taps, reduced to the principal directions of each tap.

Directions are those of the second moment, not of the covariance: nothing is subtracted, so that lengths and
cosines between places, which the terms compare, are kept as well as so few channels can.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdsr.config import StoredFeatures
from kdsr.errors import DataError, RequestError
from kdsr.image import Image
from kdsr.models import SrModel
from kdsr.objectives.step import Taps
from kdsr.spec import StoredTap

PROBE_SIZE = 32
"""Least height and width of the input with which width and grid of features are found."""


class Observer:
    """A teacher whose features are read. One pass over a whole picture gives its output and all of them.

    Memory grows with the picture. Raises RequestError for a tap that does not exist.
    """

    def __init__(
        self, model: SrModel, taps: Sequence[str], *, device: str = "cpu", precision: str = "float32"
    ) -> None:
        self._model = model.to(device).eval()
        self._device = torch.device(device)
        self._autocast = torch.bfloat16 if precision == "bfloat16" else None
        self._taps = Taps(model, taps, who="the teacher")

    def look(self, lr: Image) -> tuple[np.ndarray, dict[str, Tensor]]:
        """8-bit SR (H, W, C), and features (F, h', w') in float32 by the name of their tap."""
        pixels = torch.from_numpy(lr.pixels.copy()).to(self._device).permute(2, 0, 1)[None].float() / 255
        sr, features = self._pass(pixels)
        levels = (sr[0].float().clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(1, 2, 0).cpu().numpy(), {n: found[0].float() for n, found in features.items()}

    def describe(self, wanted: Iterable[StoredFeatures]) -> tuple[StoredTap, ...]:
        """Width and grid of each tap. Raises RequestError for features that are on no grid of LR's."""
        step = getattr(self._model.spec, "multiple_of", 1)
        side = -(-max(PROBE_SIZE, getattr(self._model.spec, "min_size", 1)) // step) * step
        grey = torch.full((1, self._model.spec.channels, side, side), 0.5, device=self._device)
        _, features = self._pass(grey)
        return tuple(_described(each, features[each.tap], side) for each in wanted)

    def _pass(self, lr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        dtype, enabled = self._autocast, self._autocast is not None
        with torch.inference_mode(), torch.autocast(self._device.type, dtype=dtype, enabled=enabled):
            return self._taps.read(lambda: self._model(lr))


def _described(wanted: StoredFeatures, features: Tensor, side: int) -> StoredTap:
    width, *grid = features.shape[1:]
    if grid[0] != grid[1] or side % grid[0]:
        raise RequestError(
            f"tap {wanted.tap!r} of the teacher gives features of {grid[0]} x {grid[1]} for LR of {side} x "
            f"{side}; expected LR's size or an integer fraction of it; choose another tap"
        )
    return StoredTap(tap=wanted.tap, width=width, rank=min(width, wanted.rank), stride=side // grid[0])


@dataclass(frozen=True)
class Directions:
    """What features of one tap are projected on."""

    vectors: Tensor
    """(F, F), orthonormal columns, the strongest direction first."""
    energies: Tensor
    """(F,): the mean square of features along each."""

    def kept(self, rank: int) -> float:
        """Share of the energy that the first `rank` hold."""
        return round((self.energies[:rank].sum() / self.energies.sum()).item(), 4)


def fit_directions(samples: Iterable[Mapping[str, Tensor]]) -> dict[str, Directions]:
    """Principal directions by tap, from features (F, h', w') by tap of each sample."""
    moments: dict[str, Tensor] = {}
    for features in samples:
        for tap, found in features.items():
            flat = found.double().flatten(1)
            moment = flat @ flat.T / flat.shape[1]
            moments[tap] = moments[tap] + moment if tap in moments else moment
    return {tap: _directions(moment) for tap, moment in moments.items()}


def _directions(moment: Tensor) -> Directions:
    energies, vectors = torch.linalg.eigh(moment.cpu())
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    # An eigenvector's sign is the library's whim; the largest component decides.
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return Directions((vectors * largest.sign()).float(), energies.float())


def reduced(features: Tensor, stored: StoredTap, directions: Directions | None, lr: Image) -> np.ndarray:
    """(F, h', w') to what is stored of it: (rank, h', w') float16, what a network invented around LR cut off.

    Raises DataError where float16 cannot hold them.
    """
    height, width = (-(-side // stored.stride) for side in (lr.height, lr.width))
    features = features[:, :height, :width]
    if stored.rank < stored.width:
        assert directions is not None
        basis = directions.vectors[:, : stored.rank].to(features.device)
        features = torch.einsum("fr,fhw->rhw", basis, features)
    half = features.half()
    if not torch.isfinite(half).all():
        raise DataError(
            f"tap {stored.tap!r} of the teacher gives values up to {features.abs().max().item():.3g}, and "
            f"float16 ends at 65504; choose another tap"
        )
    return half.cpu().numpy()
