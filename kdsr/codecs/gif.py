"""Animated GIF, block by block: its structure is read and written here, Pillow codes and decodes the indices.

GIF89a, 1990, and the NETSCAPE2.0 block. A frame that is to be disposed of leaves transparency behind, as
browsers have it, not the background colour.
"""

import io
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import PIL.Image
from PIL.GifImagePlugin import GifImageFile

from kdsr.codecs.canvas import Canvas, changed_box, cropped
from kdsr.codecs.colour import to_srgb
from kdsr.errors import ImageCorrupt, ImageUnsupported
from kdsr.image import Frame, Image
from kdsr.tiles import Box

_EXTENSION, _DESCRIPTOR, _TRAILER = 0x21, 0x2C, 0x3B
_CONTROL, _APPLICATION = 0xF9, 0xFF
_LOOP_BLOCKS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")
_KEEP, _CLEAR, _RESTORE = 1, 2, 3
_LONGEST = 65535  # centiseconds in one frame
_IDENTITY = bytes(level for level in range(256) for _ in range(3))
_OPAQUE_FROM = 128  # alpha
_ZEROS = re.compile(rb"\0*")
MOST_BETWEEN = 1000
"""Blocks of no picture: each is looked at, and a file could have millions of empty ones."""
_SAMPLE = 8192  # pixels that a palette is fitted to


@dataclass(frozen=True)
class GifFrame:
    """One frame as it lies in the file."""

    box: Box
    interlaced: bool
    table: bytes
    """Its colours, three bytes each; may be shorter than the indices reach."""
    codes: slice
    """Of the file: the code size and the blocks behind it, the empty last one too."""
    centiseconds: int = 0
    disposal: int = 0
    transparent: int | None = None
    """The index that leaves what is below."""


@dataclass(frozen=True)
class _Control:
    centiseconds: int = 0
    disposal: int = 0
    transparent: int | None = None


class GifScanner:
    """Walks over the blocks, each once, in the order of the file. No pixel is decoded."""

    def __init__(self, data: bytes) -> None:
        self.plays = 1
        """How often the animation is shown, 0 is for ever; known when the first frame is."""
        self._data = data
        self._at = 0
        header = self._take(13)
        self.width, self.height, flags = struct.unpack("<HHB", header[6:11])
        self._table = self._take(_table_bytes(flags))

    def frames(self) -> Iterator[GifFrame]:
        """All frames. Raises ImageCorrupt behind the last good one when the end of the file is missing.

        Many files end behind a frame without a trailer, and browsers show them.
        """
        control, drawn, between = _Control(), 0, 0
        while True:
            if drawn and control == _Control() and self._at == len(self._data):
                return
            introducer = self._take(1)[0]
            if introducer == _TRAILER:
                return
            if introducer == _EXTENSION:
                control = self._extension(control)
            elif introducer == _DESCRIPTOR:
                yield self._frame(control)
                control, drawn, between = _Control(), drawn + 1, 0
            elif introducer == 0:
                self._skip_zeros()
            else:
                raise ImageCorrupt(f"broken GIF: unknown block {introducer:#x} at byte {self._at - 1}")
            between += 1
            if between > MOST_BETWEEN:
                raise ImageUnsupported(
                    f"GIF with more than {MOST_BETWEEN} blocks between two frames is not read; "
                    f"save it as a plain one"
                )

    def _take(self, length: int) -> bytes:
        taken = self._data[self._at : self._at + length]
        if len(taken) < length:
            raise ImageCorrupt(
                f"cut off: expected {length} bytes more at byte {self._at}, found {len(taken)}"
            )
        self._at += length
        return taken

    def _skip_blocks(self) -> None:
        """Beyond the next empty block."""
        data, at = self._data, self._at
        try:
            while length := data[at]:
                at += length + 1
        except IndexError:
            raise ImageCorrupt(f"cut off: the blocks from byte {self._at} on do not end") from None
        self._at = at + 1

    def _skip_zeros(self) -> None:
        found = _ZEROS.match(self._data, self._at)
        assert found is not None
        self._at = found.end()

    def _extension(self, control: _Control) -> _Control:
        label = self._take(1)[0]
        begin = self._at
        self._skip_blocks()
        block = self._data[begin + 1 : begin + 1 + self._data[begin]]
        if label == _CONTROL and len(block) >= 4:
            flags, centiseconds, index = struct.unpack("<BHB", block[:4])
            return _Control(centiseconds, flags >> 2 & 7, index if flags & 1 else None)
        if label == _APPLICATION and block[:11] in _LOOP_BLOCKS:
            self._read_loop(self._data[begin + 12 : self._at])
        return control

    def _read_loop(self, blocks: bytes) -> None:
        """The file counts repetitions after the first time."""
        if len(blocks) >= 4 and blocks[0] >= 3 and blocks[1] & 7 == 1:
            (repetitions,) = struct.unpack("<H", blocks[2:4])
            self.plays = repetitions + 1 if repetitions else 0

    def _frame(self, control: _Control) -> GifFrame:
        left, top, width, height, flags = struct.unpack("<HHHHB", self._take(9))
        table = self._take(_table_bytes(flags)) or self._table
        begin = self._at
        self._take(1)
        self._skip_blocks()
        return GifFrame(
            Box(top, left, top + height, left + width),
            bool(flags & 0x40),
            table,
            slice(begin, self._at),
            control.centiseconds,
            control.disposal,
            control.transparent,
        )


