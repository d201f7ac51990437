"""Every forward pass outside training: tiles of pixels in, tiles of pixels out.

Owns device, number type and memory layout. Knows no images and no files, nor where a tile comes from.
"""

import copy
import time
from collections.abc import Callable
from importlib import resources
from math import log10

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdsr import codecs
from kdsr.config import Precision
from kdsr.errors import DataError, RequestError
from kdsr.models import SrModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}

MOST_LEVELS_APART = 2
MOST_DECIBELS_APART = 0.01
_PROBE_SECONDS = 0.15
_WORTHWHILE = 1.1
"""A narrower type must be so much faster to be worth its rounding."""


class Engine:
    """A network on a device, ready to run. Safe to share between threads; `model` itself is left as it is.

    `precision` is the number type for 8-bit tiles. `auto` takes the fastest that passes the check; a named
    one that does not pass it is replaced by float32, and `note` says why. Deeper tiles always run in float32.
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
        self.note: str | None = None
        """Why another type runs than was asked for; a sentence."""
        self._name = model.spec.kind
        self._device = _checked_device(device)
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._half = torch.tensor(0.5, device=self._device)
        self._exact = self._prepared(model, "float32")
        self._warm_up()
        name = self._fastest(model) if precision == "auto" else precision
        self._fast = self._exact if name == "float32" else self._checked(model, name)
        self.precision: Precision = _name_of(self._fast)
        """What 8-bit tiles run in; never auto."""

    def run(self, tiles: np.ndarray) -> np.ndarray:
        """`tiles` (N, h, w, C) to (N, h*scale, w*scale, C) of the same type: uint8, uint16 or float32.

        Integers come out rounded and clamped, floats (0 black, 1 white) as the network made them. h and w are
        multiples of `multiple_of`. A tile that is not finite is done again in float32. Raises RequestError
        for other channels or another type, and DataError when it is not finite then: a tile is right or it
        is not there.
        """
        if tiles.ndim != 4 or tiles.shape[3] != self.channels or tiles.dtype.name not in _WHITE:
            raise RequestError(
                f"{self._name}: expected uint8, uint16 or float32 tiles (N, h, w, {self.channels}), found "
                f"{tiles.dtype} {tiles.shape}; convert the image first"
            )
        with torch.inference_mode():
            if tiles.dtype == np.uint8 and self._fast is not self._exact:
                found = self._run(self._fast, tiles)
                if found is not None:
                    return found
            found = self._run(self._exact, tiles)
        if found is None:
            raise DataError(
                "the network's output is not finite (NaN or infinity), in float32 too; check the weights "
                "with jobs/evaluate.py"
            )
        return found

    def _run(self, model: SrModel, tiles: np.ndarray) -> np.ndarray | None:
        """None when the output is not finite."""
        dtype = _DTYPES[_name_of(model)]
        lr = self._to_unit(tiles)
        unshuffled = model.before_shuffle(lr, dtype)
        sr = model(lr.to(dtype)).float() if unshuffled is None else unshuffled
        if tiles.dtype != np.float32:
            sr = torch.add(self._half, sr, alpha=_WHITE[tiles.dtype.name])
        # The sum is finite only if every value is, and costs a fifth of looking at each.
        if not torch.isfinite(sr.sum()):
            return None
        if tiles.dtype == np.uint8:
            sr = sr.clamp_(0, 255).to(torch.uint8)
        elif tiles.dtype == np.uint16:
            sr = sr.clamp_(0, 65535).floor_()
        if unshuffled is not None:
            sr = F.pixel_shuffle(sr, self.scale)
        return sr.permute(0, 2, 3, 1).contiguous().cpu().numpy().astype(tiles.dtype, copy=False)

    def _to_unit(self, tiles: np.ndarray) -> Tensor:
        """(N, h, w, C) to float32 (N, C, h, w) in [0, 1] on the device."""
        if tiles.dtype == np.uint16:
            tiles = tiles.astype(np.float32)
            white = _WHITE["uint16"]
        else:
            white = _WHITE[tiles.dtype.name]
        # torch warns of arrays that it could write to but must not.
        lr = torch.from_numpy(np.require(tiles, requirements=["C", "W"])).to(self._device).permute(0, 3, 1, 2)
        unit = lr.to(torch.float32) if white == 1.0 else lr.to(torch.float32).div(white)
        return unit.contiguous(memory_format=self._layout)

    def megapixels_per_second(self) -> float:
        """Of output, measured for a fraction of a second on this machine with all that torch uses of it."""
        tiles = self._probe()
        pixels = tiles.shape[1] * tiles.shape[2] * self.scale**2
        return pixels / 1e6 / self._seconds(self._fast)

    # ------------------------------------------------------------ choosing

    def _prepared(self, model: SrModel, precision: str) -> SrModel:
        """A copy of `model` on the device in one type; training-time branches folded."""
        fold: Callable[[], SrModel] | None = getattr(model, "fold", None)
        own = copy.deepcopy(model if fold is None else fold()).eval().requires_grad_(False)
        prepared: SrModel = own.to(self._device, _DTYPES[precision]).to(memory_format=self._layout)  # type: ignore[call-overload]
        return prepared

    def _fastest(self, model: SrModel) -> str:
        """The type in which a probe tile takes the least time, float32 unless it gains a tenth."""
        seconds = {name: self._seconds(self._prepared(model, name)) for name in _candidates(self._device)}
        best = min(seconds, key=seconds.__getitem__)
        return best if seconds[best] * _WORTHWHILE < seconds["float32"] else "float32"

    def _seconds(self, model: SrModel) -> float:
        """The least that one pass over the probe takes, tried for a fraction of a second."""
        tiles = self._probe()
        least = float("inf")
        end = time.perf_counter() + _PROBE_SECONDS
        with torch.inference_mode():
            while time.perf_counter() < end:
                began = time.perf_counter()
                self._run(model, tiles)
                least = min(least, time.perf_counter() - began)
        return least

    def _checked(self, model: SrModel, precision: str) -> SrModel:
        """`model` in `precision` when it makes the picture that float32 makes; else float32, with a note."""
        fast, tiles = self._prepared(model, precision), self._probe()
        with torch.inference_mode():
            exact, found = self._run(self._exact, tiles), self._run(fast, tiles)
        assert exact is not None, "warmed up already"
        if found is None:
            self.note = f"{precision} gives values that are not finite; float32 runs instead"
            return self._exact
        apart = int(np.abs(exact.astype(np.int16) - found).max())
        decibels = _decibels_apart(exact, found)
        if apart > MOST_LEVELS_APART or decibels > MOST_DECIBELS_APART:
            self.note = (
                f"{precision} is up to {apart} grey levels from float32 and {decibels:.3f} dB worse "
                f"(allowed: {MOST_LEVELS_APART} and {MOST_DECIBELS_APART}); float32 runs instead"
            )
            return self._exact
        return fast

    def _probe(self) -> np.ndarray:
        """(1, h, w, C) uint8 of a real photograph, with sizes that the network takes."""
        photo = codecs.decode_png(resources.files("kdsr").joinpath("weights/fixture.png").read_bytes())
        height, width = (side // self.multiple_of * self.multiple_of for side in photo.shape[:2])
        photo = photo[:height, :width]
        return photo[None] if photo.shape[2] == self.channels else photo[None, :, :, :1]

    def _warm_up(self) -> None:
        """Run once, so that the first image is not the slow one and a broken network is found at once."""
        side = -(-16 // self.multiple_of) * self.multiple_of
        grey = np.full((1, side, side, self.channels), 128, dtype=np.uint8)
        expected = (1, side * self.scale, side * self.scale, self.channels)
        with torch.inference_mode():
            sr = self._run(self._exact, grey)
        if sr is None:
            raise DataError(
                f"{self._name}: the network's output is not finite (NaN or infinity); check the weights"
            )
        if sr.shape != expected:
            raise RequestError(
                f"{self._name}: the spec says scale {self.scale}, so {grey.shape} should give {expected}, "
                f"found {sr.shape}; the weights belong to another spec"
            )


def choose_precision(model: SrModel, *, device: str = "cpu") -> Precision:
    """The number type that `Engine(precision="auto")` takes here. Under a second of measuring."""
    return Engine(model, device=device, precision="auto").precision


def _candidates(device: torch.device) -> tuple[str, ...]:
    """float16 is emulated on CPUs, and slow."""
    return ("float32", "bfloat16") if device.type == "cpu" else ("float32", "bfloat16", "float16")


def _name_of(model: SrModel) -> Precision:
    dtype = next((tensor.dtype for tensor in model.parameters()), torch.float32)
    names: dict[torch.dtype, Precision] = {
        torch.float32: "float32",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return names[dtype]


def _decibels_apart(exact: np.ndarray, found: np.ndarray) -> float:
    """How much PSNR `found` loses against a reference from which `exact` is 30 dB away, if errors add up."""
    mean_square = float(np.mean((exact.astype(np.float64) - found) ** 2))
    reference = 255.0**2 / 10**3
    return 10 * log10((reference + mean_square) / reference)


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; use cpu"
        ) from None
    return device
