"""Every output pixel: an image of any depth through an engine, tile by tile, with its transparency.

An image goes through whole, or in bands of rows that give the same bytes. Knows no Ray, no files, and no
network but through its engine.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from kdsr.engine import Engine
from kdsr.errors import ImageUnsupported, RequestError
from kdsr.image import Image
from kdsr.tiles import Box, Tile, plan, split
from kdsr.turns import Claim, Turns

MIN_TILE_SIZE = 512
"""Smaller tiles spend more on their halo than they gain by staying in a CPU's cache."""

SMALLEST_TILE_SIZE = 16
"""A tile is not made smaller than this when memory is short."""

PASSING_SHARE = 1 / 4
"""A tile with at most this share of a large one's pixels does not wait for its end."""

BYTES_PER_OUTPUT_PIXEL = 300
"""Memory that a network needs for a pixel of its output while it runs; the bundled ones took 36 to 273."""

BLEED_LEVELS = 7
"""Colours reach 2 ** (this - 1) = 64 pixels under a transparent edge, more than the halo of any network."""

PLAIN_RADIUS = 2
"""Alpha is kept exactly where it is the same all over the (2 * this + 1) pixels square around a pixel."""

CONTAINER = Path("/sys/fs/cgroup")
"""Where Linux says what a container may have, and has."""


@dataclass(frozen=True)
class Levels:
    """The range of an image's numbers that the network sees as 0 to 1."""

    low: float = 0.0
    high: float = 1.0

    def to_unit(self, values: np.ndarray) -> np.ndarray:
        """float32 from low..high to 0..1."""
        if self == UNIT:
            return values
        return (values - np.float32(self.low)) * np.float32(1 / (self.high - self.low))

    def from_unit(self, values: np.ndarray) -> np.ndarray:
        """float32 from 0..1 to low..high."""
        if self == UNIT:
            return values
        return values * np.float32(self.high - self.low) + np.float32(self.low)


UNIT = Levels()