def _table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


# ---------------------------------------------------------------- reading


def canvas_size(data: bytes) -> tuple[int, int]:
    """(height, width): the announced one, larger when the first frame needs it. Raises ImageCorrupt."""
    scanner = GifScanner(data)
    first = next(scanner.frames(), None)
    if first is None:
        raise ImageCorrupt("the GIF has no frame")
    height, width = max(scanner.height, first.box.bottom), max(scanner.width, first.box.right)
    if not height or not width:
        raise ImageCorrupt(f"the header announces {width} x {height} pixels")
    return height, width


def decode_gif(data: bytes) -> Iterator[Frame]:
    """Each frame as it is seen; grey when all colours are."""
    height, width = canvas_size(data)
    frames = list(GifScanner(data).frames())
    grey = all(_is_grey(frame.table) for frame in frames)
    with_alpha = _may_show_nothing(frames, height, width)
    canvas = Canvas(height, width, channels=1 if grey else 3, dtype=np.dtype(np.uint8))
    for frame in frames:
        box = frame.box.clipped(height, width)
        below = canvas.cut(box) if frame.disposal == _RESTORE else None
        canvas.lay_over(box, _planes(data, frame, grey=grey)[: box.height, : box.width])
        yield Frame(canvas.picture(with_alpha=with_alpha), frame.centiseconds / 100)
        if below is not None:
            canvas.replace(box, below)
        elif frame.disposal == _CLEAR:
            canvas.clear(box)


def _is_grey(table: bytes) -> bool:
    return table[0::3] == table[1::3] == table[2::3]


def _may_show_nothing(frames: list[GifFrame], height: int, width: int) -> bool:
    """Whether some pixel may be transparent at some time; the same for all frames, so that they match."""
    first = frames[0]
    covers = first.box.clipped(height, width) == Box(0, 0, height, width) and first.transparent is None
    return not covers or first.disposal == _RESTORE or any(frame.disposal == _CLEAR for frame in frames)


def _planes(data: bytes, frame: GifFrame, *, grey: bool) -> np.ndarray:
    """(h, w, 2 or 4) uint8 of one frame, alpha 0 or 255."""
    table = np.zeros((256, 4), dtype=np.uint8)
    colours = np.frombuffer(frame.table, dtype=np.uint8).reshape(-1, 3)
    table[: len(colours), :3] = colours
    table[:, 3] = 255
    if frame.transparent is not None:
        table[frame.transparent, 3] = 0
    planes: np.ndarray = table[_indices(data, frame)]
    return planes[:, :, 2:] if grey else planes


