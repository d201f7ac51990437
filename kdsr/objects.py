"""An object of one store to an object of another, upscaled: the unit of work of a bulk run.

What the result will be (format, size, frames) is decided from the header, before a pixel is decoded.
Knows no Ray, and no formats but through the codecs.
"""

import io
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

from kdsr import codecs, windows
from kdsr.codecs import ImageHeader
from kdsr.config import UpscaleConfig
from kdsr.encoded import Clock, EncodedUpscaler, Goal, StageFailed, goal_of, held_frames
from kdsr.errors import (
    ImageCorrupt,
    ImageTooLarge,
    ImageUnsupported,
    RequestError,
    StoreError,
)
from kdsr.manifest import Status, Task
from kdsr.store import ObjectInfo, Store
from kdsr.upscale import Upscaler

LARGE_OBJECT_BYTES = 64 * 2**20
"""Larger objects are read into a temporary file."""
RANGE_BYTES = 32 * 2**20
"""Of such an object that are read at once."""
BAND_ROWS = 512
"""Input rows of a huge image that are in memory at once, at most, in all their forms."""

Item = TypeVar("Item")


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
    """Objects of `source` to objects of `target`, as `config` says.

    Meant to be called from several threads: while one waits for the network, others download, decode,
    encode and write.
    """

    source: Store
    target: Store
    upscaler: Upscaler
    config: UpscaleConfig
    budget: PixelBudget
    """Output pixels, counted as bytes of a channel, that all threads together hold in memory."""

    def upscale(self, task: Task) -> Status:
        """Do `task` and say what became of it; a failure is a row like any other and is not raised."""
        clock = Clock()
        status = Status(task.id, task.key, task.target, "failed")
        try:
            status = self._upscale(status, task, clock)
        except StageFailed as failure:
            status = replace(
                status,
                stage=failure.stage,
                error_class=error_class(failure.cause, task.key),
                message=str(failure.cause) or type(failure.cause).__name__,
            )
        return _stamped(status, clock)

    def _upscale(self, failed: Status, task: Task, clock: Clock) -> Status:
        with ExitStack() as stack:
            with clock.stage("download"):
                self._check_size(task)
                file = stack.enter_context(self._download(task))
            with clock.stage("decode"):
                header = _header(file)
                goal = goal_of(header, self.config, net_scale=self.upscaler.engine.scale)
            with clock.stage("wait"):
                stack.enter_context(self.budget.take(self._cost(header, goal)))
            work = self._huge if goal.in_windows else self._in_memory
            info = work(_Work(task, file, header, goal, clock))
        return replace(
            failed,
            status="done",
            megapixels=goal.pixels / 1e6,
            output_bytes=info.size,
            output_etag=info.etag,
        )

    def _check_size(self, task: Task) -> None:
        """Raise ImageTooLarge for an object that cannot be an image of `max_pixels`, before it is read."""
        # 16 bits of red, green, blue and alpha for every pixel, and room for what lies beside them.
        limit = 8 * self.config.max_pixels + 64 * 2**20
        if task.size > limit:
            raise ImageTooLarge(
                f"{task.size} bytes are more than the {limit} that an image of max_pixels "
                f"{self.config.max_pixels} can have; raise it if the image is wanted"
            )

    def _download(self, task: Task) -> BinaryIO:
        """The object in memory, or when it is large in a temporary file, read by ranges."""
        if task.size <= LARGE_OBJECT_BYTES:
            data = self.source.get(task.key)
            if len(data) != task.size:
                raise StoreError(
                    f"{task.key} was listed with {task.size} bytes and read with {len(data)}; run again"
                )
            return io.BytesIO(data)
        file = tempfile.NamedTemporaryFile(prefix="kdsr-")  # noqa: SIM115 the caller closes it
        try:
            for start in range(0, task.size, RANGE_BYTES):
                file.write(self.source.get(task.key, start=start, length=RANGE_BYTES))
            if self.source.stat(task.key).etag != task.etag:
                raise StoreError(f"{task.key} was replaced while it was read; run again")
        except BaseException:
            file.close()
            raise
        return cast(BinaryIO, file)

    def _cost(self, header: ImageHeader, goal: Goal) -> int:
        """What the object takes of the budget: its largest picture, in bytes of a channel."""
        scale = self.upscaler.engine.scale
        height = min(header.height, BAND_ROWS) if goal.in_windows else header.height
        pixels = max(height * header.width * scale**2, goal.height * goal.width * height // header.height)
        if goal.frames > 1:
            pixels = pixels * header.largest_pixels // (header.height * header.width)
        return pixels * held_frames(goal.format, goal.frames) * header.bits // 8

    # ------------------------------------------------------------ in memory

    def _in_memory(self, work: "_Work") -> ObjectInfo:
        encoded = EncodedUpscaler(self.upscaler, self.config).upscale(
            work.data, work.header, work.goal, work.clock
        )
        with work.clock.stage("upload"):
            return self.target.put(work.task.target, encoded)

    # ------------------------------------------------------------ in windows

    def _huge(self, work: "_Work") -> ObjectInfo:
        """Upscale some rows at a time into a temporary file, and put that."""
        if self.config.max_bytes is not None:
            raise StageFailed(
                "encode",
                ImageTooLarge(
                    f"max_bytes is not available for results of more than {windows.IN_MEMORY_PIXELS} pixels"
                ),
            )
        goal, clock = work.goal, work.clock
        with tempfile.TemporaryDirectory(prefix="kdsr-") as folder:
            path = Path(folder) / "result"
            with clock.stage("decode"):
                source = self._row_source(work)
            bands = windows.upscaled_rows(source, self.upscaler, (goal.height, goal.width))
            write = windows.write_tiff if goal.format == "tiff" else windows.write_png
            with clock.stage("encode"), path.open("w+b") as file:
                write(file, clock.each("upscale", bands), (goal.height, goal.width), self.config.encode)
            with clock.stage("upload"):
                return self.target.put_file(work.task.target, path)

    def _row_source(self, work: "_Work") -> windows.RowSource:
        tiff = windows.open_tiff(work.file) if work.header.format == "tiff" else None
        if tiff is not None:
            return tiff
        return windows.ArrayRows(codecs.decode(work.data(), max_pixels=self.config.max_pixels))


@dataclass(frozen=True)
class _Work:
    """One object on its way."""

    task: Task
    file: BinaryIO
    header: ImageHeader
    goal: Goal
    clock: Clock

    def data(self) -> bytes:
        """All bytes of the object."""
        return _all_of(self.file)


def _all_of(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read()


def _header(file: BinaryIO) -> ImageHeader:
    """What the header says; of a TIFF in a file without reading the file whole."""
    if not isinstance(file, io.BytesIO):
        file.seek(0)
        if codecs.identify(file.read(codecs.HEAD_BYTES)) == "tiff":
            tiff = windows.open_tiff(file)
            if tiff is not None:
                return ImageHeader("tiff", tiff.height, tiff.width, frames=tiff.pages, bits=tiff.bits)
    return codecs.probe(_all_of(file))


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
    StoreError: "store",
    MemoryError: "too_large",
}


def _stamped(status: Status, clock: Clock) -> Status:
    """`status` with the seconds of each stage, and of all."""
    return replace(
        status,
        seconds=clock.total,
        download_seconds=clock.spent("download"),
        decode_seconds=clock.spent("decode"),
        net_seconds=clock.spent("upscale"),
        encode_seconds=clock.spent("encode"),
        upload_seconds=clock.spent("upload"),
        wait_seconds=clock.spent("wait"),
    )
