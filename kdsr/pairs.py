"""LR and HR patches from shards, in an order that a small cursor can continue exactly.

One global order of patches follows from (seed, epoch) alone. A step takes the next `batch_size` of them and
rank r every world_size-th, so the union over the ranks is the same for any number of workers. The price:
each rank reads every row group, though it decodes only the rows it takes patches from.
"""

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from math import lcm
from queue import Queue
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kdsr import shards
from kdsr.config import DataConfig
from kdsr.degrade import Degrade
from kdsr.errors import DataError, RequestError
from kdsr.shards import Row, ZoomCrop
from kdsr.spec import Channels, ShardIndex, StoredTap
from kdsr.store import Store

Array = np.ndarray


@dataclass(frozen=True)
class ZoomPair:
    """Parts of HR as inputs (B, C, p, p), and the teacher's stored answers (B, C, p*scale, p*scale)."""

    lr: Tensor
    teacher_sr: Tensor


@dataclass(frozen=True)
class PairBatch:
    """A batch on the device. `lr` (B, C, h, w), `hr` and `teacher_sr` (B, C, h*scale, w*scale), in [0, 1]."""

    lr: Tensor
    hr: Tensor
    teacher_sr: Tensor | None = None
    """The teacher's stored output for `lr`, when the shards carry one."""
    teacher_features: Mapping[str, Tensor] | None = None
    """The teacher's stored features (B, rank, h', w') for `lr`, by tap."""
    zoom: ZoomPair | None = None
    """Another input from the same images, with the teacher's stored answer."""
    progress: float = 0.0
    """How much of the run is done, 0 to 1; schedules read it."""


class Cursor(NamedTuple):
    """Where a run is in its data: the next patch of a window of an epoch."""

    epoch: int = 0
    window: int = 0
    patch: int = 0


class RowGroup(NamedTuple):
    """The unit that is read from a store."""

    shard: int
    row_group: int


class _Zoom(NamedTuple):
    lr: Array
    """([b,] p, p, 3) uint8."""
    teacher_sr: Array


@dataclass(frozen=True)
class PatchBatch:
    """What one rank reads for one step: HR patches with context, and the cursor behind the step."""

    hr: Array
    """(b, P, P, 3) uint8."""
    teacher_sr: Array | None
    cursor: Cursor
    seed: int
    """Of the random parts of the degradation."""
    teacher_features: Mapping[str, Array] = field(default_factory=dict)
    """By tap, (b, rank, h', w') float16 of the patches without their context."""
    zoom: _Zoom | None = None


class _Patch(NamedTuple):
    row: int
    """Index into the rows of the window."""
    variant: int
    """Which of the patches of that row."""


class _Pixels(NamedTuple):
    """One patch."""

    hr: Array
    """(P, P, 3) uint8."""
    teacher_sr: Array | None
    teacher_features: Mapping[str, Array]
    zoom: _Zoom | None


class _Answer:
    """A zoomed-in input of a sub-image, decoded when a patch first wants it."""

    def __init__(self, row: Row, crop: ZoomCrop) -> None:
        self._row, self.crop = row, crop

    @cached_property
    def sr(self) -> Array:
        """(side*scale, side*scale, 3) uint8."""
        return shards.row_pixels(self._row, self.crop.teacher_sr)


class _Decoded(NamedTuple):
    """A sub-image, whole."""

    hr: Array
    """(H, W, 3) uint8."""
    teacher_sr: Array | None
    teacher_features: Mapping[str, Array]
    """By tap, (rank, h', w') float16."""
    answers: Sequence[_Answer]


class _Turn(NamedTuple):
    """A quarter turn so many times, and then perhaps a mirror image."""

    turns: int = 0
    mirror: bool = False

    def of(self, array: Array, axes: tuple[int, int] = (0, 1)) -> Array:
        """`array` turned in the plane of `axes`, rows first; a copy."""
        turned = np.rot90(array, self.turns, axes)
        return np.ascontiguousarray(np.flip(turned, axes[1]) if self.mirror else turned)


