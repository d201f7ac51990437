"""From a file through the bundled network to a file: edges, colours, greys and depth stay what they were."""

import io
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from kdsr import codecs, upscale, windows
from kdsr.checkpoint import load_model
from kdsr.config import EncodeConfig
from kdsr.engine import Engine
from kdsr.image import Image
from kdsr.upscale import Upscaler
from tests.unit.codecs.profiles import LINEAR_GREY

SCALE = 2
SIDE = 48
EDGE = 2.0  # pixels that the soft edge is wide
SAMPLES = 8  # of each pixel and axis, when the shape is drawn
COLOUR = np.array([200, 120, 40])
LEVELS_FROM_TRUTH = 12
LEVELS_OF_FRINGE = 1


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler(Engine(load_model(f"photo-x{SCALE}").model))


# ---------------------------------------------------------------- soft edges


def disc(scale, *, hidden, depth=np.uint8):
    """A disc of one colour with a soft edge, drawn `scale` times as large; `hidden` is under alpha 0."""
    at = (np.arange(SIDE * scale * SAMPLES) + 0.5) / (SAMPLES * scale) - SIDE / 2
    inside = ((SIDE * 0.32 - np.hypot(at[:, None], at)) / EDGE + 0.5).clip(0, 1)
    alpha = inside.reshape(SIDE * scale, SAMPLES, SIDE * scale, SAMPLES).mean(axis=(1, 3))
    white = np.iinfo(depth).max
    pixels = np.where(alpha[:, :, None] > 0, COLOUR / 255, hidden)
    return Image(np.rint(pixels * white).astype(depth), alpha=np.rint(alpha * white).astype(depth))


def laid_over(image, ground):
    """(H, W, 3) in levels of 0 to 255."""
    white = np.iinfo(image.pixels.dtype).max
    alpha = image.alpha[:, :, None] / white
    return 255 * (image.pixels / white * alpha + ground * (1 - alpha))


def fringe(image, ground):
    """Most levels by which the edge shows another colour than that of the disc, whatever its alpha."""
    white = np.iinfo(image.pixels.dtype).max
    plain = np.broadcast_to(np.rint(COLOUR / 255 * white), image.pixels.shape)
    plain = replace(image, pixels=plain.astype(image.pixels.dtype))
    return np.abs(laid_over(image, ground) - laid_over(plain, ground)).max()


