"""Small files that could keep their reader busy for minutes are refused by what they are made of."""

import io
import struct
import zlib

import PIL.Image
import pytest

from kdsr import codecs
from kdsr.codecs.gif import MOST_BETWEEN
from kdsr.codecs.jpeg import MOST_SEGMENTS
from kdsr.codecs.png import MOST_CHUNKS
from kdsr.errors import ImageUnsupported


def saved(kind, mode="RGB"):
    buffer = io.BytesIO()
    PIL.Image.new(mode, (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def png_with(number, name, *, behind=False):
    data = saved("PNG")
    at = data.index(b"IEND") - 4 if behind else 33
    return (
        data[:at] + (struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))) * number + data[at:]
    )


def jpeg_with(stuff):
    data = saved("JPEG")
    return data[:2] + stuff + data[2:]


def gif_with(stuff):
    data = saved("GIF", "P")
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:at] + stuff + data[at:]


COMMENT = b"\xff\xfe\0\2"
GIF_COMMENT = b"\x21\xfe\1a\0"
FLOODS = {
    "chunks": png_with(MOST_CHUNKS, b"aaAa"),
    "texts behind the pixels": png_with(MOST_CHUNKS, b"tEXt", behind=True),
    "segments": jpeg_with(COMMENT * (MOST_SEGMENTS + 1)),
    "segments that look like scans": jpeg_with(b"\xff\xfe\0\4\xff\xda" * 12_000),
    "fill bytes": jpeg_with(b"\xff" * 2**20),
    "fill bytes that lead to nothing": jpeg_with(b"\xff" * 2**20 + b"\0"),
    "restarts": jpeg_with(b"\xff\xd0" * 2**19),
    "stray bytes": jpeg_with(COMMENT + b"\0" * 2**20),
    "GIF comments": gif_with(GIF_COMMENT * MOST_BETWEEN + GIF_COMMENT),
    "GIF zeros": gif_with(b"\0" * 2**20),
}
FINE = {
    "chunks": png_with(1000, b"aaAa"),
    "pixels in many pieces": png_with(100_000, b"IDAT", behind=True),
    "segments": jpeg_with(COMMENT * 1000),
    "some fill bytes": jpeg_with(b"\xff" * 1000),
    "GIF comments": gif_with(GIF_COMMENT * 500),
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_parts_is_refused_by_name(data):
    with pytest.raises(ImageUnsupported, match="save it as a plain one"):
        codecs.probe(data)
    with pytest.raises(ImageUnsupported, match="save it as a plain one"):
        codecs.decode(data, max_pixels=100)


@pytest.mark.parametrize("data", FINE.values(), ids=FINE)
def test_a_file_of_many_parts_is_read(data):
    pixels = codecs.decode(data, max_pixels=100).pixels
    assert pixels.shape[:2] == (8, 8)
    assert not pixels.any()


def test_scans_are_looked_for_in_one_pass_over_fill_bytes():
    """A search that began anew at each of them would not end."""
    many = jpeg_with(b"")[:-2] + b"\xff\xda\0\2" * 300 + b"\xff" * 2**21 + b"\0"
    with pytest.raises(ImageUnsupported, match="scans"):
        codecs.probe(many)
