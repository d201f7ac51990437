"""Pages of a TIFF: the chain of directories, classic and BigTIFF, read and joined. Knows no pixels.

TIFF 6.0, 1992, and the BigTIFF design of 2007.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kdsr.errors import ImageCorrupt, ImageTooLarge

_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS = 254, 256, 257, 258
_FEW = (_SUBFILE_TYPE, _WIDTH, _HEIGHT)
_SHORT = 3
_NOT_A_PAGE = 1 | 4  # a smaller copy of another page, or its mask
_MOST_ENTRIES = 4096  # in one directory, as libtiff has it
_BYTES_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES_OF_TYPE |= {16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_DATA_TAGS = {273: 279, 324: 325}
"""Where strips or tiles lie, and how long they are."""
_DIRECTORY_TAGS = {330, 34665, 34853, 40965}
"""Further directories: sub-images, EXIF, GPS, interoperability."""
_LARGEST_CLASSIC = 2**32 - 2**16


@dataclass(frozen=True)
class Layout:
    """Byte order, and how wide offsets are."""

    order: str
    """As struct has it: < or >."""
    is_big: bool

    @property
    def head_bytes(self) -> int:
        """Up to the offset of the first directory."""
        return 8 if self.is_big else 4

    @property
    def offset(self) -> str:
        """Letters for struct, of an offset."""
        return self.order + ("Q" if self.is_big else "I")

    @property
    def count(self) -> str:
        """Letters for struct, of a directory's length."""
        return self.order + ("Q" if self.is_big else "H")

    @property
    def entry(self) -> struct.Struct:
        """Tag, type, count, and value or offset."""
        return struct.Struct(self.order + ("HHQ8s" if self.is_big else "HHI4s"))


@dataclass(frozen=True)
class Page:
    """One picture of the file."""

    offset: int
    """Of its directory."""
    height: int
    """Rows as stored; 0 where the directory does not tell."""
    width: int
    bits: int
    """Of a sample when it is decoded: 8, 16, or 32, at most."""


@dataclass(frozen=True)
class Entry:
    """One field of a directory."""

    tag: int
    kind: int
    count: int
    value: bytes
    """In the byte order of the file, wherever it was stored."""


def layout_of(data: bytes) -> Layout:
    """From the first four bytes, which `identify` knows already."""
    return Layout("<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+"))


def scan_pages(data: bytes, *, at_most: int) -> list[Page]:
    """The pages in order, without smaller copies and masks; the first directory is always one.

    Stops above `at_most` pages. Raises ImageCorrupt for a chain that is broken or runs in a circle.
    """
    layout = layout_of(data)
    pages: list[Page] = []
    seen: set[int] = set()
    at = _number(data, layout.head_bytes, layout.offset)
    while at and len(pages) <= at_most:
        if at in seen:
            raise ImageCorrupt(f"endless: the directory at byte {at} follows itself")
        if len(seen) > 2 * at_most + 16:
            raise ImageTooLarge(f"the file has more than {len(seen)} directories; at most {at_most} are read")
        seen.add(at)
        fields, at_next = _few_fields(data, layout, at)
        if not pages or not fields.get(_SUBFILE_TYPE, 0) & _NOT_A_PAGE:
            bits = next((bits for bits in (8, 16) if fields.get(_BITS, 1) <= bits), 32)
            pages.append(Page(at, fields.get(_HEIGHT, 0), fields.get(_WIDTH, 0), bits))
        at = at_next
    if not pages:
        raise ImageCorrupt("the TIFF has no page")
    return pages


def _number(data: bytes, at: int, letters: str) -> int:
    if at + struct.calcsize(letters) > len(data):
        raise ImageCorrupt(f"cut off: a TIFF directory is expected at byte {at} of {len(data)}")
    (number,) = struct.unpack_from(letters, data, at)
    return int(number)


def _entry_bounds(data: bytes, layout: Layout, at: int) -> tuple[int, int]:
    """First byte of the directory's entries, and how many there are."""
    count = _number(data, at, layout.count)
    if count > _MOST_ENTRIES:
        raise ImageCorrupt(f"the TIFF directory at byte {at} announces {count} entries")
    begin = at + struct.calcsize(layout.count)
    if begin + count * layout.entry.size > len(data):
        raise ImageCorrupt(f"cut off: the TIFF directory at byte {at} is longer than the file")
    return begin, count


def _few_fields(data: bytes, layout: Layout, at: int) -> tuple[dict[int, int], int]:
    """The numbers that `scan_pages` needs, and the offset of the next directory. Fields are sorted by tag."""
    begin, count = _entry_bounds(data, layout, at)
    fields: dict[int, int] = {}
    for index in range(count):
        tag, kind, number, value = layout.entry.unpack_from(data, begin + index * layout.entry.size)
        if tag in _FEW and kind in _NUMBERS:
            letters = layout.order + _NUMBERS[kind]
            if struct.calcsize(letters) <= len(value):
                (fields[tag],) = struct.unpack_from(letters, value)
        if tag == _BITS:
            fields[tag] = _bits_of(data, layout, kind, number, value)
        if tag > _BITS:
            break
    return fields, _number(data, begin + count * layout.entry.size, layout.offset)


