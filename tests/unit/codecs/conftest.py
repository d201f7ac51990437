"""What a camera writes, for the tests of this folder."""

import PIL.Image
import pytest
from PIL.ExifTags import IFD, Base

from tests.unit.codecs.profiles import ADOBE_RGB, DISPLAY_P3


@pytest.fixture(params=[ADOBE_RGB, DISPLAY_P3], ids=["adobe-rgb", "display-p3"])
def icc(request):
    return request.param


@pytest.fixture
def exif_of_a_camera():
    exif = PIL.Image.Exif()
    exif[Base.Make], exif[Base.Model] = "Acme", "Camera One"
    inner = exif.get_ifd(IFD.Exif)
    inner[Base.ISOSpeedRatings] = 200
    exif.get_ifd(IFD.GPSInfo)[1] = "N"
    return exif.tobytes()
