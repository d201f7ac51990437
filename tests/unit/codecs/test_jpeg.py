import io

import numpy as np
import PIL.Image
import pytest

from kdsr import codecs
from kdsr.codecs import jpeg
from kdsr.config import EncodeConfig
from kdsr.errors import ImageUnsupported
from kdsr.image import Image

RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (40, 56, 3), dtype=np.uint8)
EXIF = PIL.Image.Exif()
EXIF[271] = "Acme"


def opened(data):
    picture = PIL.Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [60, 95])
def test_pixels_are_those_that_pillow_writes(subsampling, quality):
    found = opened(jpeg.encode(Image(PHOTO), EncodeConfig(quality=quality, subsampling=subsampling)))

    theirs = io.BytesIO()
    PIL.Image.fromarray(PHOTO).save(theirs, "JPEG", quality=quality, subsampling=subsampling)
    assert np.array_equal(np.asarray(found), np.asarray(opened(theirs.getvalue())))
    assert found.mode == "RGB"


def test_grey_stays_grey():
    found = opened(jpeg.encode(Image(PHOTO[:, :, :1]), EncodeConfig()))

    assert found.mode == "L"
    assert np.abs(np.asarray(found).astype(int) - PHOTO[:, :, 0]).max() < 20


@pytest.mark.parametrize("profile_bytes", [500, 200_000])
def test_all_that_lies_beside_the_pixels_is_found(profile_bytes):
    profile = RANDOM.bytes(profile_bytes)
    image = Image(PHOTO, icc_profile=profile, exif=EXIF.tobytes(), xmp=b"<x:xmpmeta/>", dpi=(300, 150.2))

    found = opened(jpeg.encode(image, EncodeConfig()))

    assert found.info["icc_profile"] == profile
    assert found.getexif()[271] == "Acme"
    assert found.info["xmp"] == b"<x:xmpmeta/>"
    assert found.info["dpi"] == (300, 150)


def test_what_no_segment_holds_is_left_out():
    image = Image(PHOTO, exif=EXIF.tobytes() + bytes(70_000), xmp=b"x" * 70_000)

    found = opened(jpeg.encode(image, EncodeConfig()))

    assert "exif" not in found.info and "xmp" not in found.info


def test_a_resolution_that_the_format_cannot_say_is_the_nearest():
    assert opened(jpeg.encode(Image(PHOTO, dpi=(0.4, 1e6)), EncodeConfig())).info["dpi"] == (1, 65535)


def with_scans(number, *, before=b"", behind=b""):
    """A small progressive file whose last scan comes `number` times more."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (40, 24), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:2] + before + data[2:end] + data[last:end] * number + data[end:] + behind


def comment(content):
    return b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content


LIKE_SCANS = b"\xff\xda" * 1000


@pytest.mark.parametrize(
    "data",
    [with_scans(300), with_scans(300, before=comment(LIKE_SCANS))],
    ids=["scans", "scans behind a comment"],
)
def test_a_file_that_asks_for_scans_without_end_is_refused_by_its_header(data):
    with pytest.raises(ImageUnsupported, match="scans"):
        codecs.probe(data)
    with pytest.raises(ImageUnsupported, match="scans"):
        codecs.decode(data, max_pixels=10_000)


@pytest.mark.parametrize(
    "data", [with_scans(100), with_scans(0, before=comment(LIKE_SCANS), behind=LIKE_SCANS)]
)
def test_what_only_looks_like_a_scan_is_none(data):
    assert codecs.decode(data, max_pixels=10_000).pixels.shape == (24, 40, 1)
