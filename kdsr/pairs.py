"""LR and HR patches from shards, in an order that the number of a step continues exactly.

`kdsr.lanes` says which sub-image gives a patch to which place of which step; here they are read ahead,
decoded and cut. A worker reads the row groups that its own lanes are in, and no others.
"""

import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import count, pairwise
from math import lcm
from queue import Queue
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from kdsr import shards
from kdsr.config import DataConfig
from kdsr.degrade import Degrade
from kdsr.errors import DataError, RequestError
from kdsr.lanes import Lanes, own_lanes
from kdsr.shards import Row, ZoomCrop
from kdsr.spec import Channels, ShardEntry, ShardIndex, StoredTap
from kdsr.store import Store

Array = np.ndarray

READ_THREADS = 8
"""Row groups that are read at once; they wait for a store most of the time."""
CUT_AT_ONCE = 64
"""Patches that are cut together where a row group is cut as a whole."""
BATCHES_READY = 2
"""Batches that are cut before they are asked for."""


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
    weight: float = 1.0
    """What its means count for in the mean over workers: its patches, times workers / batch size."""

    def __len__(self) -> int:
        """Number of patches B."""
        return len(self.lr)

    def parts(self, most: int | None) -> list["PairBatch"]:
        """Itself in near-equal parts of at most `most` patches, which share its weight."""
        number = -(-len(self) // (most or len(self)))
        bounds = [part * len(self) // number for part in range(number + 1)]
        return [self] if number == 1 else [self._part(low, high) for low, high in pairwise(bounds)]

    def _part(self, low: int, high: int) -> "PairBatch":
        cut = {each.name: _sliced(getattr(self, each.name), low, high) for each in fields(self)}
        return PairBatch(**cut | {"weight": self.weight * (high - low) / len(self)})


def _sliced(value: Any, low: int, high: int) -> Any:
    match value:
        case Tensor():
            return value[low:high]
        case ZoomPair():
            return ZoomPair(value.lr[low:high], value.teacher_sr[low:high])
        case Mapping():
            return {name: tensor[low:high] for name, tensor in value.items()}
        case _:
            return value


class Cursor(NamedTuple):
    """Where a run is in its data."""

    step: int = 0
    """Steps that were taken in this order of the data; all but those of another order, before it."""


Columns = dict[str, Array]
"""What patches are made of, (n, ...) each: `hr`, and by the columns of their shards what a teacher said."""


class _Zoom(NamedTuple):
    lr: Array
    """([b,] p, p, 3) uint8."""
    teacher_sr: Array


@dataclass(frozen=True)
class PatchBatch:
    """What one worker reads for one step: HR patches with context, and the cursor behind the step."""

    hr: Array
    """(b, P, P, 3) uint8."""
    teacher_sr: Array | None
    cursor: Cursor
    seeds: tuple[int, ...]
    """Of the random parts of the degradation, one for each patch."""
    weight: float
    """See `PairBatch`."""
    teacher_features: Mapping[str, Array] = field(default_factory=dict)
    """By tap, (b, rank, h', w') float16 of the patches without their context."""
    zoom: _Zoom | None = None


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

    place: int
    """A number that tells it from others."""
    hr: Array
    """(H, W, 3) uint8."""
    teacher_sr: Array | None
    teacher_features: Mapping[str, Array]
    """By tap, (rank, h', w') float16."""
    answers: Sequence[_Answer]


class _Patch(NamedTuple):
    """A patch that is yet to be cut."""

    epoch: int
    variant: int
    """Which of the patches of its row."""
    row: Future[_Decoded]


class _Turn(NamedTuple):
    """A quarter turn so many times, and then perhaps a mirror image."""

    turns: int = 0
    mirror: bool = False

    def of_pixels(self, pixels: Array) -> Array:
        """(h, w, 3) uint8 turned; whole pixels are moved, which is faster than bytes."""
        return self.of(pixels.view("V3")).view(np.uint8)

    def of(self, array: Array, axes: tuple[int, int] = (0, 1)) -> Array:
        """`array` turned in the plane of `axes`, rows first; a copy."""
        turned = np.rot90(array, self.turns, axes)
        return np.ascontiguousarray(np.flip(turned, axes[1]) if self.mirror else turned)


@dataclass(frozen=True)
class PatchReader:
    """Reads, decodes and cuts the patches of one worker. Knows no device and no network.

    Memory: for each of its lanes, at most 3 * `mix_rows` + 1 decoded sub-images, and encoded the row groups
    of the rows that come next: one, two where a lane passes from one to another. Lanes that are in one row
    group share it. Nothing of it grows with the set.
    """

    store: Store
    index: ShardIndex
    data: DataConfig
    scale: int
    context: int
    """LR pixels around a patch that its LR depends on and that are dropped later."""
    batch_size: int
    """Patches of a step over all workers, and lanes of the run."""
    seed: int
    columns: tuple[str, ...] = ("image", "teacher_sr")
    """Those that are read, where there are any; a teacher's must be of this `scale`. See `read_row_group`."""
    rank: int = 0
    world_size: int = 1

    @property
    def side(self) -> int:
        """Height and width in HR pixels of a patch with its context."""
        return (self.data.patch_size + 2 * self.context) * self.scale

    @property
    def mix_rows(self) -> int:
        """Sub-images of one lane whose patches are mixed."""
        return -(-self.data.window_rows // self.batch_size)

    @property
    def own_lanes(self) -> range:
        """Those of this worker."""
        return own_lanes(self.batch_size, rank=self.rank, world_size=self.world_size)

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

    @cached_property
    def _row_groups(self) -> list[tuple[ShardEntry, int]]:
        return [(entry, group) for entry in self.index.shards for group in range(len(entry.row_groups))]

    @cached_property
    def _trained(self) -> tuple[Array, ...]:
        """Of each row group, which rows are trained on: those not held out in which a patch has room."""
        sides = (
            np.asarray(group) for shard in shards.trained_sides(self.store, self.index) for group in shard
        )
        least = self.side + self._first * self.scale
        return tuple(np.flatnonzero(side // self.scale * self.scale >= least) for side in sides)

    @cached_property
    def lanes(self) -> Lanes:
        """Those of the run. Raises DataError when no sub-image is large enough."""
        group_rows = tuple(len(rows) for rows in self._trained)
        if not any(group_rows):
            raise self._nothing_fits()
        return Lanes(group_rows, self.batch_size, self.data.patches_per_row, self.mix_rows, self.seed)

    def _nothing_fits(self) -> DataError:
        return DataError(
            f"{self.store.uri}: no training sub-image has at least {self.side} pixels in height and width, "
            f"which data.patch_size {self.data.patch_size} needs at scale {self.scale}; use a smaller "
            f"patch_size, or shard with a larger sub_image_size"
        )

    def batches(self, start: Cursor = Cursor()) -> Iterator[PatchBatch]:
        """This worker's part of every step from `start` on, without end, made by a thread of its own.

        Raises DataError when no sub-image is large enough.
        """
        return _read_ahead(self._batches(start), depth=BATCHES_READY)

    def _batches(self, start: Cursor) -> Generator[PatchBatch, None, None]:
        """Rows are asked for as many steps ahead as a lane takes for the rows that it mixes."""
        ahead = max(1, self.mix_rows * self.data.patches_per_row - BATCHES_READY)
        asked: deque[list[_Patch]] = deque()
        cut: deque[Future[PatchBatch]] = deque()
        with _Pools.of(self.data.num_threads) as pools:
            lanes = [self._patches(lane, start.step, pools) for lane in self.own_lanes]
            for step in count(start.step + 1 - ahead):
                asked.append([next(lane) for lane in lanes])
                if len(asked) > ahead:
                    cut.append(pools.cut.submit(self._batch, asked.popleft(), step))
                if len(cut) > BATCHES_READY:
                    yield cut.popleft().result()

    def _patches(self, lane: int, step: int, pools: "_Pools") -> Iterator[_Patch]:
        """Those of `lane` from `step` on, as promises; rows are decoded in the order of their first patch."""
        for mix in self.lanes.mixes(lane, step):
            groups = {row.group: self._group(row.group, pools) for row in mix.rows}
            decoded: dict[int, Future[_Decoded]] = {}
            for place, variant in mix.patches:
                if place not in decoded:
                    row = mix.rows[place]
                    decoded[place] = pools.decode.submit(self._promised, groups[row.group], row.row)
                yield _Patch(mix.epoch, variant, decoded[place])

    def _group(self, number: int, pools: "_Pools") -> Future[list[Row]]:
        """Read once for all lanes that are in it at the same time."""
        group = pools.groups.get(number)
        if group is None:
            group = pools.groups[number] = pools.read.submit(self._rows, number)
        return group

    def _rows(self, number: int) -> list[Row]:
        entry, group = self._row_groups[number]
        rows = shards.read_row_group(self.store, entry, group, columns=self.columns)
        return [rows[row] for row in self._trained[number]]

    def _promised(self, group: Future[list[Row]], number: int) -> _Decoded:
        return self._decoded(group.result()[number])

    def _decoded(self, row: Row) -> _Decoded:
        teacher_sr = None if row.teacher_sr is None else shards.row_pixels(row, row.teacher_sr)
        return _Decoded(
            zlib.crc32(f"{row.key} {row.x} {row.y}".encode()),
            shards.row_pixels(row, row.image),
            teacher_sr,
            {tap.tap: shards.row_features(row, tap.tap) for tap in self._taps},
            [_Answer(row, crop) for crop in row.zoom],
        )

    def _cut(self, images: _Decoded, epoch: int, variant: int) -> _Pixels:
        """A patch whose place and flips are drawn from (seed, epoch, sub-image, variant) alone."""
        random = np.random.default_rng([self.seed, epoch, images.place, variant])
        height, width = images.hr.shape[:2]
        top, left = self._place(height, random), self._place(width, random)
        turn = self._turn(random)

        def part(image: Array) -> Array:
            y, x = top * self.scale, left * self.scale
            return turn.of_pixels(image[y : y + self.side, x : x + self.side])

        return _Pixels(
            part(images.hr),
            None if images.teacher_sr is None else part(images.teacher_sr),
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
        return _Zoom(turn.of_pixels(lr), turn.of_pixels(answer.sr[y : y + long, x : x + long]))

    @property
    def _zoom_side(self) -> int:
        zoom = self.index.carried.zoom
        assert zoom is not None
        return min(self.data.patch_size, zoom.side)

    def _batch(self, patches: list[_Patch], step: int) -> PatchBatch:
        """What `step`, counted from 1, is made of."""
        cut = [self._cut(patch.row.result(), patch.epoch, patch.variant) for patch in patches]
        return self.batch_of(self._columns(cut), step)

    def _columns(self, patches: Sequence[_Pixels]) -> Columns:
        columns = {"hr": np.stack([patch.hr for patch in patches])}
        teacher = [patch.teacher_sr for patch in patches if patch.teacher_sr is not None]
        zooms = [patch.zoom for patch in patches if patch.zoom is not None]
        if teacher:
            columns["teacher_sr"] = np.stack(teacher)
        for tap in self._taps:
            features = [patch.teacher_features[tap.tap] for patch in patches]
            columns[shards.features_column(tap.tap)] = np.stack(features)
        for part in _Zoom._fields if zooms else ():
            columns[f"zoom/{part}"] = np.stack([getattr(zoom, part) for zoom in zooms])
        return columns

    def batch_of(self, columns: Columns, step: int) -> PatchBatch:
        """A batch for `step`, counted from 1, of as many patches as this worker has lanes."""
        return PatchBatch(
            hr=columns["hr"],
            teacher_sr=columns.get("teacher_sr"),
            cursor=Cursor(step),
            seeds=tuple(mixed_seed(self.seed, step, lane) for lane in self.own_lanes),
            weight=len(columns["hr"]) * self.world_size / self.batch_size,
            teacher_features={tap.tap: columns[shards.features_column(tap.tap)] for tap in self._taps},
            zoom=_Zoom(*(columns[f"zoom/{part}"] for part in _Zoom._fields))
            if "zoom/lr" in columns
            else None,
        )

    # ------------------------------------------------------------ row group by row group

    @property
    def num_groups(self) -> int:
        """Row groups of the set."""
        return len(self._row_groups)

    def epoch_at(self, step: int) -> int:
        """The epoch that all workers together are in when they have taken `step` steps."""
        return step * self.batch_size // (self.lanes.num_rows * self.data.patches_per_row)

    def patches_of_group(self, epoch: int, place: int) -> Iterator[Columns]:
        """All patches of the row group that comes at `place` of an epoch's order, some at a time.

        They are mixed, and the same as `batches` cuts from these rows in this epoch. Holds the decoded rows.
        """
        number = self.lanes.group_at(epoch, place)
        rows = [self._decoded(row) for row in self._rows(number)]
        each = self.data.patches_per_row
        order = np.random.default_rng([self.seed, epoch, number]).permutation(len(rows) * each)
        for first in range(0, len(order), CUT_AT_ONCE):
            cut = (divmod(int(patch), each) for patch in order[first : first + CUT_AT_ONCE])
            yield self._columns([self._cut(rows[row], epoch, variant) for row, variant in cut])


@dataclass(frozen=True)
class _Pools:
    """Threads of a reader, and the row groups that somebody still wants."""

    read: ThreadPoolExecutor
    decode: ThreadPoolExecutor
    cut: ThreadPoolExecutor
    groups: WeakValueDictionary[int, Future[list[Row]]]

    @classmethod
    @contextmanager
    def of(cls, num_threads: int) -> "Iterator[_Pools]":
        """Until the reader ends, which waits for nothing that has not begun."""
        read, decode, cut = map(ThreadPoolExecutor, (READ_THREADS, num_threads, num_threads))
        try:
            yield cls(read, decode, cut, WeakValueDictionary())
        finally:
            for pool in (read, decode, cut):
                pool.shutdown(wait=False, cancel_futures=True)


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
        pixels = torch.from_numpy(batch.hr).to(self.device, non_blocking=True)
        random = [torch.Generator(self.device).manual_seed(seed) for seed in batch.seeds]
        if self.channels == 3:
            lr = self.degrade.of_pixels(pixels, random)
        else:
            lr = self.degrade(self._images(pixels), random)
        edge = self.context * self.scale
        return PairBatch(
            lr=_inner(lr, (2, 3), self.context).contiguous(memory_format=torch.channels_last),
            hr=self._images(_inner(pixels, (1, 2), edge)),
            teacher_sr=None if batch.teacher_sr is None else self._inner_images(batch.teacher_sr, edge),
            teacher_features={
                tap: torch.from_numpy(features).to(self.device, non_blocking=True).float()
                for tap, features in batch.teacher_features.items()
            }
            or None,
            zoom=None if batch.zoom is None else ZoomPair(*(self._inner_images(each) for each in batch.zoom)),
            weight=batch.weight,
        )

    def _inner_images(self, pixels: Array, edge: int = 0) -> Tensor:
        on_device = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        return self._images(_inner(on_device, (1, 2), edge))

    def _images(self, pixels: Tensor) -> Tensor:
        """(b, H, W, 3) uint8 to (b, C, H, W) in [0, 1], channels last in memory."""
        images = pixels.permute(0, 3, 1, 2).float().div_(255)
        images = images if self.channels == 3 else grey(images)
        return images.contiguous(memory_format=torch.channels_last)


def grey(rgb: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, 1, H, W), BT.601 luma of full range."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=rgb.device).view(1, 3, 1, 1)
    return (rgb * weights).sum(dim=1, keepdim=True)


def _inner(images: Tensor, axes: tuple[int, int], edge: int) -> Tensor:
    """A view without `edge` pixels on each side."""
    for axis in axes:
        images = images.narrow(axis, edge, images.shape[axis] - 2 * edge)
    return images


Item = TypeVar("Item")


def made_ahead(make: PairMaker, batches: Iterator[PatchBatch]) -> Iterator[tuple[PairBatch, Cursor]]:
    """A pair and its cursor for each of `batches`; on a CPU made while the step before computes.

    What a step waits for is then no more than what it was not made in time. By one thread: a core that is
    free is enough, and where none is, steps are held up the less.
    """
    pairs = ((make(batch), batch.cursor) for batch in batches)
    return _by_one_thread(pairs) if make.device.type == "cpu" else pairs


def _by_one_thread(items: Generator[Item, None, None]) -> Iterator[Item]:
    """`items` made ahead, with torch's own threads for this thread alone."""
    num_threads = torch.get_num_threads()

    def produce() -> Generator[Item, None, None]:
        torch.set_num_threads(1)
        yield from items

    ahead = _read_ahead(produce(), depth=1)
    try:
        first = next(ahead)
    finally:
        # Torch gives the number that was set last, by whatever thread, to threads that are yet to come.
        torch.set_num_threads(num_threads)
    yield first
    yield from ahead


def _read_ahead(items: Generator[Item, None, None], *, depth: int) -> Iterator[Item]:
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
        finally:
            items.close()

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
