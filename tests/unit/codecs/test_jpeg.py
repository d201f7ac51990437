import io

import numpy as np
import PIL.Image
import pytest

from kdsr.codecs import jpeg
from kdsr.config import EncodeConfig
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
