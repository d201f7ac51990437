"""Every output pixel: an image through an engine, tile by tile, and an object from store to store.

Knows no Ray, no formats but through the codecs, and no network but through its engine.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
import torch

from kdsr import codecs
from kdsr.engine import Engine
from kdsr.errors import (
    ImageCorrupt,
    ImageTooLarge,
    ImageUnsupported,
    KeyNotFound,
    RequestError,
    StoreError,
)
from kdsr.image import Image
from kdsr.manifest import Status, Task
from kdsr.store import Store
from kdsr.tiles import Tile, plan

MIN_TILE_SIZE = 128
"""Activations of such a tile stay in a CPU's cache; measured as fast as larger ones or faster."""


class Upscaler:
    """Images of any size through one engine. Safe to share between threads.

    `tile_size` is the height and width of a tile's core in LR pixels. When not set it is 128, or so many
    times the halo that the halo costs little. Up to `batch_size` tiles of one shape go through the engine
    at once. Tiles run in `compute`; in the caller's thread when it is not given.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tile_size: int | None = None,
        batch_size: int = 4,
        compute: Executor | None = None,
    ) -> None:
        self.engine = engine
        self._tile_size = tile_size or max(MIN_TILE_SIZE, 8 * engine.receptive_radius)
        self._batch_size = batch_size
        self._compute = compute

    def upscale(self, image: Image) -> Image:
        """`image` (h, w) to (h*scale, w*scale), grey as grey, alpha through the same network, metadata kept.

        Raises RequestError for a colour image and a network for grey ones, ImageUnsupported for 16 bits,
        DataError when the network's output is not finite.
        """
        if image.pixels.dtype != np.uint8:
            raise ImageUnsupported(f"{image.pixels.dtype} pixels cannot be upscaled yet; convert to 8 bits")
        alpha = None if image.alpha is None else self._upscale_alpha(image.alpha)
        return replace(image, pixels=self._upscale_pixels(image.pixels), alpha=alpha)

    def _upscale_alpha(self, alpha: np.ndarray) -> np.ndarray:
        """(h, w) to (h*scale, w*scale). A plain one stays exactly as it is, opaque above all."""
        scale = self.engine.scale
        if alpha.min() == alpha.max():
            return np.full((alpha.shape[0] * scale, alpha.shape[1] * scale), alpha.flat[0])
        return self._upscale_pixels(alpha[:, :, None])[:, :, 0]

    def _upscale_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """(h, w, C) uint8 to (h*scale, w*scale, C); C is 1, or what the engine takes."""
        height, width, channels = pixels.shape
        if channels > self.engine.channels:
            raise RequestError(
                "the network is for grey images and this one has colours; use a network with 3 channels"
            )
        sr = np.empty((height * self.engine.scale, width * self.engine.scale, channels), dtype=np.uint8)
        tiles = plan(
            height,
            width,
            tile_size=self._tile_size,
            halo=self.engine.receptive_radius,
            multiple_of=self.engine.multiple_of,
        )
        self._run_all(lambda batch: self._upscale_tiles(batch, pixels, sr), self._batches(tiles))
        return sr

    def _batches(self, tiles: Sequence[Tile]) -> Iterator[list[Tile]]:
        """Tiles whose read boxes have one shape, at most `batch_size` of them."""
        by_shape: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        for tile in tiles:
            by_shape[tile.read.shape].append(tile)
        for same_shape in by_shape.values():
            for first in range(0, len(same_shape), self._batch_size):
                yield same_shape[first : first + self._batch_size]

    def _run_all(self, work: Callable[[Sequence[Tile]], None], batches: Iterator[Sequence[Tile]]) -> None:
        run = map if self._compute is None else self._compute.map
        for _ in run(work, batches):
            pass

    def _upscale_tiles(self, tiles: Sequence[Tile], pixels: np.ndarray, sr: np.ndarray) -> None:
        """Run `tiles` of `pixels` and put their cores into `sr`."""
        crops = np.stack([pixels[tile.read.slices] for tile in tiles])
        scale = self.engine.scale
        for tile, result in zip(tiles, self._run(crops), strict=True):
            core = tile.core.within(tile.read).scaled(scale)
            sr[tile.core.scaled(scale).slices] = result[core.slices]

    def _run(self, crops: np.ndarray) -> np.ndarray:
        """(N, h, w, C) through the engine, with the sizes and the channels that it takes."""
        is_grey_in_colour = crops.shape[3] < self.engine.channels
        if is_grey_in_colour:
            crops = np.repeat(crops, self.engine.channels, axis=3)
        sr = self.engine.run(_padded(crops, self.engine.multiple_of))
        return _mean_channel(sr) if is_grey_in_colour else sr


def _padded(crops: np.ndarray, multiple_of: int) -> np.ndarray:
    """`crops` (N, h, w, C) mirrored at the bottom and right up to multiples of `multiple_of`."""
    bottom, right = -crops.shape[1] % multiple_of, -crops.shape[2] % multiple_of
    if not (bottom or right):
        return crops
    return np.pad(crops, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="reflect")


def _mean_channel(sr: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 to the rounded mean (N, H, W, 1)."""
    channels = sr.shape[3]
    total = sr.sum(axis=3, dtype=np.uint16, keepdims=True)
    return ((total + channels // 2) // channels).astype(np.uint8)


# ---------------------------------------------------------------- objects in stores


class PixelBudget:
    """Lets images in until together they have `limit` pixels, and one of any size when it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for `pixels`, and keep it for the length of the block."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + pixels <= self._limit)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


@dataclass(frozen=True)
class ObjectUpscaler:
    """Objects of `source` to objects of `target`, each in the format of its input.

    Meant to be called from several threads: while one waits for the network, others download, decode,
    encode and write.
    """

    source: Store
    target: Store
    upscaler: Upscaler
    max_pixels: int
    """Larger inputs fail before they are decoded."""
    quality: int
    """Of JPEG and WebP."""
    budget: PixelBudget
    """Output pixels that all threads together hold in memory."""

    def upscale(self, task: Task) -> Status:
        """Do `task` and say what became of it; a failure is a row like any other and is not raised."""
        began = time.perf_counter()
        try:
            status = self._upscale(task)
        except _StageFailed as failure:
            status = Status(
                task.id,
                task.key,
                task.target,
                "failed",
                stage=failure.stage,
                error_class=error_class(failure.cause, task.key),
                message=str(failure.cause) or type(failure.cause).__name__,
            )
        return replace(status, seconds=time.perf_counter() - began)

    def _upscale(self, task: Task) -> Status:
        with _stage("download"):
            self._check_size(task)
            data = self.source.get(task.key)
        with _stage("decode"):
            header = codecs.probe(data)
        output_pixels = header.height * header.width * self.upscaler.engine.scale**2
        with self.budget.take(output_pixels):
            with _stage("decode"):
                image = codecs.decode(data, max_pixels=self.max_pixels)
            with _stage("upscale"):
                sr = self.upscaler.upscale(image)
            with _stage("encode"):
                encoded = codecs.encode(sr, format=header.format, quality=self.quality)
            with _stage("upload"):
                info = self.target.put(task.target, encoded)
        return Status(
            task.id,
            task.key,
            task.target,
            "done",
            megapixels=output_pixels / 1e6,
            output_bytes=info.size,
            output_etag=info.etag,
        )

    def _check_size(self, task: Task) -> None:
        """Raise ImageTooLarge for an object that cannot be an image of `max_pixels`, before it is read."""
        # 16 bits of red, green, blue and alpha for every pixel, and room for what lies beside them.
        limit = 8 * self.max_pixels + 64 * 2**20
        if task.size > limit:
            raise ImageTooLarge(
                f"{task.size} bytes are more than the {limit} that an image of max_pixels {self.max_pixels} "
                f"can have; raise it if the image is wanted"
            )


def error_class(error: Exception, key: str) -> str:
    """One word for the cause of a failed row: see `kdsr.manifest.Status`."""
    if isinstance(error, ImageCorrupt):
        # What neither calls itself an image nor is one was never a broken image.
        is_named_image = PurePosixPath(key).suffix.lower() in codecs.SUFFIXES
        return "corrupt" if is_named_image else "unsupported"
    return next((name for kind, name in _ERROR_CLASSES.items() if isinstance(error, kind)), "internal")


_ERROR_CLASSES: dict[type[Exception], str] = {
    ImageTooLarge: "too_large",
    ImageUnsupported: "unsupported",
    RequestError: "unsupported",
    KeyNotFound: "missing",
    StoreError: "store",
}


class _StageFailed(Exception):
    def __init__(self, stage: str, cause: Exception) -> None:
        super().__init__(stage)
        self.stage, self.cause = stage, cause


@contextmanager
def _stage(name: str) -> Iterator[None]:
    """Say in which stage an image failed, whatever the reason."""
    try:
        yield
    except Exception as error:
        raise _StageFailed(name, error) from error


def compute_threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads for `Upscaler`'s tiles, each of which keeps one core busy.

    Whole tiles in parallel waste less than one tile split over cores, where the slowest core, which may be
    encoding meanwhile, holds up the others in every layer.
    """
    return ThreadPoolExecutor(
        num_threads, thread_name_prefix="tiles", initializer=torch.set_num_threads, initargs=(1,)
    )
