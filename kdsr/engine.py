"""Every forward pass outside training: tiles of pixels in, tiles of pixels out.

Owns device, number type and memory layout. Knows no images and no files, nor where a tile comes from.
"""

import copy
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from math import log10

import numpy as np
import torch
from torch import Tensor

from kdsr import codecs
from kdsr.config import Precision
from kdsr.degrade import bicubic_lr
from kdsr.engine_cuda import CudaNetwork
from kdsr.errors import DataError, RequestError
from kdsr.models import BeforeShuffle, SrModel, fold
from kdsr.spec import ModelSpec

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WHITE = 255.0
"""The network's side counts grey levels of 8 bits, whatever the tile's type; one of 16 bits is 1/257."""
_LEVELS_OF_ONE = {"uint8": 1.0, "uint16": 1 / 257, "float32": WHITE}

MOST_LEVELS_APART = 2
MOST_DECIBELS_APART = 0.01
PROBE_SECONDS = 0.12
"""For each number type that is tried."""
CACHED_PIXELS = 3 * 2**14
"""LR pixels that go through a network's layers together on a CPU; a third as many were as fast."""
WORTHWHILE = 1.1
"""A narrower type must be so much faster to be worth its rounding."""
KEPT_CONVOLUTIONS = 64
"""Of a layer's shape and a tile's, that oneDNN keeps ready on a CPU; it would keep 1,024."""


