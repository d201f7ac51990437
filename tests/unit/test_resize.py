import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.config import UpscaleConfig
from kdsr.errors import ImageTooLarge
from kdsr.image import Image
from kdsr.resize import MIN_QUALITY, fit_bytes, resize, resize_rows, shrunk, target_size

SIZES = [(61, 77, 200, 90), (200, 300, 150, 211), (64, 64, 64, 63), (5, 300, 3, 40), (1, 1, 7, 3)]


def config(**options):
    return UpscaleConfig(input="in", output="out", model="photo-x4", **options)


def noise(height, width, channels=3, dtype=np.uint8, seed=0):
    random = np.random.default_rng(seed)
    if dtype == np.float32:
        return random.random((height, width, channels), dtype=np.float32)
    return random.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


# ---------------------------------------------------------------- which size


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (404, 604)),
        ({"scale": 4}, (404, 604)),
        ({"scale": 3.5}, (354, 529)),
        ({"scale": 0.001}, (1, 1)),
        ({"width": 1000}, (669, 1000)),
        ({"width": 1}, (1, 1)),
        ({"megapixels": 1}, (818, 1223)),
    ],
)
def test_a_target_is_rounded_to_the_nearest_pixel(options, expected):
    assert target_size(101, 151, net_scale=4, config=config(**options)) == expected


@given(st.integers(1, 9000), st.integers(1, 9000), st.floats(0.1, 64))
def test_a_scaled_image_keeps_its_aspect_to_half_a_pixel(height, width, scale):
    found = target_size(height, width, net_scale=4, config=config(scale=scale))
    assert found[0] == 1 or abs(found[0] - height * scale) <= 0.5
    assert found[1] == 1 or abs(found[1] - width * scale) <= 0.5


@given(st.integers(50, 9000), st.integers(50, 9000), st.floats(0.5, 900))
def test_megapixels_are_met_to_half_a_pixel_of_each_side(height, width, megapixels):
    found = target_size(height, width, net_scale=4, config=config(megapixels=megapixels))
    assert abs(found[0] * found[1] - megapixels * 1e6) <= (found[0] + found[1]) / 2 + 1


# ---------------------------------------------------------------- bytes


def sizes_by_quality(quality, factor):
    """A file of 1000 bytes for each step of quality, and as many more as it has pixels."""
    return bytes(int(1000 * quality * factor * factor))


def test_what_fits_is_left_as_it_is():
    assert len(fit_bytes(sizes_by_quality, max_bytes=95_000, quality=95, has_quality=True)) == 95_000


@pytest.mark.parametrize("max_bytes", [94_999, 71_300, 40_000])
def test_the_highest_quality_that_fits_is_found(max_bytes):
    found = fit_bytes(sizes_by_quality, max_bytes=max_bytes, quality=95, has_quality=True)
    assert len(found) == max_bytes // 1000 * 1000


def test_below_the_lowest_quality_the_size_goes_down():
    used = []

    def encode(quality, factor):
        used.append((quality, factor))
        return sizes_by_quality(quality, factor)

    found = fit_bytes(encode, max_bytes=9_000, quality=95, has_quality=True)
    assert 7_000 < len(found) <= 9_000
    assert used[-1][0] == MIN_QUALITY
    assert used[-1][1] < 0.5


def test_a_lossless_file_is_only_made_smaller():
    used = set()

    def encode(quality, factor):
        used.add(quality)
        return sizes_by_quality(quality, factor)

    assert 50_000 < len(fit_bytes(encode, max_bytes=60_000, quality=95, has_quality=False)) <= 60_000
    assert used == {95}


def test_a_limit_below_any_file_is_an_error():
    with pytest.raises(ImageTooLarge, match="max_bytes 10"):
        fit_bytes(lambda quality, factor: bytes(100), max_bytes=10, quality=95, has_quality=True)


# ---------------------------------------------------------------- resizing


@pytest.mark.parametrize("size", SIZES)
def test_a_float_image_is_resized_as_pillow_does_it(size):
    height, width, new_height, new_width = size
    pixels = noise(height, width, 1, np.float32)
    expected = PIL.Image.fromarray(pixels[:, :, 0]).resize(
        (new_width, new_height), PIL.Image.Resampling.LANCZOS
    )
    found = resize(Image(pixels), new_height, new_width).pixels[:, :, 0]
    inner = slice(3, -3)  # Pillow leaves taps beyond the edge out, we repeat the edge
    if min(new_height, new_width) > 30:
        edge = int(4 * max(1, new_height / height, new_width / width)) + 2
        inner = slice(edge, -edge)
        assert np.abs(found - np.asarray(expected))[inner, inner].max() < 1e-4
    assert found.shape == (new_height, new_width)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", SIZES)
def test_a_plain_image_stays_plain(dtype, size):
    height, width, new_height, new_width = size
    white = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    image = Image(np.full((height, width, 3), white, dtype), alpha=np.full((height, width), white, dtype))
    found = resize(image, new_height, new_width)
    assert found.pixels.dtype == dtype
    assert found.pixels.shape == (new_height, new_width, 3)
    assert np.allclose(found.pixels, white, rtol=1e-6)
    assert np.allclose(found.alpha, white, rtol=1e-6)


def test_the_same_size_is_the_same_image():
    image = Image(noise(9, 8))
    assert resize(image, 9, 8) is image


def test_sixteen_bits_are_not_brought_through_eight():
    ramp = np.linspace(30_000, 31_000, 400).astype(np.uint16)
    image = Image(np.broadcast_to(ramp[None, :, None], (40, 400, 3)).copy())
    assert len(np.unique(resize(image, 30, 300).pixels)) > 250


def test_what_is_transparent_does_not_show():
    pixels, alpha = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    pixels[:, 20:] = 200
    alpha[:, 20:] = 255
    found = resize(Image(pixels, alpha=alpha), 30, 30)
    assert (found.pixels[found.alpha > 8] >= 198).all()


@settings(max_examples=20)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(1, 300), st.integers(1, 90))
def test_bands_give_the_bytes_of_the_whole(heights, new_height, new_width):
    pixels = noise(sum(heights), 31)
    ends = np.cumsum(heights)
    bands = [Image(part) for part in np.split(pixels, ends[:-1])]
    found = list(resize_rows(bands, pixels.shape[:2], (new_height, new_width)))
    whole = list(resize_rows([Image(pixels)], pixels.shape[:2], (new_height, new_width)))
    joined = np.concatenate([band.pixels for band in found])
    assert joined.shape == (new_height, new_width, 3)
    assert (joined == np.concatenate([band.pixels for band in whole])).all()


def test_a_shrunk_size_is_never_empty():
    assert shrunk((100, 3), 0.1) == (10, 1)