def epoch_windows(index: ShardIndex, *, epoch: int, seed: int, window_rows: int) -> list[list[RowGroup]]:
    """Every row group once, in the order of `epoch`, cut into windows of at least `window_rows` rows."""
    groups = [RowGroup(s, g) for s, entry in enumerate(index.shards) for g in range(len(entry.row_groups))]
    order = np.random.default_rng([seed, epoch]).permutation(len(groups))
    windows: list[list[RowGroup]] = []
    rows_in_window = window_rows
    for group in (groups[i] for i in order):
        if rows_in_window >= window_rows:
            windows.append([])
            rows_in_window = 0
        windows[-1].append(group)
        rows_in_window += index.shards[group.shard].row_groups[group.row_group]
    return windows


@dataclass(frozen=True)
class PatchReader:
    """Reads, decodes and cuts patches for one rank. Knows no device and no network."""

    store: Store
    index: ShardIndex
    data: DataConfig
    scale: int
    context: int
    """LR pixels around a patch that its LR depends on and that are dropped later."""
    batch_size: int
    """Patches of a step over all ranks."""
    seed: int
    columns: tuple[str, ...] = ("image", "teacher_sr")
    """Those that are read, where there are any; a teacher's must be of this `scale`. See `read_row_group`."""
    rank: int = 0
    world_size: int = 1

    @property
    def side(self) -> int:
        """Height and width in HR pixels of a patch with its context."""
        return (self.data.patch_size + 2 * self.context) * self.scale

    @cached_property
    def _taps(self) -> tuple[StoredTap, ...]:
        """Those whose features are read."""
        return tuple(
            tap for tap in self.index.carried.taps if shards.features_column(tap.tap) in self.columns
        )

    @cached_property
    def _grid(self) -> int:
        """Patches begin at multiples of so many LR pixels, where features have places."""
        grid = lcm(*(tap.stride for tap in self._taps))
        if self.data.patch_size % grid:
            raise RequestError(
                f"data.patch_size {self.data.patch_size}: the stored features have a place for each {grid} "
                f"x {grid} LR pixels; choose a multiple of {grid}"
            )
        return grid

    @property
    def _first(self) -> int:
        """Where the first patch with its context may begin, in LR pixels."""
        return -self.context % self._grid

    def batches(self, start: Cursor = Cursor()) -> Iterator[PatchBatch]:
        """This rank's part of every step from `start` on, without end, read ahead by one window.

        Raises DataError when an epoch passes in which no sub-image is large enough.
        """
        stream = _read_ahead(self._patches(start), depth=self.data.window_rows * self.data.patches_per_row)
        while True:
            step = [next(stream) for _ in range(self.batch_size)]
            own = [patch for patch, _ in step if patch is not None]
            cursor = step[-1][1]
            yield _collate(own, cursor, seed=mixed_seed(self.seed, *cursor, self.rank))

    def _patches(self, start: Cursor) -> Iterator[tuple[_Pixels | None, Cursor]]:
        """All patches from `start` in the global order; those of other ranks as None.

        A step is a whole batch, so position in the stream decides the rank, and the stream starts at a step.
        """
        cursor = start
        position = 0
        with ThreadPoolExecutor(self.data.num_threads) as pool:
            while True:
                found = False
                windows = epoch_windows(
                    self.index, epoch=cursor.epoch, seed=self.seed, window_rows=self.data.window_rows
                )
                for number in range(cursor.window, len(windows)):
                    here = Cursor(cursor.epoch, number, cursor.patch if number == cursor.window else 0)
                    for patch, after in self._window(pool, windows[number], here, position):
                        found = True
                        position += 1
                        yield patch, after
                if not found and cursor == Cursor(cursor.epoch, 0, 0):
                    raise self._nothing_fits()
                cursor = Cursor(cursor.epoch + 1, 0, 0)

    def _nothing_fits(self) -> DataError:
        return DataError(
            f"{self.store.uri}: no training sub-image has at least {self.side} pixels in height and width, "
            f"which data.patch_size {self.data.patch_size} needs at scale {self.scale}; use a smaller "
            f"patch_size, or shard with a larger sub_image_size"
        )

    def _window(
        self, pool: ThreadPoolExecutor, groups: list[RowGroup], start: Cursor, position: int
    ) -> Iterator[tuple[_Pixels | None, Cursor]]:
        rows = [row for group in groups for row in self._rows(group)]
        patches = [_Patch(r, v) for r in range(len(rows)) for v in range(self.data.patches_per_row)]
        order = np.random.default_rng([self.seed, start.epoch, start.window]).permutation(len(patches))
        left = [patches[i] for i in order][start.patch :]
        own = [p for i, p in enumerate(left) if self._is_own(position + i)]
        pixels = self._cut_all(pool, rows, own, start.epoch)
        for offset, patch in enumerate(left):
            yield pixels.pop(patch, None), Cursor(start.epoch, start.window, start.patch + offset + 1)

    def _is_own(self, position: int) -> bool:
        return position % self.batch_size % self.world_size == self.rank

    def _rows(self, group: RowGroup) -> list[Row]:
        entry = self.index.shards[group.shard]
        rows = shards.read_row_group(self.store, entry, group.row_group, columns=self.columns)
        return [row for row in rows if not row.heldout and self._fits(row)]

    def _fits(self, row: Row) -> bool:
        whole = min(row.height, row.width) // self.scale * self.scale
        return whole >= self.side + self._first * self.scale

    def _cut_all(
        self, pool: ThreadPoolExecutor, rows: list[Row], own: list[_Patch], epoch: int
    ) -> dict[_Patch, _Pixels]:
        """Decode each row that has a patch of this rank once, and cut all of them."""
        variants: dict[int, list[int]] = {}
        for patch in own:
            variants.setdefault(patch.row, []).append(patch.variant)

        def cut_row(row: int) -> list[tuple[_Patch, _Pixels]]:
            images = self._decode(rows[row])
            return [
                (_Patch(row, variant), self._cut(rows[row], images, epoch, variant))
                for variant in variants[row]
            ]

        return dict(pair for pairs in pool.map(cut_row, variants) for pair in pairs)

    def _decode(self, row: Row) -> _Decoded:
        teacher_sr = None if row.teacher_sr is None else shards.row_pixels(row, row.teacher_sr)
        return _Decoded(
            shards.row_pixels(row, row.image),
            teacher_sr,
            {tap.tap: shards.row_features(row, tap.tap) for tap in self._taps},
            [_Answer(row, crop) for crop in row.zoom],
        )

    def _cut(self, row: Row, images: _Decoded, epoch: int, variant: int) -> _Pixels:
        """One patch, its place and its flips drawn from (seed, epoch, sub-image, variant) alone."""
        place = f"{row.key} {row.x} {row.y}"
        random = np.random.default_rng([self.seed, epoch, zlib.crc32(place.encode()), variant])
        height, width = images.hr.shape[:2]
        top, left = self._place(height, random), self._place(width, random)
        turn = self._turn(random)

        def patch(image: Array) -> Array:
            y, x = top * self.scale, left * self.scale
            return turn.of(image[y : y + self.side, x : x + self.side])

        return _Pixels(
            patch(images.hr),
            None if images.teacher_sr is None else patch(images.teacher_sr),
            {
                tap.tap: self._features(images.teacher_features[tap.tap], tap, top, left, turn)
                for tap in self._taps
            },
            self._zoom(images, random) if images.answers else None,
        )

    def _place(self, length: int, random: np.random.Generator) -> int:
        """Where a patch with its context begins, on the LR grid of the whole image, so that labels fit."""
        last = (length - self.side) // self.scale
        return self._first + self._grid * int(random.integers(0, (last - self._first) // self._grid + 1))

    def _turn(self, random: np.random.Generator) -> _Turn:
        if not self.data.augment:
            return _Turn()
        return _Turn(int(random.integers(4)), bool(random.integers(2)))

    def _features(self, features: Array, tap: StoredTap, top: int, left: int, turn: _Turn) -> Array:
        """What belongs to a patch without its context."""
        y, x = ((edge + self.context) // tap.stride for edge in (top, left))
        side = self.data.patch_size // tap.stride
        return turn.of(features[:, y : y + side, x : x + side], axes=(1, 2))

    def _zoom(self, images: _Decoded, random: np.random.Generator) -> _Zoom:
        """One of the stored inputs, or a part of it, turned on its own."""
        answer = images.answers[int(random.integers(len(images.answers)))]
        side = self._zoom_side
        height, width = (length // self.scale for length in answer.sr.shape[:2])
        top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
        y, x = answer.crop.y + top, answer.crop.x + left
        lr = images.hr[y : y + side, x : x + side]
        y, x, long = top * self.scale, left * self.scale, side * self.scale
        turn = self._turn(random)
        return _Zoom(turn.of(lr), turn.of(answer.sr[y : y + long, x : x + long]))

    @property
    def _zoom_side(self) -> int:
        zoom = self.index.carried.zoom
        assert zoom is not None
        return min(self.data.patch_size, zoom.side)


def _collate(pixels: list[_Pixels], cursor: Cursor, *, seed: int) -> PatchBatch:
    teacher = [patch.teacher_sr for patch in pixels if patch.teacher_sr is not None]
    zooms = [patch.zoom for patch in pixels if patch.zoom is not None]
    taps = pixels[0].teacher_features
    return PatchBatch(
        hr=np.stack([patch.hr for patch in pixels]),
        teacher_sr=np.stack(teacher) if teacher else None,
        cursor=cursor,
        seed=seed,
        teacher_features={tap: np.stack([patch.teacher_features[tap] for patch in pixels]) for tap in taps},
        zoom=_Zoom(*map(np.stack, zip(*zooms, strict=True))) if zooms else None,
    )


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class PairMaker:
    """From HR patches with context to pairs on the device."""

    degrade: Degrade
    scale: int
    context: int
    channels: Channels
    device: torch.device

    def __call__(self, batch: PatchBatch) -> PairBatch:
        """(b, P, P, 3) uint8 to LR, HR and teacher SR in [0, 1], the context dropped from all of them."""
        hr = self._to_device(batch.hr)
        generator = torch.Generator(self.device).manual_seed(batch.seed)
        lr = self.degrade(hr, generator)
        teacher_sr = None if batch.teacher_sr is None else self._to_device(batch.teacher_sr)
        edge = self.context * self.scale
        return PairBatch(
            lr=_drop(lr, self.context),
            hr=_drop(hr, edge),
            teacher_sr=None if teacher_sr is None else _drop(teacher_sr, edge),
            teacher_features={
                tap: torch.from_numpy(features).to(self.device, non_blocking=True).float()
                for tap, features in batch.teacher_features.items()
            }
            or None,
            zoom=None if batch.zoom is None else ZoomPair(*map(self._to_device, batch.zoom)),
        )

    def _to_device(self, pixels: Array) -> Tensor:
        images = torch.from_numpy(pixels).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        images = images.float() / 255
        return images if self.channels == 3 else grey(images)


def grey(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 1, H, W), BT.601 luma of full range."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(1, 3, 1, 1)
    return (rgb * weights).sum(dim=1, keepdim=True)


def _drop(images: Tensor, edge: int) -> Tensor:
    inner = images[..., edge : images.shape[-2] - edge, edge : images.shape[-1] - edge]
    return inner.contiguous(memory_format=torch.channels_last)


Item = TypeVar("Item")


def _read_ahead(items: Iterator[Item], *, depth: int) -> Iterator[Item]:
    """`items` made by a thread of its own, at most `depth` of them waiting; its error is raised here."""
    queue: Queue[Item | BaseException] = Queue(maxsize=depth)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                queue.put(item)
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            queue.put(error)

    threading.Thread(target=produce, daemon=True, name="read-ahead").start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        while not queue.empty():
            queue.get_nowait()
