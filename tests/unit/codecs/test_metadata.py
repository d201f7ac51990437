import io

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from PIL.ExifTags import IFD, Base

from kdsr import codecs
from kdsr.codecs import metadata
from kdsr.codecs.exif import preview, with_preview
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


# ---------------------------------------------------------------- previews


def photo_with_preview(maker_note=b"Acme\0note with offsets"):
    """A JPEG of 30 x 20 pixels whose EXIF has a MakerNote and a small JPEG of another picture."""
    exif = PIL.Image.Exif()
    exif[Base.Make] = "Acme"
    exif.get_ifd(IFD.Exif)[Base.MakerNote] = maker_note
    small = io.BytesIO()
    PIL.Image.new("RGB", (16, 16), (255, 0, 255)).save(small, "JPEG")
    file = io.BytesIO()
    with_small = with_preview(exif.tobytes(), small.getvalue())
    smooth = PIL.Image.new("RGB", (30, 20), (10, 120, 40))
    smooth.save(file, "JPEG", exif=with_small, xmp=b"<xmp:Thumbnails>old</xmp:Thumbnails><kept/>")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_a_preview_shows_the_new_picture(kind):
    image = codecs.decode(photo_with_preview(), max_pixels=10**6)
    assert preview(image.exif) is not None

    found = codecs.decode(codecs.encode(image, format=kind), max_pixels=10**6)

    shown = np.asarray(PIL.Image.open(io.BytesIO(preview(found.exif))))
    assert shown.shape == (20, 30, 3)
    assert np.abs(shown.astype(int) - (10, 120, 40)).max() < 12
    assert found.xmp == b"<kept/>"


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif"])
def test_what_a_maker_wrote_stays_where_it_was(kind):
    """Offsets in a MakerNote count from the head of the EXIF."""
    image = codecs.decode(photo_with_preview(), max_pixels=10**6)

    found = codecs.decode(codecs.encode(image, format=kind), max_pixels=10**6)

    assert found.exif.index(b"note with offsets") == image.exif.index(b"note with offsets")
    assert image.exif.index(b"note with offsets") == photo_with_preview().split(b"Exif\0\0", 1)[1].index(
        b"note with offsets"
    ) + len(b"Exif\0\0")


# ---------------------------------------------------------------- animations


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("says", ["exif", "xmp"])
def test_an_animation_is_turned_once_and_says_so_no_more(kind, says):
    exif = PIL.Image.Exif()
    exif[Base.Make] = "Acme"
    if says == "exif":
        exif[Base.Orientation] = 6
    sources = [PIL.Image.fromarray(np.roll(PHOTO // 64 * 64, step, axis=1)) for step in (0, 5)]
    options = {"lossless": True} if kind == "WEBP" else {}
    if kind == "PNG":
        info = PIL.PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options["pnginfo"] = info
    else:
        options["xmp"] = XMP
    file = io.BytesIO()
    sources[0].save(
        file, kind, save_all=True, append_images=sources[1:], duration=100, exif=exif.tobytes(), **options
    )

    frames = list(codecs.decode_frames(file.getvalue(), max_pixels=10**6, max_frames=9))
    again = codecs.encode_frames(frames, format=kind.lower(), loop=0, options=EncodeConfig(lossless=True))

    for found in (frames, list(codecs.decode_frames(again, max_pixels=10**6, max_frames=9))):
        assert [frame.image.pixels.shape for frame in found] == [(30, 20, 3)] * 2
        assert b'Orientation="1"' in found[0].image.xmp
        back = PIL.Image.Exif()
        back.load(found[0].image.exif)
        assert (back[Base.Make], back.get(Base.Orientation, 1)) == ("Acme", 1)
    upright = np.rot90(PHOTO // 64 * 64, -1)
    assert np.array_equal(frames[0].image.pixels, upright)
    header = codecs.probe(file.getvalue())
    assert (header.height, header.width) == (30, 20)
