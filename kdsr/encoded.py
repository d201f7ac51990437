"""The bytes of an image file to those of its upscaled result: decode, upscale, resize, encode.

What the result will be (format, size, frames) is decided from the header, before a pixel is decoded. Knows no
stores and no Ray, and no formats but through the codecs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from kdsr import codecs, windows
from kdsr.codecs import ImageHeader
from kdsr.config import EncodeConfig, ResultConfig
from kdsr.errors import ImageTooLarge
from kdsr.image import Frame
from kdsr.resize import fit_bytes, resize, shrunk, target_size
from kdsr.turns import Claim
from kdsr.upscale import Upscaler

HELD_FRAMES = 8
"""Frames of an animation that are in memory at once, those that its writer compares or packs included."""


def held_frames(format_: str, frames: int) -> int:
    """Frames of a result that are in memory at once: AVIF's writer wants all of them."""
    return frames if format_ == "avif" else min(frames, HELD_FRAMES)


Item = TypeVar("Item")


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


def goal_of(header: ImageHeader, config: ResultConfig, *, net_scale: int) -> Goal:
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


def _check_limits(header: ImageHeader, config: ResultConfig) -> None:
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
class EncodedUpscaler:
    """Whole files in memory. Safe to share between threads.

    The work of a file ends early, with Abandoned in the stage that it is in, when `claim` is over.
    """

    upscaler: Upscaler
    config: ResultConfig
    claim: Claim | None = None

    def upscale(self, read: Callable[[], bytes], header: ImageHeader, goal: Goal, clock: "Clock") -> bytes:
        """The file of the result, for the input that `read` gives. Raises StageFailed with the cause."""
        work = _Work(read, header, goal, clock)
        encode = self._animation(work) if goal.frames > 1 else self._still(work)
        options = self.config.encode
        if self.config.max_bytes is None:
            return encode(options.quality, 1.0)
        has_quality = goal.format in ("jpeg", "avif", "webp")
        is_lossless = goal.format == "webp" and options.lossless
        return fit_bytes(
            encode,
            max_bytes=self.config.max_bytes,
            quality=options.quality,
            has_quality=has_quality and not is_lossless,
        )

    def _still(self, work: "_Work") -> Callable[[int, float], bytes]:
        """What encodes the upscaled image with a quality and a factor for its sides."""
        goal, clock = work.goal, work.clock
        with clock.stage("decode"):
            self._require()
            image = codecs.decode(work.read(), max_pixels=self.config.max_pixels)
        with clock.stage("upscale"):
            sr = self.upscaler.upscale(image, self.claim)

        def encode(quality: int, factor: float) -> bytes:
            with clock.stage("upscale"):
                resized = resize(sr, *shrunk((goal.height, goal.width), factor))
            with clock.stage("encode"):
                self._require()
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
                work.read(), max_pixels=config.max_pixels, max_frames=config.max_frames
            )
        while (frame := work.clock.next("decode", frames)) is not None:
            with work.clock.stage("upscale"):
                image = frame.image
                size = target_size(image.height, image.width, net_scale=scale, config=config)
                sr = resize(self.upscaler.upscale(image, self.claim), *shrunk(size, factor))
            yield replace(frame, image=sr)

    def _options(self, quality: int) -> EncodeConfig:
        return self.config.encode.model_copy(update={"quality": quality})

    def _require(self) -> None:
        if self.claim is not None:
            self.claim.require()


@dataclass(frozen=True)
class _Work:
    """One file on its way."""

    read: Callable[[], bytes]
    header: ImageHeader
    goal: Goal
    clock: "Clock"


class StageFailed(Exception):
    """An image failed in `stage`, because of `cause`."""

    def __init__(self, stage: str, cause: Exception) -> None:
        super().__init__(stage)
        self.stage, self.cause = stage, cause


class Clock:
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
        except StageFailed:
            raise
        except Exception as error:
            raise StageFailed(name, error) from error
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

    @property
    def total(self) -> float:
        """Seconds since the clock began."""
        return time.perf_counter() - self._began

    def spent(self, name: str) -> float:
        """Seconds in stage `name` so far."""
        return self._seconds[name]

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