def expect_any_size() -> None:
    """Prepare this process for images of all sizes; to be called before its first network runs.

    For each new size of a tile oneDNN makes each layer anew and keeps it, until it has as many as it may, and
    hundreds of megabytes. Not for training, where networks have more layers and tiles one size.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_CONVOLUTIONS))


class Engine:
    """A network on a device, ready to run. Safe to share between threads; `model` itself is left as it is.

    `precision` is the number type for 8-bit tiles; deeper ones run in float32. `auto` takes the fastest here.
    A narrow type that fails the check against float32 is replaced by float32, and `note` says why.
    Each tile goes through on its own on a CPU: activations stay in its cache, and a tile's bytes do not
    depend on its batch. Raises RequestError when `device` does not exist or the network does not keep its
    contract, DataError when its output is not finite in float32 either.
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
        """Why another type runs than was asked for, or than is fastest; a sentence."""
        self._name = model.spec.kind
        self._device = _checked_device(device)
        self.runs_together = self._device.type == "cuda"
        """Whether the tiles of a call go through the network together; elsewhere one follows the other."""
        keep_freed_memory()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        own = fold(copy.deepcopy(model)).eval().requires_grad_(False)
        self._exact = Network(own, dtype=torch.float32, device=self._device, layout=layout)
        self._warm_up()
        self._spec = model.spec
        choice = choose(own, self._exact, precision)
        self.precision: Precision = choice.precision
        """What 8-bit tiles run in; never auto."""
        self.note = choice.note
        self._fast = choice.network
        self._cuda: CudaNetwork | None = None
        if self._device.type == "cuda":
            self._cuda = CudaNetwork(self._fast, scale=self.scale, device=self._device)

    def run(self, tiles: np.ndarray, *, pause: Callable[[], None] | None = None) -> np.ndarray:
        """`tiles` (N, h, w, C) to (N, h*scale, w*scale, C) of the same type: uint8, uint16 or float32.

        Integers come out rounded and clamped, floats (0 black, 1 white) as the network made them. h and w are
        multiples of `multiple_of`. A tile that is not finite is done again in float32. Raises RequestError
        for other channels or another type, torch.OutOfMemoryError when the device has no room for so many
        or so large tiles, and DataError when a tile is not finite in float32: it is right or it is not there.

        On a CPU a large tile goes through in strips of rows, and `pause` is called between two of them.
        """
        if tiles.ndim != 4 or tiles.shape[3] != self.channels or tiles.dtype.name not in _LEVELS_OF_ONE:
            raise RequestError(
                f"{self._name}: expected uint8, uint16 or float32 tiles (N, h, w, {self.channels}), found "
                f"{tiles.dtype} {tiles.shape}; convert the image first"
            )
        number, height, width = tiles.shape[:3]
        shape = (number, height * self.scale, width * self.scale, self.channels)
        found = np.empty(shape, dtype=tiles.dtype)
        with torch.inference_mode():
            if self._cuda is not None and tiles.dtype == np.uint8:
                is_done = self._cuda.run(tiles, found).tolist()
            else:
                network = self._fast if tiles.dtype == np.uint8 else self._exact
                is_done = [
                    _run_one(network, tile, into, pause) for tile, into in zip(tiles, found, strict=True)
                ]
            for tile, into, done in zip(tiles, found, is_done, strict=True):
                if not done and not _run_one(self._exact, tile, into):
                    raise DataError(
                        f"{self._name}: the network's output is not finite (NaN or infinity), in float32 "
                        f"too; check the weights with jobs/evaluate.py"
                    )
        return found

    def megapixels_per_second(self) -> float:
        """Of output, measured for a fraction of a second on this machine with all that torch uses of it."""
        return Probe(self._spec, self._exact).megapixels_per_second(self._fast)

    def same_on_many_cores(self, num_threads: int) -> bool:
        """Whether a photograph comes out the same to the byte on one core and on so many.

        oneDNN splits a layer's outputs over cores and no sum, but promises nothing.
        """
        if num_threads == 1:
            return True
        before = torch.get_num_threads()
        try:
            return Probe(self._spec, self._exact).is_same(self._fast, num_threads=(1, num_threads))
        finally:
            torch.set_num_threads(before)

    def _warm_up(self) -> None:
        """Run once, so that the first image is not the slow one and a broken network is found at once."""
        side = -(-16 // self.multiple_of) * self.multiple_of
        grey = np.full((side, side, self.channels), 128, dtype=np.uint8)
        expected = (side * self.scale, side * self.scale, self.channels)
        with torch.inference_mode():
            levels = self._exact(_to_levels(grey, self._device), 0.0)
        found = (levels.shape[1] * levels.shape[3], levels.shape[2] * levels.shape[3], self.channels)
        if found != expected:
            raise RequestError(
                f"{self._name}: the spec says scale {self.scale}, so {grey.shape} should give {expected}, "
                f"found {found}; the weights belong to another spec"
            )
        if not torch.isfinite(levels.sum()):
            raise DataError(
                f"{self._name}: the network's output is not finite (NaN or infinity) for a plain grey tile; "
                f"check the weights with jobs/evaluate.py"
            )


class Network:
    """A network in one number type on one device: grey levels in, grey levels out."""

    def __init__(
        self, model: SrModel, *, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> None:
        self.dtype, self.device, self.layout = dtype, device, layout
        self.scale: int = model.spec.scale
        before_shuffle = model.before_shuffle(dtype, layout)
        self._before_shuffle: BeforeShuffle | None = None
        if before_shuffle is not None:
            self._before_shuffle = before_shuffle.to(device)
        # Kept on the device, since a CUDA graph must not copy them there.
        self._offsets = {offset: torch.tensor(offset, device=device) for offset in (0.0, 0.5)}
        self._model: SrModel | None = None
        if before_shuffle is None:
            own = copy.deepcopy(model).to(device, dtype)
            self._model = own.to(memory_format=layout)  # type: ignore[call-overload]

    def __call__(self, lr: Tensor, offset: float) -> Tensor:
        """Levels (B, C, h, w) on the device to float32 levels (B, h', w', s, s*C), plus `offset`.

        Each of the h' x w' blocks is s x s pixels, rows first; s is 1 where the network ends in pixels, and
        `scale` where they are cheaper to round before its pixel shuffle.
        """
        if self._before_shuffle is not None:
            levels: Tensor = self._before_shuffle(lr, offset)
            return levels
        assert self._model is not None
        # Divided in float32: bfloat16 does not hold every one of the 256 levels exactly.
        unit = lr.float().div(WHITE).to(self.dtype).contiguous(memory_format=self.layout)
        sr = self._model(unit).permute(0, 2, 3, 1).unsqueeze(3).float()
        return torch.add(self._offsets[offset], sr, alpha=WHITE)

    def strips(self, lr: Tensor, offset: float) -> Iterator[tuple[int, Tensor]]:
        """The same in parts, top to bottom, each with the first of the h' rows that it stands for."""
        if self._before_shuffle is None or self.device.type != "cpu":
            yield 0, self(lr, offset)
        else:
            yield from self._before_shuffle.strips(lr, offset, rows=CACHED_PIXELS // lr.shape[3])


def _to_levels(tile: np.ndarray, device: torch.device) -> Tensor:
    """(h, w, C) to (1, C, h, w) on the device: uint8 as it is, other types as float32."""
    scaled = tile if tile.dtype == np.uint8 else tile.astype(np.float32) * _LEVELS_OF_ONE[tile.dtype.name]
    # torch warns of arrays that it could write to but must not.
    own = np.require(scaled, requirements=["C", "W"])
    return torch.from_numpy(own).to(device).permute(2, 0, 1).unsqueeze(0)


def _run_one(
    network: Network, tile: np.ndarray, into: np.ndarray, pause: Callable[[], None] | None = None
) -> bool:
    """`tile` (h, w, C) through `network` into `into` (H, W, C) of the same type; whether it is finite."""
    lr, offset = _to_levels(tile, network.device), 0.5 if tile.dtype == np.uint8 else 0.0
    for top, levels in network.strips(lr, offset):
        # The sum is finite only if every value is, and costs a fifth of looking at each.
        if not torch.isfinite(levels.sum()):
            return False
        if tile.dtype == np.uint16:
            levels.mul_(257).add_(0.5).clamp_(0, 65535)
        elif tile.dtype == np.uint8:
            levels.clamp_(0, WHITE)
        else:
            levels.div_(WHITE)
        rows = slice(top * levels.shape[3], (top + levels.shape[1]) * levels.shape[3])
        _shuffle(levels[0].cpu().numpy(), into[rows])
        if pause is not None and rows.stop < into.shape[0]:
            pause()
    return True


def _shuffle(blocks: np.ndarray, into: np.ndarray) -> None:
    """(h, w, s, s*C) into (h*s, w*s, C), cast on the way; whole rows of blocks are copied at once."""
    height, width, rows, row = blocks.shape
    if rows == 1:
        np.copyto(into, blocks[:, :, 0], casting="unsafe")
        return
    cast = np.ascontiguousarray(blocks, dtype=into.dtype)
    whole = np.dtype((np.void, row * into.itemsize))
    target = into.reshape(height, rows, width, row).view(whole)
    target[...] = cast.view(whole).transpose(0, 2, 1, 3)


# ---------------------------------------------------------------- choosing the number type


@dataclass(frozen=True)
class Choice:
    """The number type that 8-bit tiles run in."""

    precision: Precision
    network: Network
    note: str | None = None


def choose_precision(model: SrModel, *, device: str = "cpu") -> Precision:
    """The number type that `Engine(precision="auto")` takes here, measured in a fraction of a second.

    Workers that must write the same bytes should be told one answer rather than ask each on its own.
    """
    return Engine(model, device=device, precision="auto").precision


def choose(model: SrModel, exact: Network, precision: Precision) -> Choice:
    """`precision`, or the fastest for `auto`, when it draws the picture that float32 draws; else float32."""
    if precision == "float32":
        return Choice("float32", exact)
    probe = Probe(model.spec, exact)
    names = _candidates(exact.device) if precision == "auto" else [precision]
    best, least, faults = Choice("float32", exact), float("inf"), []
    if precision == "auto":
        least = probe.seconds(exact) / WORTHWHILE
    for name in names:
        network = Network(model, dtype=DTYPES[name], device=exact.device, layout=exact.layout)
        fault = probe.fault(network)
        if fault is not None:
            faults.append(f"{name} {fault}")
        elif (seconds := probe.seconds(network) if precision == "auto" else 0.0) < least:
            best, least = Choice(name, network), seconds
    note = f"{'; '.join(faults)}; {best.precision} runs instead" if faults else None
    return replace(best, note=note)


def _candidates(device: torch.device) -> list[Precision]:
    """float16 is emulated on CPUs, and slow."""
    return ["bfloat16"] if device.type == "cpu" else ["float16", "bfloat16"]


class Probe:
    """A photograph on which number types are timed and compared."""

    def __init__(self, spec: ModelSpec, exact: Network) -> None:
        self._scale: int = spec.scale
        self._multiple_of: int = getattr(spec, "multiple_of", 1)
        photo = codecs.decode_png(resources.files("kdsr").joinpath("weights/fixture.png").read_bytes())
        photo = _at_least(photo[:, :, : spec.channels], self._scale * self._multiple_of)
        self._hr, self._lr = self._pair(photo)
        self._tile = self._affordable(photo, exact)
        self._expected = [_drawn(exact, tile) for tile in (self._lr, self._tile)]

    def fault(self, network: Network) -> str | None:
        """What is wrong with the pictures that `network` draws, against those of float32."""
        try:
            found = [_drawn(network, tile) for tile in (self._lr, self._tile)]
        except RuntimeError as error:  # a device without the kernels
            return f"cannot run here ({str(error).splitlines()[0]})"
        apart = 0
        for exact, drawn in zip(self._expected, found, strict=True):
            if exact is None or drawn is None:
                return "gives values that are not finite"
            apart = max(apart, int(np.abs(exact.astype(np.int16) - drawn).max()))
        assert self._expected[0] is not None and found[0] is not None
        decibels = abs(self._psnr(self._expected[0]) - self._psnr(found[0]))
        if apart > MOST_LEVELS_APART or decibels >= MOST_DECIBELS_APART:
            return (
                f"is up to {apart} grey levels and {decibels:.3f} dB from float32 "
                f"(allowed: {MOST_LEVELS_APART} and {MOST_DECIBELS_APART})"
            )
        return None

    def is_same(self, network: Network, *, num_threads: Sequence[int]) -> bool:
        """Whether `network` draws the same with each number of threads; leaves torch with the last."""
        drawn = []
        for number in num_threads:
            torch.set_num_threads(number)
            drawn += [_drawn(network, self._tile)]
        return all(np.array_equal(one, drawn[0]) for one in drawn)  # type: ignore[arg-type]

    def seconds(self, network: Network) -> float:
        """The least that one pass over a tile takes, tried for a fraction of a second."""
        least, end = float("inf"), time.perf_counter() + PROBE_SECONDS
        while time.perf_counter() < end:
            began = time.perf_counter()
            _drawn(network, self._tile)
            least = min(least, time.perf_counter() - began)
        return least

    def megapixels_per_second(self, network: Network) -> float:
        """Of output, one tile after the other."""
        height, width = self._tile.shape[:2]
        return height * width * self._scale**2 / 1e6 / self.seconds(network)

    def _pair(self, photo: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The photograph (H, W, C) as a reference, and reduced to what the network gets."""
        step = self._scale * self._multiple_of
        height, width = (side // step * step for side in photo.shape[:2])
        hr = photo[:height, :width]
        unit = torch.from_numpy(hr.copy()).permute(2, 0, 1).unsqueeze(0).float() / WHITE
        lr = bicubic_lr(unit, self._scale).mul(WHITE).round()[0].permute(1, 2, 0)
        return hr, lr.to(torch.uint8).numpy()

    def _affordable(self, photo: np.ndarray, exact: Network) -> np.ndarray:
        """As much of `photo` as `exact` upscales in the time for it; less says less about the speed."""
        began = time.perf_counter()
        _drawn(exact, self._lr)
        growth = max(1.0, PROBE_SECONDS / 2 / (time.perf_counter() - began)) ** 0.5
        height, width = (
            min(most, int(least * growth)) // self._multiple_of * self._multiple_of
            for most, least in zip(photo.shape[:2], self._lr.shape[:2], strict=True)
        )
        return photo[:height, :width]

    def _psnr(self, sr: np.ndarray) -> float:
        """Of the whole picture in dB, against the reference."""
        error = np.mean((sr.astype(np.float64) - self._hr) ** 2)
        return 10 * log10(WHITE**2 / max(float(error), 1e-3))


def _at_least(photo: np.ndarray, side: int) -> np.ndarray:
    """`photo` (H, W, C) mirrored up to `side` where it is smaller."""
    missing = [(0, max(0, side - length)) for length in photo.shape[:2]]
    return np.pad(photo, [*missing, (0, 0)], mode="symmetric")


def _drawn(network: Network, tile: np.ndarray) -> np.ndarray | None:
    """`tile` (h, w, C) upscaled; None when it is not finite."""
    height, width, channels = tile.shape
    into = np.empty((height * network.scale, width * network.scale, channels), dtype=np.uint8)
    with torch.inference_mode():
        return into if _run_one(network, tile, into) else None


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to 64 MB a thread, rather than give it back after each layer.

    Getting zeroed pages again took up to a third of a pass. glibc raises its limits for both when it frees a
    block just below 32 MiB for the first time; elsewhere this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def give_back_memory() -> None:
    """Have glibc give the system all that is free, holes included; another C library is left alone.

    Blocks of ever other sizes leave holes between them, and what is kept for the next layer grows with the
    hours. Takes milliseconds, and the next passes a little longer: for now and then.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}; use cpu"
        ) from None
    return device