def _indices(data: bytes, frame: GifFrame) -> np.ndarray:
    """(h, w) uint8. The frame becomes a file of its own, whose colours are its indices."""
    height, width = frame.box.height, frame.box.width
    if not height or not width:
        return np.zeros((height, width), dtype=np.uint8)
    descriptor = struct.pack("<BHHHHB", _DESCRIPTOR, 0, 0, width, height, 0x40 if frame.interlaced else 0)
    file = struct.pack("<6sHHBBB", b"GIF89a", width, height, 0xF7, 0, 0) + _IDENTITY + descriptor
    picture = GifImageFile(io.BytesIO(file + data[frame.codes] + b";"))
    picture.load()
    return np.asarray(picture)


# ---------------------------------------------------------------- writing


def encode_gif(frames: Iterable[Frame], *, plays: int) -> bytes:
    """8 bits, sRGB, at most 256 colours a frame, alpha on or off; only what changes is stored.

    Two frames are held at a time. Times are in centiseconds, and rounding does not add up.
    """
    writer: _GifWriter | None = None
    pending: Frame | None = None
    for frame in frames:
        image = to_srgb(frame.image)
        if writer is None:
            writer = _GifWriter(image.height, image.width, plays=plays)
        if pending is not None:
            writer.write(pending, image)
        pending = Frame(image, frame.seconds)
    assert writer is not None and pending is not None, "the caller hands over at least one frame"
    writer.write(pending, None)
    return writer.finished()


