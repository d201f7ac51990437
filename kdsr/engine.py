"""Every forward pass outside training: uint8 tiles in, uint8 tiles out.

Owns device, number type and memory layout. Knows no images and no files, nor where a tile comes from.
"""

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdsr.errors import DataError, RequestError
from kdsr.models import SrModel

Precision = Literal["float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Engine:
    """A network on a device, ready to run. Safe to share between threads; `model` itself is left as it is.

    Raises RequestError when `device` does not exist or the network does not keep its contract.
    """

    def __init__(
        self,
        model: SrModel,
        *,
        device: str = "cpu",
        precision: Precision = "float32",
        channels_last: bool = True,
    ) -> None:
        self.scale: int = model.spec.scale
        self.channels: int = model.spec.channels
        self.receptive_radius = model.receptive_radius
        self.multiple_of: int = getattr(model.spec, "multiple_of", 1)
        self._name = model.spec.kind
        self._device = _checked_device(device)
        self._dtype = _DTYPES[precision]
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        own = copy.deepcopy(model).eval().requires_grad_(False).to(self._device, self._dtype)
        self._model = own.to(memory_format=self._layout)  # type: ignore[call-overload]
        self._warm_up()

    def run(self, tiles: np.ndarray) -> np.ndarray:
        """`tiles` (N, h, w, C) uint8 to (N, h*scale, w*scale, C) uint8, rounded and clamped.

        h and w are multiples of `multiple_of`. Raises RequestError for other channels or another type, and
        DataError when the network's output is not finite: a tile is right or it is not there.
        """
        if tiles.ndim != 4 or tiles.shape[3] != self.channels or tiles.dtype != np.uint8:
            raise RequestError(
                f"{self._name}: expected uint8 tiles (N, h, w, {self.channels}), found {tiles.dtype} "
                f"{tiles.shape}; convert the image first"
            )
        with torch.inference_mode():
            sr = self._model(self._to_unit(tiles))
            return _to_uint8(sr)

    def _to_unit(self, tiles: np.ndarray) -> Tensor:
        """uint8 (N, h, w, C) to (N, C, h, w) in [0, 1] on the device."""
        # torch warns of arrays that it could write to but must not.
        lr = torch.from_numpy(np.require(tiles, requirements=["C", "W"])).to(self._device).permute(0, 3, 1, 2)
        # Divided in float32: bfloat16 does not hold every one of the 256 levels exactly.
        unit = lr.to(torch.float32).div_(255)
        return unit.to(self._dtype).contiguous(memory_format=self._layout)

    def _warm_up(self) -> None:
        """Run once, so that the first image is not the slow one and a broken network is found at once."""
        side = -(-16 // self.multiple_of) * self.multiple_of
        grey = np.full((1, side, side, self.channels), 128, dtype=np.uint8)
        expected = (1, side * self.scale, side * self.scale, self.channels)
        found = self.run(grey).shape
        if found != expected:
            raise RequestError(
                f"{self._name}: the spec says scale {self.scale}, so {grey.shape} should give {expected}, "
                f"found {found}; the weights belong to another spec"
            )


def _to_uint8(sr: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] and a little beyond to uint8 (N, H, W, C); ties round up."""
    half = torch.tensor(0.5, device=sr.device)
    levels = torch.add(half, sr.permute(0, 2, 3, 1).float(), alpha=255)
    # The sum is finite only if every value is, and costs a fifth of looking at each.
    if not torch.isfinite(levels.sum()):
        raise DataError(
            "the network's output is not finite (NaN or infinity); use precision float32, or check the "
            "weights with jobs/evaluate.py"
        )
    return levels.clamp_(0, 255).to(torch.uint8).contiguous().cpu().numpy()


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; use cpu"
        ) from None
    return device
