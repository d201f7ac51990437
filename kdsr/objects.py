"""An object of one store to an object of another, upscaled: the unit of work of a bulk run.

What the result will be (format, size, frames) is decided from the header, before a pixel is decoded.
Knows no Ray, and no formats but through the codecs.
"""

import io
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

from kdsr import codecs, windows
from kdsr.codecs import ImageHeader
from kdsr.config import EncodeConfig, UpscaleConfig
from kdsr.errors import (
    ImageCorrupt,
    ImageTooLarge,
    ImageUnsupported,
    RequestError,
    StoreError,
)
from kdsr.image import Frame
from kdsr.manifest import Status, Task
from kdsr.resize import fit_bytes, resize, shrunk, target_size
from kdsr.store import ObjectInfo, Store
from kdsr.upscale import Upscaler

LARGE_OBJECT_BYTES = 64 * 2**20
"""Larger objects are read into a temporary file."""
RANGE_BYTES = 32 * 2**20
"""Of such an object that are read at once."""
HELD_FRAMES = 8
"""Frames of an animation that are in memory at once, those that its writer compares or packs included."""
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
class Goal:
    """What the result of one object will be."""

    format: str
    height: int
    width: int
    frames: int
    """How many of the input's frames it has."""
    in_windows: bool
    """Whether it is made some rows at a time."""

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.height * self.width * self.frames


def goal_of(header: ImageHeader, config: UpscaleConfig, *, net_scale: int) -> Goal:
    """What becomes of an input with this header; nothing but the header is needed.

    The format is the one of the configuration, else the input's, else what `encode.oversize` says when a
    side is longer than the format's longest. All frames are kept where the format holds frames, but the
    pages of a document become no animation: of those, and for other formats, only the first is taken.
    Raises ImageTooLarge for more pixels, frames or pixels a side than are allowed.
    """
    _check_limits(header, config)
    format_ = config.format or codecs.output_format(header.format)
    height, width = target_size(header.height, header.width, net_scale=net_scale, config=config)
    if max(height, width) > codecs.largest_side(format_):
        if config.encode.oversize == "error":
            raise ImageTooLarge(
                f"the result has {width} x {height} pixels, and {format_} holds at most "
                f"{codecs.largest_side(format_)} a side; choose --encode.oversize tiff or png"
            )
        format_ = config.encode.oversize
    is_document = header.format == "tiff" and format_ != "tiff"
    keeps_frames = header.frames > 1 and codecs.can_hold_frames(format_) and not is_document
    net_pixels = header.height * header.width * net_scale**2
    is_huge = max(net_pixels, height * width) > windows.IN_MEMORY_PIXELS
    return Goal(
        format_,
        height,
        width,
        frames=header.frames if keeps_frames else 1,
        in_windows=is_huge and not keeps_frames and format_ in windows.FORMATS,
    )


