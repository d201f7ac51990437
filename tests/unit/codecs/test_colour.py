import io
import struct

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms

from kdsr import codecs
from kdsr.codecs.colour import profile_space
from kdsr.image import Image
from tests.unit.codecs.profiles import ADOBE_RGB, LINEAR_GREY, WHITE, icc_of


def only_black_ink():
    """A CMYK profile of a press without coloured inks: L* falls with K, the rest is ignored."""
    ramp = bytes(range(256))
    corners = b"".join(bytes([0 if index & 1 else 255, 128, 128]) for index in range(16))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + corners + ramp * 3
    return icc_of("CMYK", {"wtpt": WHITE, "A2B0": lut}, pcs="Lab ", device="prtr")


def flat(*colour):
    return np.full((4, 4, len(colour)), colour, np.uint8)


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_adobe_rgb_green_is_out_of_reach_and_greys_keep_their_place():
    grey = codecs.to_srgb(Image(flat(128, 128, 128), icc_profile=ADOBE_RGB)).pixels[0, 0].astype(int)
    muted = codecs.to_srgb(Image(flat(100, 150, 100), icc_profile=ADOBE_RGB)).pixels[0, 0].astype(int)

    assert abs(grey - 128).max() <= 2
    assert muted[0] < 90, "the same numbers mean a stronger colour in the larger space"
    assert muted[1] in range(147, 155)


def test_srgb_under_any_name_stays_bit_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    image = codecs.to_srgb(Image(pixels, icc_profile=srgb_profile()))

    assert np.array_equal(image.pixels, pixels)
    assert image.icc_profile is None


def test_a_grey_profile_is_used():
    image = codecs.to_srgb(Image(flat(128), icc_profile=LINEAR_GREY))

    assert image.pixels[0, 0].tolist() == pytest.approx([188], abs=1), "half the light is 188 in sRGB"


def test_grey_pixels_with_an_rgb_profile_are_converted_as_rgb():
    image = codecs.to_srgb(Image(flat(128), icc_profile=ADOBE_RGB))

    assert image.pixels.shape == (4, 4, 3)


@pytest.mark.parametrize(
    "profile", [b"", b"junk", LINEAR_GREY, srgb_profile()[:200]], ids=["empty", "junk", "grey", "cut"]
)
def test_a_profile_that_is_broken_or_for_other_pixels_is_left_out(profile):
    pixels = flat(10, 20, 30)

    image = codecs.to_srgb(Image(pixels, icc_profile=profile))

    assert np.array_equal(image.pixels, pixels)
    assert image.icc_profile is None


def test_alpha_and_exif_pass_through():
    alpha = np.arange(16, dtype=np.uint8).reshape(4, 4)

    image = codecs.to_srgb(Image(flat(10, 20, 30), alpha=alpha, icc_profile=ADOBE_RGB, exif=b"exif"))

    assert np.array_equal(image.alpha, alpha)
    assert image.exif == b"exif"


def test_cmyk_goes_through_its_own_profile():
    cyan = PIL.Image.fromarray(flat(255, 0, 0, 0), mode="CMYK")
    black = PIL.Image.fromarray(flat(0, 0, 0, 255), mode="CMYK")
    decoded = []
    for picture in (cyan, black):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=100, icc_profile=only_black_ink())
        decoded.append(codecs.decode(file.getvalue(), max_pixels=100))

    assert decoded[0].pixels.min() >= 252, "this press has no cyan"
    assert decoded[1].pixels.max() <= 3
    assert all(image.icc_profile is None for image in decoded)


def test_the_space_of_a_profile_is_read_from_its_header():
    assert [profile_space(each) for each in (ADOBE_RGB, LINEAR_GREY, only_black_ink(), b"")] == [
        "RGB",
        "GRAY",
        "CMYK",
        "",
    ]