@pytest.mark.parametrize("ground", [0, 1], ids=["over black", "over white"])
@pytest.mark.parametrize("hidden", [0, 1], ids=["hidden black", "hidden white"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_soft_edge_has_no_fringe(upscaler, ground, hidden, depth):
    file = codecs.encode(disc(1, hidden=hidden, depth=depth), format="png")

    result = codecs.encode(upscaler.upscale(codecs.decode(file, max_pixels=10**4)), format="png")

    found, truth = codecs.decode(result, max_pixels=10**5), disc(SCALE, hidden=hidden, depth=depth)
    assert np.abs(laid_over(found, ground) - laid_over(truth, ground)).max() <= LEVELS_FROM_TRUTH
    assert fringe(found, ground) <= LEVELS_OF_FRINGE


@pytest.mark.parametrize("hidden", [0, 1], ids=["hidden black", "hidden white"])
def test_without_bled_colours_there_would_be_a_fringe(upscaler, hidden, monkeypatch):
    monkeypatch.setattr(upscale, "bleed", lambda pixels, alpha: pixels)

    found, truth = upscaler.upscale(disc(1, hidden=hidden)), disc(SCALE, hidden=hidden)

    differences = [np.abs(laid_over(found, ground) - laid_over(truth, ground)).max() for ground in (0, 1)]
    assert max(differences) > LEVELS_FROM_TRUTH
    assert fringe(found, 0) > 10 * LEVELS_OF_FRINGE


# ---------------------------------------------------------------- colours and greys

PATCHES = np.array([[200, 70, 60], [90, 170, 90], [70, 80, 180], [200, 190, 90], [128] * 3, [250] * 3])
PATCH = 24


def patches(icc_profile):
    pixels = np.repeat(np.repeat(PATCHES[None].astype(np.uint8), PATCH, axis=0), PATCH, axis=1)
    return Image(pixels, icc_profile=icc_profile)


def middles(image, scale):
    """(N, 3): the colour in the middle of each patch."""
    at = np.arange(len(PATCHES)) * PATCH * scale + PATCH * scale // 2
    return image.pixels[PATCH * scale // 2, at].astype(int)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "gif", "bmp", "ppm"])
def test_wide_colours_look_the_same_after_an_upscale(upscaler, icc, kind):
    given = patches(icc)

    result = codecs.encode(upscaler.upscale(given), format=kind)

    found = codecs.decode(result, max_pixels=10**5)
    before, after = middles(codecs.to_srgb(given), 1), middles(codecs.to_srgb(found), SCALE)
    assert np.abs(before - after).max() <= 6
    without = middles(codecs.to_srgb(replace(found, icc_profile=None)), SCALE)
    if found.icc_profile is not None:
        assert np.abs(before - without).max() > 12, "the same numbers are other colours in sRGB"


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "avif", "gif", "bmp", "ppm"])
@pytest.mark.parametrize("icc_profile", [None, LINEAR_GREY], ids=["plain", "linear"])
def test_grey_comes_back_as_grey_that_looks_the_same(upscaler, kind, icc_profile):
    ramp = np.tile(np.linspace(30, 220, 32).astype(np.uint8), (24, 1))[:, :, None]
    given = Image(ramp, icc_profile=icc_profile)

    found = codecs.decode(codecs.encode(upscaler.upscale(given), format=kind), max_pixels=10**5)

    assert found.pixels.shape == (24 * SCALE, 32 * SCALE, 1)
    before = codecs.to_srgb(given).pixels[12, 4:-4, 0].astype(float)
    after = codecs.to_srgb(found).pixels[12 * SCALE, :, 0].reshape(-1, SCALE).mean(axis=1)[4:-4]
    assert np.abs(before - after).max() <= 4


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_a_dark_deep_picture_is_upscaled_in_its_depth(upscaler, kind):
    rows, columns = np.mgrid[:24, :32]
    dark = np.rint(120 + 100 * np.sin(rows / 5) * np.cos(columns / 6)).astype(np.uint16)[:, :, None]
    file = codecs.encode(Image(dark), format=kind)

    result = codecs.encode(upscaler.upscale(codecs.decode(file, max_pixels=10**4)), format=kind)

    found = codecs.decode(result, max_pixels=10**5).pixels
    assert found.dtype == np.uint16
    small = found.reshape(24, SCALE, 32, SCALE).mean(axis=(1, 3))
    assert np.abs(small - dark[:, :, 0]).mean() < 30, "of 65,535, where 8 bits have steps of 257"


# ---------------------------------------------------------------- windows


def test_a_tiff_made_in_windows_says_what_the_input_said(upscaler, icc, exif_of_a_camera):
    described = {"icc_profile": icc, "exif": exif_of_a_camera, "xmp": b"<kept/>", "dpi": (300, 150)}
    given = Image(np.zeros((40, 50, 3), np.uint8), **described)
    source = windows.open_tiff(io.BytesIO(codecs.encode(given, format="tiff")))
    target = (40 * SCALE, 50 * SCALE)
    file = io.BytesIO()

    windows.write_tiff(file, windows.upscaled_rows(source, upscaler, target), target, EncodeConfig())

    found = codecs.decode(file.getvalue(), max_pixels=10**5)
    assert (found.height, found.width) == target
    assert (found.icc_profile, found.xmp, found.dpi) == (icc, b"<kept/>", (300, 150))
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as outside:
        tags = outside.pages.first.tags
        assert (tags["Make"].value, tags["Model"].value) == ("Acme", "Camera One")
        assert tags["ExifTag"].value["ISOSpeedRatings"] == 200
        assert tags["GPSTag"].value["GPSLatitudeRef"] == "N"