def _check_limits(header: ImageHeader, config: UpscaleConfig) -> None:
    if header.height * header.width > config.max_pixels:
        raise ImageTooLarge(
            f"{header.width} x {header.height} pixels are more than max_pixels {config.max_pixels}; "
            f"raise it if the image is wanted"
        )
    if header.frames > config.max_frames:
        raise ImageTooLarge(
            f"{header.frames} frames are more than max_frames {config.max_frames}; "
            f"raise it if the image is wanted"
        )


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
        clock = _Clock()
        status = Status(task.id, task.key, task.target, "failed")
        try:
            status = self._upscale(status, task, clock)
        except _StageFailed as failure:
            status = replace(
                status,
                stage=failure.stage,
                error_class=error_class(failure.cause, task.key),
                message=str(failure.cause) or type(failure.cause).__name__,
            )
        return clock.stamped(status)

    def _upscale(self, failed: Status, task: Task, clock: "_Clock") -> Status:
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
        return pixels * min(goal.frames, HELD_FRAMES) * header.bits // 8

    # ------------------------------------------------------------ in memory

    def _in_memory(self, work: "_Work") -> ObjectInfo:
        encode = self._animation(work) if work.goal.frames > 1 else self._still(work)
        options = self.config.encode
        if self.config.max_bytes is None:
            encoded = encode(options.quality, 1.0)
        else:
            has_quality = work.goal.format in ("jpeg", "avif", "webp")
            is_lossless = work.goal.format == "webp" and options.lossless
            encoded = fit_bytes(
                encode,
                max_bytes=self.config.max_bytes,
                quality=options.quality,
                has_quality=has_quality and not is_lossless,
            )
        with work.clock.stage("upload"):
            return self.target.put(work.task.target, encoded)

    def _still(self, work: "_Work") -> Callable[[int, float], bytes]:
        """What encodes the upscaled image with a quality and a factor for its sides."""
        goal, clock = work.goal, work.clock
        with clock.stage("decode"):
            image = codecs.decode(work.data(), max_pixels=self.config.max_pixels)
        with clock.stage("upscale"):
            sr = self.upscaler.upscale(image)

        def encode(quality: int, factor: float) -> bytes:
            with clock.stage("upscale"):
                resized = resize(sr, *shrunk((goal.height, goal.width), factor))
            with clock.stage("encode"):
                return codecs.encode(resized, format=goal.format, options=self._options(quality))

        return encode

    def _animation(self, work: "_Work") -> Callable[[int, float], bytes]:
        """What upscales and encodes all frames, one at a time; a frame is not kept for another try."""

        def encode(quality: int, factor: float) -> bytes:
            with work.clock.stage("encode"):
                return codecs.encode_frames(
                    self._frames(work, factor),
                    format=work.goal.format,
                    loop=work.header.loop,
                    options=self._options(quality),
                )

        return encode

    def _frames(self, work: "_Work", factor: float) -> Iterator[Frame]:
        """Each frame at its own size: the pages of a document may differ."""
        scale, config = self.upscaler.engine.scale, self.config
        with work.clock.stage("decode"):
            frames = codecs.decode_frames(
                work.data(), max_pixels=config.max_pixels, max_frames=config.max_frames
            )
        while (frame := work.clock.next("decode", frames)) is not None:
            with work.clock.stage("upscale"):
                image = frame.image
                size = target_size(image.height, image.width, net_scale=scale, config=config)
                sr = resize(self.upscaler.upscale(image), *shrunk(size, factor))
            yield replace(frame, image=sr)

    def _options(self, quality: int) -> EncodeConfig:
        return self.config.encode.model_copy(update={"quality": quality})

    # ------------------------------------------------------------ in windows

    def _huge(self, work: "_Work") -> ObjectInfo:
        """Upscale some rows at a time into a temporary file, and put that."""
        if self.config.max_bytes is not None:
            raise _StageFailed(
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
    clock: "_Clock"

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


class _StageFailed(Exception):
    def __init__(self, stage: str, cause: Exception) -> None:
        super().__init__(stage)
        self.stage, self.cause = stage, cause


class _Clock:
    """Seconds that one object spent in each stage. A stage within another stops the outer one's time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._began = self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book the time of the block, and say in which stage an image failed, whatever the reason."""
        self._book()
        self._running.append(name)
        try:
            yield
        except _StageFailed:
            raise
        except Exception as error:
            raise _StageFailed(name, error) from error
        finally:
            self._book()
            self._running.pop()

    def next(self, name: str, items: Iterator[Item]) -> Item | None:
        """The next item, made in stage `name`; None after the last."""
        with self.stage(name):
            return next(items, None)

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items, each made in stage `name`."""
        while (item := self.next(name, items)) is not None:
            yield item

    def stamped(self, status: Status) -> Status:
        """`status` with the seconds of each stage, and of all."""
        spent = self._seconds
        return replace(
            status,
            seconds=time.perf_counter() - self._began,
            download_seconds=spent["download"],
            decode_seconds=spent["decode"],
            net_seconds=spent["upscale"],
            encode_seconds=spent["encode"],
            upload_seconds=spent["upload"],
            wait_seconds=spent["wait"],
        )

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