class _GifWriter:
    def __init__(self, height: int, width: int, *, plays: int) -> None:
        self._height, self._width = height, width
        self._file = bytearray(struct.pack("<6sHHBBB", b"GIF89a", width, height, 0x70, 0, 0))
        if plays != 1:
            repetitions = min(plays - 1, 65535) if plays else 0
            loop = struct.pack("<BBH", 3, 1, repetitions)
            self._file += bytes([_EXTENSION, _APPLICATION, 11]) + _LOOP_BLOCKS[0] + loop + b"\0"
        self._shown: Image | None = None
        self._seconds = 0.0
        self._centiseconds = 0

    def write(self, frame: Frame, following: Image | None) -> None:
        """`following` tells whether this frame has to go away before the next one."""
        clears = following is not None and bool((_opaque(frame.image) & ~_opaque(following)).any())
        before = self._shown
        everything = Box(0, 0, self._height, self._width)
        box = everything if before is None or clears else changed_box(before, frame.image)
        visible = _opaque(frame.image)[box.slices]
        if before is not None:
            visible = visible & _differs(before, frame.image, box)
        coded = _coded(cropped(frame.image, box).pixels, visible)
        for centiseconds in self._times(frame.seconds):
            self._append(box, coded, centiseconds, _CLEAR if clears else _KEEP)
        self._shown = None if clears else frame.image

    def _times(self, seconds: float) -> list[int]:
        """One time, or several for a frame that is shown longer than one can be."""
        self._seconds += seconds
        left = round(self._seconds * 100) - self._centiseconds
        self._centiseconds += left
        return [_LONGEST] * ((left - 1) // _LONGEST) + [(left - 1) % _LONGEST + 1] if left > 0 else [0]

    def _append(self, box: Box, coded: "_Coded", centiseconds: int, disposal: int) -> None:
        flags = disposal << 2 | (coded.transparent is not None)
        index = coded.transparent or 0
        table_flags = 0x80 | (len(coded.table) // 3).bit_length() - 2
        self._file += struct.pack("<BBBBHBB", _EXTENSION, _CONTROL, 4, flags, centiseconds, index, 0)
        self._file += struct.pack(
            "<BHHHHB", _DESCRIPTOR, box.left, box.top, box.width, box.height, table_flags
        )
        self._file += coded.table + coded.blocks

    def finished(self) -> bytes:
        """The file."""
        return bytes(self._file) + bytes([_TRAILER])


@dataclass(frozen=True)
class _Coded:
    """Pixels in few colours, as they lie in a file."""

    table: bytes
    """Three bytes a colour, a power of two of them."""
    blocks: bytes
    transparent: int | None


def _opaque(image: Image) -> np.ndarray:
    """(H, W) bool: what a format with no half tones of transparency shows."""
    if image.alpha is None:
        return np.ones(image.pixels.shape[:2], dtype=bool)
    return image.alpha >= _OPAQUE_FROM


def _differs(before: Image, after: Image, box: Box) -> np.ndarray:
    """(h, w) bool: where `box` has to be drawn again, though `before` is still seen."""
    same = (before.pixels[box.slices] == after.pixels[box.slices]).all(axis=2)
    return ~(same & _opaque(before)[box.slices])


def _coded(pixels: np.ndarray, visible: np.ndarray) -> _Coded:
    """(h, w, 1 or 3) uint8 in their own palette, one index of it for what is not `visible` (h, w)."""
    holes = not visible.all()
    if holes:
        drawn = pixels[visible]
        fill = drawn[0] if len(drawn) else np.zeros(pixels.shape[2], dtype=np.uint8)
        pixels = np.where(visible[:, :, None], pixels, fill)
    if holes and pixels.shape[2] == 1:
        pixels = np.minimum(pixels, 254)  # one of 256 greys has to go
    palette, indices = _quantized(np.repeat(pixels, 3 // pixels.shape[2], axis=2), 255 if holes else 256)
    transparent = len(palette) if holes else None
    if transparent is not None:
        indices = np.where(visible, indices, np.uint8(transparent))
    picture = PIL.Image.fromarray(indices)
    picture.putpalette(palette.tobytes() + bytes(3 * (256 - len(palette))))
    file = io.BytesIO()
    picture.save(file, "GIF", optimize=False, interlace=0)
    frame = next(GifScanner(file.getvalue()).frames())
    return _Coded(frame.table, file.getvalue()[frame.codes], transparent)


def _quantized(pixels: np.ndarray, num_colours: int) -> tuple[np.ndarray, np.ndarray]:
    """Palette (n, 3) and indices (h, w), uint8: exact for few colours, else the best ones and dithered."""
    picture = PIL.Image.fromarray(pixels)
    if picture.getcolors(num_colours) is not None:
        packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
        colours, places = np.unique(packed, return_inverse=True)
        palette = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)
        return palette.astype(np.uint8), places.reshape(pixels.shape[:2]).astype(np.uint8)
    chosen = picture.quantize(num_colours, PIL.Image.Quantize.FASTOCTREE)
    palette = np.array(chosen.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)[:num_colours]
    palette = _refined(palette, pixels)
    chosen = PIL.Image.new("P", (1, 1))
    chosen.putpalette(palette.tobytes())
    dithered = picture.quantize(palette=chosen, dither=PIL.Image.Dither.FLOYDSTEINBERG)
    return palette, np.asarray(dithered)


def _refined(palette: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Each colour (n, 3) moved to the middle of those that it stands for, in a sample of `pixels`."""
    flat = pixels.reshape(-1, 3)
    sample = flat[:: max(1, len(flat) // _SAMPLE)].astype(np.float32)
    centres = palette.astype(np.float32)
    for _ in range(3):
        nearest = ((centres**2).sum(axis=1) - 2 * sample @ centres.T).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(centres))
        for channel in range(3):
            sums = np.bincount(nearest, weights=sample[:, channel], minlength=len(centres))
            centres[:, channel] = np.where(counts > 0, sums / np.maximum(counts, 1), centres[:, channel])
    refined: np.ndarray = centres.round().astype(np.uint8)
    return refined
