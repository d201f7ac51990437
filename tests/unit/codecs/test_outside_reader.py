"""What exiftool reads in our files."""

import io
import json
import shutil
import struct
import subprocess

import numpy as np
import PIL.Image
import pytest
from PIL.ExifTags import IFD, Base

from kdsr import codecs
from kdsr.codecs.exif import with_preview
from kdsr.image import Image
from tests.unit.codecs.profiles import ADOBE_RGB, DISPLAY_P3

pytestmark = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")

HEIGHT, WIDTH = 20, 30
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'xmlns:xmp="http://ns.adobe.com/xap/1.0/" tiff:Orientation="6" tiff:ImageWidth="30" '
    b'xmp:CreatorTool="A tool" xmp:Rating="4"/></rdf:RDF></x:xmpmeta>'
)


def canon_note(at):
    """A MakerNote of Canon for a place `at` bytes into the EXIF: its offsets count from the EXIF's begin."""
    texts = {0x0006: b"IMG:EOS kdsr JPEG\0", 0x0007: b"Firmware 1.0\0", 0x0009: b"Somebody\0"}
    directory, content = struct.pack("<H", len(texts)), b""
    begin = at + 2 + 12 * len(texts) + 4
    for tag, text in texts.items():
        directory += struct.pack("<HHII", tag, 2, len(text), begin + len(content))
        content += text
    return directory + bytes(4) + content


def camera_exif():
    """Canon's EXIF for a camera held on its side, with a MakerNote and a preview."""

    def written(note):
        exif = PIL.Image.Exif()
        exif.endian = "<"
        exif[Base.Orientation], exif[Base.Make], exif[Base.Model] = 6, "Canon", "Canon EOS kdsr"
        inner = exif.get_ifd(IFD.Exif)
        inner[Base.ExifImageWidth], inner[Base.ExifImageHeight] = WIDTH, HEIGHT
        inner[Base.ISOSpeedRatings], inner[Base.MakerNote] = 200, note
        gps = exif.get_ifd(IFD.GPSInfo)
        gps[1], gps[2] = "N", (48.0, 8.0, 14.5)
        return exif.tobytes()

    empty = canon_note(0)
    at = written(empty).index(empty) - len(b"Exif\0\0")
    small = io.BytesIO()
    PIL.Image.new("RGB", (16, 16)).save(small, "JPEG")
    return with_preview(written(canon_note(at)), small.getvalue())


def exiftool(data, kind, tmp_path):
    """Values by tag, those that come first in the file; the preview has a resolution of its own."""
    path = tmp_path / f"a{codecs.suffix(kind)}"
    path.write_bytes(data)
    command = ["exiftool", "-json", "-n", "-G1", "-all", str(path)]
    answer = subprocess.run(command, capture_output=True, check=True, timeout=60)
    (found,) = json.loads(answer.stdout)
    by_tag = {}
    for name, value in found.items():
        by_tag.setdefault(name.rpartition(":")[2], value)
    return by_tag


@pytest.fixture(params=[ADOBE_RGB, DISPLAY_P3], ids=["adobe-rgb", "display-p3"])
def photo(request):
    """As decoded from a camera's JPEG, and then made twice as large."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(
        file, "JPEG", exif=camera_exif(), xmp=XMP, dpi=(240, 120), icc_profile=request.param
    )
    found = codecs.decode(file.getvalue(), max_pixels=10**6)
    twice = found.pixels.repeat(2, axis=0).repeat(2, axis=1)
    return Image(twice, icc_profile=found.icc_profile, exif=found.exif, xmp=found.xmp, dpi=found.dpi)


@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_exiftool_reads_what_is_true_of_the_new_picture(photo, kind, deep, tmp_path):
    found = exiftool(codecs.encode(photo.sixteen_bit() if deep else photo, format=kind), kind, tmp_path)

    assert (found["ImageWidth"], found["ImageHeight"]) == (2 * HEIGHT, 2 * WIDTH)
    assert (found["ExifImageWidth"], found["ExifImageHeight"]) == (2 * HEIGHT, 2 * WIDTH)
    assert found.get("Orientation", 1) == 1
    name = "Adobe RGB (1998)" if photo.icc_profile == ADOBE_RGB else "Display P3"
    assert found["ProfileDescription"] == name
    assert (found["Make"], found["Model"], found["ISO"]) == ("Canon", "Canon EOS kdsr", 200)
    assert found["GPSLatitude"] == pytest.approx(48 + 8 / 60 + 14.5 / 3600)
    assert (found["CreatorTool"], found["Rating"]) == ("A tool", 4)
    assert not {"Warning", "Error"} & found.keys(), found.get("Warning") or found.get("Error")
    if kind in ("jpeg", "tiff"):
        assert (found["XResolution"], found["YResolution"]) == pytest.approx((120, 240), abs=0.02)
    if kind == "png":
        dots = found["PixelsPerUnitX"] * 0.0254, found["PixelsPerUnitY"] * 0.0254
        assert dots == pytest.approx((120, 240), abs=0.02)
    if kind == "tiff":
        assert "CanonImageType" not in found, "in a TIFF it would count from another begin"
    else:
        assert (found["CanonImageType"], found["OwnerName"]) == ("IMG:EOS kdsr JPEG", "Somebody")
        assert found["ThumbnailLength"] > 100