def levels_of(low: float, high: float) -> Levels:
    """Those of a float image with values from `low` to `high`: 0 to 1, unless values lie outside.

    Raises ImageUnsupported when they are not finite.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageUnsupported(
            "the image has pixels that are not finite (NaN or infinity); replace them and try again"
        )
    return UNIT if low >= 0 and high <= 1 else Levels(min(low, 0.0), max(high, 1.0))


def range_of(values: np.ndarray) -> tuple[float, float]:
    """Least and greatest value; NaN when one of them is."""
    return float(values.min()), float(values.max())


@dataclass(frozen=True)
class Band:
    """Rows of an image that go through the network together; all rows are counted in input pixels."""

    top: int
    bottom: int
    """The rows that it gives, `bottom` just outside."""
    read_top: int
    read_bottom: int
    """The rows that it needs."""
    tiles: tuple[Tile, ...]


class Upscaler:
    """Images of any size through one engine. Safe to share between threads.

    `tile_size` is the height and width of a tile's core in LR pixels. When not set it is 512, or so many
    times the halo that the halo costs little, on any machine: bytes depend on its memory only where that is
    very short, see `fitting`. Up to `batch_size` tiles of one shape, or more small ones with no more pixels
    where an engine runs them together, go through it at once, those of different images too. When the engine
    runs out of memory both are halved, the batch first, for this image and all later ones. Tiles run in
    `compute`; in the caller's thread when it is not given.

    Images with a `Claim` of their own take turns, tile by tile; all others are done in the order in which
    they come. That holds over all upscalers with the same `compute`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tile_size: int | None = None,
        batch_size: int = 1,
        compute: "ComputeThreads | None" = None,
    ) -> None:
        self.engine = engine
        self._tile_size = tile_size or max(MIN_TILE_SIZE, 8 * engine.receptive_radius)
        self._largest_tile, self._batch_size = fitting(
            self._tile_size, batch_size, engine=engine, memory_bytes=available_bytes()
        )
        self._compute = compute
        self._everyone = Claim()

    def upscale(self, image: Image, claim: Claim | None = None) -> Image:
        """`image` (h, w) to (h*scale, w*scale), same depth, grey as grey, metadata kept.

        Alpha goes through the same network, and where it is plain it stays exactly so. Colours under what
        is fully transparent are made up from what is visible beside it. Float images with values outside
        [0, 1] are brought there by their own range for the network, and back.
        Raises RequestError for a colour image and a network for grey ones, ImageUnsupported for floats that
        are not finite, DataError when the network's output is not finite, Abandoned when `claim` is over
        before the last tile has run.
        """
        is_float = image.pixels.dtype == np.float32
        levels = levels_of(*range_of(image.pixels)) if is_float else UNIT
        tiles = tuple(self._plan(image.height, image.width))
        band = Band(0, image.height, 0, image.height, tiles)
        return self.upscale_band(image, band, levels=levels, claim=claim)

    def bands(self, height: int, width: int, *, has_alpha: bool) -> list[Band]:
        """Rows of tiles that together are `upscale` of an image of that size, to the byte."""
        by_top: dict[int, list[Tile]] = defaultdict(list)
        for tile in self._plan(height, width):
            by_top[tile.core.top].append(tile)
        return [_band(tiles, height, has_alpha=has_alpha) for tiles in by_top.values()]

    def upscale_band(self, rows: Image, band: Band, *, levels: Levels, claim: Claim | None = None) -> Image:
        """`rows` (read_bottom - read_top, w) to ((bottom - top)*scale, w*scale); see `upscale`."""
        claim = claim or self._everyone
        alpha = None
        pixels = rows.pixels
        if rows.alpha is not None:
            pixels = bleed(pixels, rows.alpha)
            alpha = self._upscale_alpha(rows.alpha, band, claim)
        return replace(rows, pixels=self._upscale_pixels(pixels, band, levels, claim), alpha=alpha)

    def _plan(self, height: int, width: int) -> list[Tile]:
        return plan(
            height,
            width,
            tile_size=self._tile_size,
            halo=self.engine.receptive_radius,
            multiple_of=self.engine.multiple_of,
        )

    def _upscale_pixels(self, pixels: np.ndarray, band: Band, levels: Levels, claim: Claim) -> np.ndarray:
        """(h, w, C) of any type to ((bottom - top)*scale, w*scale, C); C is 1, or what the engine takes."""
        if pixels.shape[2] > self.engine.channels:
            raise RequestError(
                "the network is for grey images and this one has colours; use a network with 3 channels"
            )
        job = _Job(self, levels.to_unit(pixels), self._empty(pixels, band), band, claim)
        self._run_all(job, band.tiles)
        return levels.from_unit(job.sr)

    def _upscale_alpha(self, alpha: np.ndarray, band: Band, claim: Claim) -> np.ndarray:
        """(h, w) to ((bottom - top)*scale, w*scale), exactly as it is where it is plain."""
        scale = self.engine.scale
        kept = slice(band.top - band.read_top, band.bottom - band.read_top)
        sr = _enlarged(alpha[kept], scale)
        is_plain = _is_plain(alpha)
        if is_plain.all():
            return sr
        job = _Job(self, alpha[:, :, None], self._empty(alpha[:, :, None], band), band, claim)
        self._run_all(job, [tile for tile in band.tiles if not is_plain[job.rows(tile.core)].all()])
        np.copyto(sr, job.sr[:, :, 0], where=~_enlarged(is_plain[kept], scale))
        return sr.clip(0, 1) if sr.dtype == np.float32 else sr

    def _empty(self, pixels: np.ndarray, band: Band) -> np.ndarray:
        scale = self.engine.scale
        shape = ((band.bottom - band.top) * scale, pixels.shape[1] * scale, pixels.shape[2])
        return np.empty(shape, dtype=pixels.dtype)

    def _run_all(self, job: "_Job", tiles: Iterable[Tile]) -> None:
        """Fill `job.sr` with `tiles`. Raises what the engine raised for the first one that failed."""
        requests = [_Request(tile, job) for tile in tiles]
        turns = Turns[_Request]() if self._compute is None else self._compute.turns
        turns.put(job.claim, ((request.kind, request) for request in requests))
        for _ in requests:
            if self._compute is None:
                _run_next(turns)
            else:
                self._compute.submit(self._compute.run_next)
        for request in requests:
            request.finished.wait()
        for request in requests:
            if request.error is not None:
                raise request.error

    def batch_of(self, request: "_Request") -> int:
        """How many tiles like that go through the engine at once."""
        if not self.engine.runs_together:
            return self._batch_size  # More would only keep other threads from them.
        largest = self._tile_size + 2 * self.engine.receptive_radius
        return max(1, self._batch_size * largest**2 // math.prod(request.tile.read.shape))

    def run_together(self, requests: Sequence["_Request"]) -> None:
        """Run tiles of one kind, of any images; each is finished after that, with an error or without."""
        began = time.perf_counter()
        try:
            self._upscale_tiles(requests)
        except Exception:  # noqa: BLE001 tried again one by one: other images must not fail with one
            for request in requests:
                self._run_alone(request)
        finally:
            share = (time.perf_counter() - began) / len(requests)
            for request in requests:
                request.job.claim.note(began=began, seconds=share, batch=len(requests))
                request.finished.set()

    def _run_alone(self, request: "_Request") -> None:
        try:
            self._upscale_tiles([request])
        except Exception as error:  # noqa: BLE001 raised again where the image is waited for
            request.error = error

    def _upscale_tiles(self, requests: Sequence["_Request"]) -> None:
        """Run tiles of one shape and put their cores in place; in smaller parts where memory is short."""
        largest = max(max(request.tile.core.shape) for request in requests)
        if largest > self._largest_tile:
            self._upscale_parts(requests)
            return
        try:
            results = self._run(np.stack([request.crop() for request in requests]), self._pause(requests[0]))
        except (MemoryError, RuntimeError) as error:
            if not self._can_shrink(error, len(requests), largest):
                raise
            results = None
        if results is None:  # Not within `except`: the error holds on to what did not fit.
            self._upscale_parts(requests)
            return
        for request, result in zip(requests, results, strict=True):
            request.keep(result, self.engine.scale)

    def _upscale_parts(self, requests: Sequence["_Request"]) -> None:
        if len(requests) > 1:
            middle = len(requests) // 2
            self._upscale_tiles(requests[:middle])
            self._upscale_tiles(requests[middle:])
            return
        parts = split(
            requests[0].tile,
            tile_size=self._largest_tile,
            halo=self.engine.receptive_radius,
            multiple_of=self.engine.multiple_of,
        )
        for part in parts:
            self._upscale_tiles([_Request(part, requests[0].job)])

    def _can_shrink(self, error: Exception, num_tiles: int, largest: int) -> bool:
        """Halve the batch, or the tile when it is alone, and remember; False when that is no answer."""
        if not _is_out_of_memory(error):
            return False
        if num_tiles > 1:
            self._batch_size = min(self._batch_size, num_tiles // 2)
            return True
        if largest <= SMALLEST_TILE_SIZE:
            return False
        self._largest_tile = min(self._largest_tile, max(largest // 2, SMALLEST_TILE_SIZE))
        return True

    def _pause(self, large: "_Request") -> Callable[[], None] | None:
        """What lets a small tile of another claim go first, between two strips of `large`.

        A small image beside huge ones so waits for one strip and not for a whole tile, and a tile that is no
        longer alone leaves cores to others.
        """
        if self._compute is None:
            return None
        compute, turns, claim = self._compute, self._compute.turns, large.job.claim
        most = math.prod(large.tile.read.shape) * PASSING_SHARE

        def is_small_and_anothers(request: _Request) -> bool:
            return request.job.claim is not claim and math.prod(request.tile.read.shape) <= most

        def let_one_pass() -> None:
            began = time.perf_counter()
            _run_next(turns, only=is_small_and_anothers)
            claim.was_passed(time.perf_counter() - began)
            compute.take_share()

        return let_one_pass

    def _run(self, crops: np.ndarray, pause: Callable[[], None] | None) -> np.ndarray:
        """(N, h, w, C) through the engine, with the sizes and the channels that it takes."""
        is_grey_in_colour = crops.shape[3] < self.engine.channels
        if is_grey_in_colour:
            crops = np.repeat(crops, self.engine.channels, axis=3)
        sr = self.engine.run(_padded(crops, self.engine.multiple_of), pause=pause)
        return _mean_channel(sr) if is_grey_in_colour else sr


def fitting(tile_size: int, batch_size: int, *, engine: Engine, memory_bytes: int | None) -> tuple[int, int]:
    """Tile size and batch with which one call of the engine takes at most a quarter of `memory_bytes`.

    The batch is halved first, since bytes do not depend on it, then the tile, down to `SMALLEST_TILE_SIZE`.
    Where the memory is not known both stay.
    """

    def needed() -> int:
        side = (tile_size + 2 * engine.receptive_radius) * engine.scale
        return batch_size * side**2 * BYTES_PER_OUTPUT_PIXEL

    while memory_bytes is not None and needed() > memory_bytes // 4:
        if batch_size > 1:
            batch_size //= 2
        elif tile_size > SMALLEST_TILE_SIZE:
            tile_size = max(tile_size // 2, SMALLEST_TILE_SIZE)
        else:
            break
    return tile_size, batch_size


def available_bytes() -> int | None:
    """Memory that this process may still take, within its container; None where Linux is not there to ask."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((CONTAINER / f"memory.{name}").read_text("ascii")) for name in ("max", "current"))
        parts = dict(line.split() for line in (CONTAINER / "memory.stat").read_text("ascii").splitlines())
        # What it has of files counts as used, and goes when memory is asked for.
        files = int(parts["active_file"]) + int(parts["inactive_file"])
        return min(free, limit - used + files)
    except (OSError, KeyError, ValueError):  # no container, or one without a limit
        return free


class ComputeThreads(ThreadPoolExecutor):
    """Threads for the tiles of one upscaler or of several, and the tiles that wait for them.

    Each keeps one core busy: whole tiles in parallel waste less than one tile split over cores, where the
    slowest core, which may be encoding meanwhile, holds up the others in every layer. While
    `splits_lone_tiles`, tiles that are too few to keep all cores busy share those that are idle, strip by
    strip: an image that is alone is done sooner. Set it only for engines with `same_on_many_cores`.
    """

    def __init__(self, num_threads: int, *, splits_lone_tiles: bool = False) -> None:
        super().__init__(
            num_threads, thread_name_prefix="tiles", initializer=torch.set_num_threads, initargs=(1,)
        )
        self.turns = Turns[_Request]()
        self.splits_lone_tiles = splits_lone_tiles
        self._num_threads = num_threads
        self._busy = 0
        self._lock = threading.Lock()

    def run_next(self) -> None:
        """What each tile that is put in `turns` needs once, in one of these threads."""
        with self._lock:
            self._busy += 1
        try:
            self.take_share(self._busy + len(self.turns) - 1)  # the tile that is taken next still waits
            _run_next(self.turns)
        finally:
            with self._lock:
                self._busy -= 1

    def take_share(self, tiles: int | None = None) -> None:
        """Give this thread its part of the cores, with so many `tiles` to run; those that are there now."""
        tiles = self._busy + len(self.turns) if tiles is None else tiles
        share = max(1, self._num_threads // max(1, tiles)) if self.splits_lone_tiles else 1
        if share != torch.get_num_threads():
            torch.set_num_threads(share)


def _run_next(turns: "Turns[_Request]", only: "Callable[[_Request], bool]" = lambda _: True) -> None:
    """Run some waiting tiles of one kind, of any image; nothing when others have run them all."""
    requests, dropped = turns.take(most=lambda request: request.job.upscaler.batch_of(request), only=only)
    for request in dropped:
        request.error = request.job.claim.abandoned()
        request.finished.set()
    if requests:
        requests[0].job.upscaler.run_together(requests)


# ---------------------------------------------------------------- tiles of arrays


@dataclass(frozen=True, eq=False)
class _Job:
    """Rows of an image on their way through the engine."""

    upscaler: Upscaler
    pixels: np.ndarray
    """(h, w, C), the rows that the band reads."""
    sr: np.ndarray
    """(H, W, C), the rows that it gives, filled core by core."""
    band: Band
    claim: Claim

    def rows(self, box: Box) -> tuple[slice, slice]:
        """What cuts `box` out of `pixels`."""
        return box.shifted(-self.band.read_top, 0).slices


@dataclass(eq=False)
class _Request:
    """One tile that waits for the engine."""

    tile: Tile
    job: _Job
    finished: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    @property
    def kind(self) -> Hashable:
        """Tiles of the same kind can go through the engine together."""
        pixels = self.job.pixels
        return self.job.upscaler, self.tile.read.shape, pixels.shape[2], pixels.dtype

    def crop(self) -> np.ndarray:
        """(h, w, C): what the tile reads."""
        return self.job.pixels[self.job.rows(self.tile.read)]

    def keep(self, result: np.ndarray, scale: int) -> None:
        """Put the core of `result` (h*scale, w*scale, C) in its place."""
        core = self.tile.core.within(self.tile.read).scaled(scale)
        place = self.tile.core.shifted(-self.job.band.top, 0).scaled(scale)
        self.job.sr[place.slices] = result[core.slices]


def _band(tiles: Sequence[Tile], height: int, *, has_alpha: bool) -> Band:
    """The rows of tiles that stand side by side."""
    read_top, read_bottom = tiles[0].read.top, tiles[0].read.bottom
    if has_alpha:
        # Whole blocks of the coarsest level, and the next ones that it looks at: see `bleed`.
        block = 2 ** (BLEED_LEVELS - 1)
        read_top = max(read_top // block * block - block, 0)
        read_bottom = min(-(-read_bottom // block) * block + block, height)
    return Band(tiles[0].core.top, tiles[0].core.bottom, read_top, read_bottom, tuple(tiles))


def _padded(crops: np.ndarray, multiple_of: int) -> np.ndarray:
    """`crops` (N, h, w, C) mirrored at the bottom and right up to multiples of `multiple_of`."""
    bottom, right = -crops.shape[1] % multiple_of, -crops.shape[2] % multiple_of
    if not (bottom or right):
        return crops
    return np.pad(crops, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="reflect")


def _mean_channel(sr: np.ndarray) -> np.ndarray:
    """(N, H, W, C) to the mean (N, H, W, 1), rounded for whole numbers."""
    if sr.dtype == np.float32:
        return sr.mean(axis=3, keepdims=True)
    channels = sr.shape[3]
    total = sr.sum(axis=3, dtype=np.uint16 if sr.dtype == np.uint8 else np.uint32, keepdims=True)
    return ((total + channels // 2) // channels).astype(sr.dtype)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the machine, had no room. torch has no class of its own for the machine's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


# ---------------------------------------------------------------- transparency


def bleed(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`pixels` (H, W, C) with colours under fully transparent ones made up from visible ones nearby.

    Each takes the mean of the visible pixels in the smallest neighbourhood that has any, of 3, 6, 12, ...
    pixels, up to three times 64. A network would otherwise draw the colour hidden there, often black or
    white, into the visible edge. Visible pixels, and those far from any, stay exactly as they are.
    """
    is_hidden = alpha <= 0
    if not is_hidden.any() or is_hidden.all():
        return pixels
    fills = _fills(pixels, ~is_hidden)
    bled = pixels.copy()
    wanted = is_hidden & fills.is_known
    found = fills.colours[wanted]
    bled[wanted] = found if pixels.dtype == np.float32 else np.rint(found).astype(pixels.dtype)
    return bled


@dataclass(frozen=True, eq=False)
class _Fills:
    """A mean colour (H, W, C) float32 for each pixel or block of pixels, where one is known (H, W)."""

    colours: np.ndarray
    is_known: np.ndarray


def _fills(pixels: np.ndarray, is_visible: np.ndarray) -> _Fills:
    """For each pixel the mean of the visible ones in the smallest neighbourhood that has any."""
    counts = is_visible.astype(np.float32)[:, :, None]
    sums = pixels.astype(np.float32) * counts
    return _filled(sums, counts, levels=BLEED_LEVELS)


def _filled(sums: np.ndarray, counts: np.ndarray, *, levels: int) -> _Fills:
    """From sums (H, W, C) and counts (H, W, 1) of visible pixels in each block, finest level first."""
    near_sums, near_counts = _with_neighbours(sums), _with_neighbours(counts)
    fills = _Fills(near_sums / np.maximum(near_counts, 1), near_counts[:, :, 0] > 0)
    if levels == 1:
        return fills
    coarse = _filled(_halved(sums), _halved(counts), levels=levels - 1)
    height, width = fills.is_known.shape
    missing = ~fills.is_known
    fills.colours[missing] = _enlarged(coarse.colours, 2)[:height, :width][missing]
    return _Fills(fills.colours, fills.is_known | _enlarged(coarse.is_known, 2)[:height, :width])


def _with_neighbours(blocks: np.ndarray) -> np.ndarray:
    """Each of (H, W, C) plus its eight neighbours."""
    padded = np.pad(blocks, ((1, 1), (1, 1), (0, 0)))
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    near: np.ndarray = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return near


def _halved(blocks: np.ndarray) -> np.ndarray:
    """(H, W, C) to the sums of 2 x 2, (H/2, W/2, C), rounded up."""
    height, width = blocks.shape[:2]
    even = np.pad(blocks, ((0, height % 2), (0, width % 2), (0, 0)))
    rows = even[0::2] + even[1::2]
    halved: np.ndarray = rows[:, 0::2] + rows[:, 1::2]
    return halved


def _is_plain(alpha: np.ndarray) -> np.ndarray:
    """(H, W) bool: whether all within `PLAIN_RADIUS` of a pixel have its value."""
    low = high = np.pad(alpha, PLAIN_RADIUS, mode="edge")
    for axis in (0, 1):
        low, high = _along(np.minimum, low, axis), _along(np.maximum, high, axis)
    return low == high


def _along(choose: Callable[..., np.ndarray], values: np.ndarray, axis: int) -> np.ndarray:
    """`choose` over windows of 2 * PLAIN_RADIUS + 1 along `axis`; the axis loses two radii."""
    length = values.shape[axis] - 2 * PLAIN_RADIUS
    parts = [values.take(range(first, first + length), axis) for first in range(2 * PLAIN_RADIUS + 1)]
    return choose.reduce(parts)  # type: ignore[attr-defined]


def _enlarged(blocks: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, ...) to (H*factor, W*factor, ...), each value repeated."""
    return blocks.repeat(factor, axis=0).repeat(factor, axis=1)