def _bits_of(data: bytes, layout: Layout, kind: int, number: int, value: bytes) -> int:
    """Of the first sample, as all others; many where it is not told as the format wants it."""
    if kind != _SHORT:
        return 32
    if 2 * number <= len(value):
        return _number(value, 0, layout.order + "H")
    place = _number(value, 0, layout.offset)
    return _number(data, place, layout.order + "H") if place + 2 <= len(data) else 32


def starting_at(data: bytes, page: Page) -> bytes:
    """The file with `page` as its first one. A page is decoded on its own this way."""
    layout = layout_of(data)
    head = layout.head_bytes
    offset = struct.pack(layout.offset, page.offset)
    return (
        data
        if data[head : head + len(offset)] == offset
        else data[:head] + offset + data[head + len(offset) :]
    )


# ---------------------------------------------------------------- joining


def join_pages(files: Sequence[bytes]) -> bytes:
    """One TIFF of the pages of several little-endian ones; BigTIFF when 4 GB do not hold it."""
    size = sum(len(file) for file in files) + 2**16
    return Joiner(Layout("<", is_big=size > _LARGEST_CLASSIC)).join(files)


class Joiner:
    """Writes pages behind each other, their offsets changed."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._file = bytearray(b"II+\0\x08\0\0\0" if layout.is_big else b"II*\0")
        self._link = len(self._file)
        self._file += struct.pack(layout.offset, 0)

    def join(self, files: Sequence[bytes]) -> bytes:
        """The pages of all `files`, in order."""
        for file in files:
            for page in scan_pages(file, at_most=2**16):
                offset, link = self._directory(file, page.offset, is_page=True)
                struct.pack_into(self._layout.offset, self._file, self._link, offset)
                self._link = link
        return bytes(self._file)

    def _directory(self, file: bytes, at: int, *, is_page: bool) -> tuple[int, int]:
        """Copy one with all that belongs to it; its offset, and where the offset of the next one stands."""
        source = layout_of(file)
        entries = [self._moved(file, source, entry) for entry in _entries(file, source, at)]
        if is_page:
            entries = self._with_data(file, source, entries)
        packed = b"".join(self._packed(entry) for entry in entries)
        offset = self._append(struct.pack(self._layout.count, len(entries)) + packed)
        link = len(self._file)
        self._file += struct.pack(self._layout.offset, 0)
        return offset, link

    def _append(self, content: bytes) -> int:
        """Where it was put: on a word, as the format wants it."""
        self._file += bytes(len(self._file) % 2)
        self._file += content
        return len(self._file) - len(content)

    def _offsets(self, tag: int, values: list[int]) -> Entry:
        letter = "Q" if self._layout.is_big else "I"
        return Entry(
            tag,
            16 if self._layout.is_big else 4,
            len(values),
            struct.pack(f"<{len(values)}{letter}", *values),
        )

    def _moved(self, file: bytes, source: Layout, entry: Entry) -> Entry:
        """The entry itself, or one that points to a copied directory."""
        if entry.tag not in _DIRECTORY_TAGS:
            return entry
        copies = [self._directory(file, at, is_page=False)[0] for at in _numbers(source, entry)]
        return self._offsets(entry.tag, copies)

    def _with_data(self, file: bytes, source: Layout, entries: list[Entry]) -> list[Entry]:
        """Strips or tiles are copied, and their offsets changed."""
        lengths = {
            entry.tag: _numbers(source, entry) for entry in entries if entry.tag in _DATA_TAGS.values()
        }
        return [self._with_offsets(file, source, entry, lengths) for entry in entries]

    def _with_offsets(
        self, file: bytes, source: Layout, entry: Entry, lengths: dict[int, list[int]]
    ) -> Entry:
        if entry.tag not in _DATA_TAGS:
            return entry
        places = zip(_numbers(source, entry), lengths[_DATA_TAGS[entry.tag]], strict=True)
        return self._offsets(entry.tag, [self._append(file[at : at + length]) for at, length in places])

    def _packed(self, entry: Entry) -> bytes:
        width = 8 if self._layout.is_big else 4
        value = entry.value
        if len(value) > width:
            value = struct.pack(self._layout.offset, self._append(value))
        return self._layout.entry.pack(entry.tag, entry.kind, entry.count, value.ljust(width, b"\0"))


def _entries(data: bytes, layout: Layout, at: int) -> list[Entry]:
    begin, count = _entry_bounds(data, layout, at)
    entries = []
    for index in range(count):
        tag, kind, number, value = layout.entry.unpack_from(data, begin + index * layout.entry.size)
        length = number * _BYTES_OF_TYPE[kind]
        if length > len(value):
            (place,) = struct.unpack(layout.offset, value)
            value = data[place : place + length]
        entries.append(Entry(tag, kind, number, value[:length]))
    return entries


def _numbers(layout: Layout, entry: Entry) -> list[int]:
    return list(struct.unpack(f"{layout.order}{entry.count}{_NUMBERS[entry.kind]}", entry.value))
