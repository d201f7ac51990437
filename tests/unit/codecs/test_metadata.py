import io
import json
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from PIL.ExifTags import IFD, Base

from kdsr import codecs
from kdsr.codecs import metadata
from kdsr.config import EncodeConfig
from kdsr.image import Image

PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'xmlns:dc="http://purl.org/dc/elements/1.1/" tiff:Orientation="6" '
    b'tiff:ImageWidth="30" dc:format="kept"/></rdf:RDF></x:xmpmeta>'
)


@pytest.fixture
def photo():
    """What a camera held on its side writes: 30 x 20 pixels to be turned, twice as large since."""
    exif = PIL.Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = 6, "Acme"
    inner = exif.get_ifd(IFD.Exif)
    inner[Base.ExifImageWidth], inner[Base.ExifImageHeight], inner[Base.ISOSpeedRatings] = 30, 20, 200
    exif.get_ifd(IFD.GPSInfo)[1] = "N"
    file = io.BytesIO()
    PIL.Image.fromarray(PHOTO).save(file, "JPEG", exif=exif.tobytes(), xmp=XMP, dpi=(240, 240))
    found = codecs.decode(file.getvalue(), max_pixels=10**6)
    twice = np.repeat(np.repeat(found.pixels, 2, axis=0), 2, axis=1)
    return Image(twice, exif=found.exif, xmp=found.xmp, dpi=found.dpi)


def exif_of(data):
    found = PIL.Image.Exif()
    found.load(codecs.decode(data, max_pixels=10**6).exif)
    return found


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_exif_tells_of_the_new_pixels(photo, kind):
    found = exif_of(codecs.encode(photo, format=kind))

    inner = found.get_ifd(IFD.Exif)
    assert (found.get(Base.Orientation, 1), found[Base.Make]) == (1, "Acme")
    assert (inner[Base.ExifImageWidth], inner[Base.ExifImageHeight]) == (40, 60)
    assert inner[Base.ISOSpeedRatings] == 200
    assert found.get_ifd(IFD.GPSInfo)[1] == "N"


@pytest.mark.parametrize("deep", [False, True])
def test_a_tiff_keeps_who_made_it(photo, deep):
    data = codecs.encode(photo.sixteen_bit() if deep else photo, format="tiff")

    assert exif_of(data)[Base.Make] == "Acme"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
def test_xmp_is_kept_and_upright(photo, kind):
    found = codecs.decode(codecs.encode(photo, format=kind), max_pixels=10**6).xmp

    assert b'Orientation="1"' in found and b'ImageWidth="40"' in found and b"kept" in found


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_resolution_is_kept(photo, kind):
    found = codecs.decode(codecs.encode(photo, format=kind), max_pixels=10**6).dpi

    assert found == pytest.approx((240, 240), abs=0.02)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
def test_metadata_can_be_left_out(photo, kind):
    data = codecs.encode(photo, format=kind, options=EncodeConfig(metadata="strip"))
    found = codecs.decode(data, max_pixels=10**6)

    assert (found.xmp, found.dpi) == (None, None)
    assert b"Acme" not in data


def test_a_broken_exif_is_left_out_and_fails_nothing(photo):
    assert metadata.texts(b"Exif\0\0nonsense") == {}
    codecs.encode(Image(photo.pixels, exif=b"Exif\0\0MM\0*\xff\xff"), format="jpeg")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
def test_exiftool_reads_the_same(photo, kind, tmp_path):
    path = tmp_path / f"a{codecs.suffix(kind)}"
    path.write_bytes(codecs.encode(photo, format=kind))

    answer = subprocess.run(["exiftool", "-json", "-n", str(path)], capture_output=True, check=True)

    (found,) = json.loads(answer.stdout)
    assert (found["ImageWidth"], found["ImageHeight"], found["Make"]) == (40, 60, "Acme")
    assert found.get("Orientation", 1) == 1
    assert found.get("ExifImageWidth", 40) == 40
    assert not {"Warning", "Error"} & found.keys()
