import io

import imagecodecs
import numpy as np
import PIL.Image
import pytest

from kdsr import codecs
from kdsr.codecs.png import PngWriter
from kdsr.config import EncodeConfig
from kdsr.image import Image

RNG = np.random.default_rng(0)


def picture(channels, dtype, height=37, width=23):
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("level", [0, 1, 6])
def test_other_readers_find_every_value(dtype, channels, level):
    planes = picture(channels, dtype)
    colours = 1 if channels < 3 else 3
    alpha = planes[:, :, -1] if channels in (2, 4) else None
    image = Image(np.ascontiguousarray(planes[:, :, :colours]), alpha=alpha)

    data = codecs.encode(image, format="png", options=EncodeConfig(png_level=level))

    assert np.array_equal(imagecodecs.png_decode(data), planes[:, :, 0] if channels == 1 else planes)
    assert PIL.Image.open(io.BytesIO(data)).size == (23, 37)


@pytest.mark.parametrize("rows", [1, 7, 37])
def test_rows_may_come_in_any_number_at_a_time(rows):
    planes = picture(3, np.uint8)
    file = io.BytesIO()

    writer = PngWriter(file, 37, 23, 3, 8)
    for first in range(0, 37, rows):
        writer.write(planes[first : first + rows])
    writer.close()

    assert np.array_equal(codecs.decode_png(file.getvalue()), planes)


def test_a_file_with_missing_rows_is_never_closed():
    writer = PngWriter(io.BytesIO(), 37, 23, 3, 8)
    writer.write(picture(3, np.uint8)[:36])

    with pytest.raises(AssertionError, match="1 rows"):
        writer.close()


def test_resolution_is_kept_to_the_nearest_dot_per_metre():
    image = Image(picture(3, np.uint8), dpi=(300.0, 72.0))

    found = PIL.Image.open(io.BytesIO(codecs.encode(image, format="png"))).info["dpi"]

    assert found == pytest.approx((300, 72), abs=0.02)


def test_a_slower_level_makes_a_smaller_file():
    smooth = np.add.outer(np.arange(400), np.arange(400)).astype(np.uint8)[:, :, None]

    sizes = [
        len(codecs.encode(Image(smooth), format="png", options=EncodeConfig(png_level=level)))
        for level in (0, 9)
    ]

    assert sizes[1] < sizes[0]
