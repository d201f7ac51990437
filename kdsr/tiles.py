"""Rectangles of an image, and how it is cut into tiles. Knows sizes only: no pixels, no models, no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from kdsr.errors import RequestError


@dataclass(frozen=True)
class Box:
    """A rectangle of pixels; `bottom` and `right` lie just outside."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """What cuts the box out of an array (H, W, ...)."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def shifted(self, rows: int, columns: int) -> "Box":
        """The box so many rows down and columns to the right."""
        return Box(self.top + rows, self.left + columns, self.bottom + rows, self.right + columns)

    def scaled(self, scale: int) -> "Box":
        """The same place in an image `scale` times as large."""
        return Box(self.top * scale, self.left * scale, self.bottom * scale, self.right * scale)

    def within(self, outer: "Box") -> "Box":
        """The same place, counted from `outer`'s corner."""
        return Box(
            self.top - outer.top, self.left - outer.left, self.bottom - outer.top, self.right - outer.left
        )

    def clipped(self, height: int, width: int) -> "Box":
        """What of it lies in an image of this size; may be empty."""
        top, left = min(self.top, height), min(self.left, width)
        return Box(top, left, max(top, min(self.bottom, height)), max(left, min(self.right, width)))


@dataclass(frozen=True)
class Tile:
    """One inference crop: `read` goes through the network, `core` of it is kept, the rest is halo."""

    read: Box
    core: Box


def plan(height: int, width: int, *, tile_size: int, halo: int, multiple_of: int = 1) -> list[Tile]:
    """Tiles whose cores cover a `height` x `width` image once; all sizes in pixels of that image.

    Cores are at most `tile_size` high and wide, and as equal as they can be. A read box is its core and
    `halo` pixels around it, clamped to the image, so that a network meets its own padding at real borders
    only. Read boxes begin at multiples of `multiple_of` and end at one or at the image's border.
    Raises RequestError for sizes that no image can have.
    """
    if min(height, width, tile_size, multiple_of) < 1 or halo < 0:
        raise RequestError(
            f"cannot cut {height} x {width} pixels into tiles of {tile_size} with a halo of {halo} and sizes "
            f"in multiples of {multiple_of}; all but the halo must be at least 1, and the halo at least 0"
        )
    rows = list(_intervals(height, tile_size, halo, multiple_of))
    columns = list(_intervals(width, tile_size, halo, multiple_of))
    return [
        Tile(
            read=Box(row.read_begin, column.read_begin, row.read_end, column.read_end),
            core=Box(row.begin, column.begin, row.end, column.end),
        )
        for row in rows
        for column in columns
    ]


def split(tile: Tile, *, tile_size: int, halo: int, multiple_of: int = 1) -> list[Tile]:
    """Tiles whose cores, at most `tile_size` high and wide, cover the core of `tile` once.

    They read nothing that it does not read; `halo` and `multiple_of` are those that it was planned with.
    """
    outer, core = tile.read, tile.core
    pieces = plan(core.height, core.width, tile_size=tile_size, halo=0)
    return [_part(piece.core.shifted(core.top, core.left), outer, halo, multiple_of) for piece in pieces]


def _part(core: Box, outer: Box, halo: int, multiple_of: int) -> Tile:
    """The tile around `core` that reads its halo as far as `outer` has it."""
    top = max(core.top - halo, outer.top) // multiple_of * multiple_of
    left = max(core.left - halo, outer.left) // multiple_of * multiple_of
    bottom = -(-(core.bottom + halo) // multiple_of) * multiple_of
    right = -(-(core.right + halo) // multiple_of) * multiple_of
    return Tile(read=Box(top, left, min(bottom, outer.bottom), min(right, outer.right)), core=core)


@dataclass(frozen=True)
class _Interval:
    """One side of a tile."""

    begin: int
    end: int
    read_begin: int
    read_end: int


def _intervals(length: int, tile_size: int, halo: int, multiple_of: int) -> Iterator[_Interval]:
    """Equal pieces of one side, the last one possibly shorter, so that most tiles share a shape."""
    piece = -(-length // -(-length // tile_size))
    for begin in range(0, length, piece):
        end = min(begin + piece, length)
        read_begin = max(begin - halo, 0) // multiple_of * multiple_of
        read_end = -(-(end + halo) // multiple_of) * multiple_of
        yield _Interval(begin, end, read_begin, min(read_end, length))
