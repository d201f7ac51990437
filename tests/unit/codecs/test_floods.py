"""Small files that could keep their reader busy for minutes are refused by what they are made of."""

import io
import zlib

import PIL.Image
import pytest

from kdsr import codecs
from kdsr.codecs.gif import MOST_BETWEEN
from kdsr.codecs.jpeg import MOST_EXIF, MOST_SEGMENTS, MOST_STRAY
from kdsr.codecs.metadata import sized_xmp
from kdsr.codecs.png import MOST_CHUNKS, MOST_PROFILES, chunk
from kdsr.errors import ImageUnsupported


def saved(kind, mode="RGB"):
    buffer = io.BytesIO()
    PIL.Image.new(mode, (8, 8)).save(buffer, kind)
    return buffer.getvalue()


def png_with(number, name, *, behind=False):
    data = saved("PNG")
    at = data.index(b"IEND") - 4 if behind else 33
    return data[:at] + chunk(name, b"") * number + data[at:]


def jpeg_with(stuff):
    data = saved("JPEG")
    return data[:2] + stuff + data[2:]


def gif_with(stuff):
    data = saved("GIF", "P")
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    return data[:at] + stuff + data[at:]


def profile(number):
    data = saved("PNG")
    return data[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(128))) * number + data[33:]


COMMENT = b"\xff\xfe\0\2"
EXIF = b"\xff\xe1\0\x08Exif\0\0"
GIF_COMMENT = b"\x21\xfe\1a\0"
FLOODS = {
    "chunks": png_with(MOST_CHUNKS, b"aaAa"),
    "texts behind the pixels": png_with(MOST_CHUNKS, b"tEXt", behind=True),
    "empty pixels": png_with(MOST_CHUNKS, b"IDAT", behind=True),
    "profiles": profile(MOST_PROFILES + 1),
    "segments": jpeg_with(COMMENT * (MOST_SEGMENTS + 1)),
    "segments that look like scans": jpeg_with(b"\xff\xfe\0\4\xff\xda" * 12_000),
    "segments behind what is no end": jpeg_with(b"\xff\xd8\xff\xd9" + COMMENT * (MOST_SEGMENTS + 1)),
    "EXIF": jpeg_with(EXIF * (MOST_EXIF + 1)),
    "begins": jpeg_with(b"\xff\xd8" * MOST_STRAY),
    "extensions": jpeg_with((b"\xff\xf0\xff\xff" + b"\xff\xd0" * 32_767) * 4),
    "fill bytes": jpeg_with(b"\xff" * 2**20),
    "fill bytes that lead to nothing": jpeg_with(b"\xff" * 2**20 + b"\0"),
    "restarts": jpeg_with(b"\xff\xd0" * 2**19),
    "stray bytes": jpeg_with(COMMENT + b"\0" * 2**20),
    "GIF comments": gif_with(GIF_COMMENT * (MOST_BETWEEN + 1)),
    "GIF zeros and comments": gif_with((b"\0" * 9 + GIF_COMMENT) * MOST_BETWEEN),
}
FINE = {
    "chunks": png_with(1000, b"aaAa"),
    "an empty piece of pixels": png_with(1, b"IDAT", behind=True),
    "zeros behind a PNG": saved("PNG") + b"\0" * 2**20,
    "a profile": profile(1),
    "segments": jpeg_with(COMMENT * 1000),
    "EXIF of some pieces": jpeg_with(EXIF * 10),
    "aligned segments": jpeg_with(COMMENT + b"\0" * 2**14),
    "some fill bytes": jpeg_with(b"\xff" * 1000),
    "GIF comments": gif_with(GIF_COMMENT * 500),
    "GIF zeros": gif_with(b"\0" * 2**20),
    "GIF zeros without a trailer": saved("GIF", "P")[:-1] + b"\0" * 2**20,
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
    """A search that began anew at each of them took 16 seconds for these, and would not end for more."""
    scan, data = b"\xff\xda\0\2", saved("JPEG")
    many = data[:-2] + scan * 150 + b"\xff" * 2**20 + b"\0" + b"\xff\xda" * 100
    assert codecs.probe(many).width == 8


def test_thumbnails_without_an_end_are_looked_for_once():
    """Looked for from each begin anew, an end that is not there took minutes."""
    packet = b"<xmp:Thumbnails>" * 2**16
    assert sized_xmp(packet, height=1, width=1) == packet


def test_thumbnails_go_and_what_is_around_them_stays():
    packet = (
        b"<a/><xmp:Thumbnails>1</xmp:Thumbnails><b/><xap:Thumbnails>2</xap:Thumbnails><c/><xmp:Thumbnails>"
    )
    assert sized_xmp(packet, height=1, width=1) == b"<a/><b/><c/><xmp:Thumbnails>"
