import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.image import Image, over_white, round_to_8_bits


def test_every_16_bit_value_goes_to_the_nearest_8_bit_value():
    values = np.arange(65536, dtype=np.uint16)

    assert np.array_equal(round_to_8_bits(values), np.rint(values / 257).astype(np.uint8))


def test_8_bits_widened_to_16_come_back():
    values = np.arange(256, dtype=np.uint16)

    assert np.array_equal(round_to_8_bits(values * 257), values)


@given(st.integers(0, 255), st.integers(0, 255))
def test_alpha_blends_with_white_to_the_nearest_level(value, alpha):
    pixels, weight = np.full((1, 1, 3), value, np.uint8), np.full((1, 1), alpha, np.uint8)

    exact = (value * alpha + 255 * (255 - alpha)) / 255

    assert abs(int(over_white(pixels, weight)[0, 0, 0]) - exact) <= 0.5


def test_rgb8_is_rgb_of_8_bits_for_every_kind_of_image():
    grey = np.full((2, 3, 1), 0x8080, np.uint16)
    alpha = np.array([[0, 65535, 65535], [65535, 0, 65535]], np.uint16)

    image = Image(grey, alpha=alpha, icc_profile=b"profile").rgb8()

    assert image.pixels.shape == (2, 3, 3)
    assert image.pixels.dtype == np.uint8
    assert image.alpha is None
    assert image.icc_profile == b"profile"
    assert image.pixels[:, :, 1].tolist() == [[255, 128, 128], [128, 255, 128]]


def test_an_opaque_rgb_image_of_8_bits_is_not_copied():
    image = Image(np.zeros((4, 5, 3), np.uint8))

    assert image.rgb8() is image
    assert (image.height, image.width) == (4, 5)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3), np.float64)],
    ids=["no channel axis", "alpha among the colours", "double"],
)
def test_other_arrays_are_no_image(pixels):
    with pytest.raises(ValueError, match="expected"):
        Image(pixels)


def test_alpha_has_the_size_and_type_of_the_pixels():
    with pytest.raises(ValueError, match="alpha"):
        Image(np.zeros((4, 5, 3), np.uint8), alpha=np.zeros((5, 4), np.uint8))
    with pytest.raises(ValueError, match="alpha"):
        Image(np.zeros((4, 5, 3), np.uint8), alpha=np.zeros((4, 5), np.uint16))
