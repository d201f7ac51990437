"""What docs/formats.md promises of every format, depth, grey or RGB, with alpha and without."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from kdsr import codecs
from kdsr.codecs.formats import READ
from kdsr.config import EncodeConfig
from kdsr.errors import ImageTooLarge, RequestError
from kdsr.image import Image, over_white

PAGE = Path(__file__).parents[3] / "docs" / "formats.md"
HEIGHT, WIDTH = 48, 64
BITS = {8: np.uint8, 16: np.uint16, 32: np.float32}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><kept/></x:xmpmeta>'


@dataclass(frozen=True)
class Promise:
    """One row of the table."""

    kind: str
    cells: dict[str, str]

    def __str__(self):
        return self.kind

    def __getitem__(self, column):
        return self.cells[column]

    @property
    def bits(self):
        return [int(number) for number in self["bits written"].split(",")]

    @property
    def least_psnr(self):
        return np.inf if self["loss"] == "none" else float(self["loss"].removesuffix(" dB"))


def promises():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| format | bits read"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    table = [[cell.strip() for cell in re.split(r"\|", row)[1:-1]] for row in rows]
    return [Promise(row[0].lower(), dict(zip(table[0], row, strict=True))) for row in table[2:]]


PROMISES = promises()
WRITTEN = [each for each in PROMISES if each["bits written"] != "not written"]


def unit_picture():
    """(H, W, 3) and (H, W) in 0..1: soft waves, and an alpha that is nothing, everything and all between."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    red = np.sin(rows / 7) * np.cos(columns / 9) * 0.4 + 0.5
    green = np.cos(rows / 8 + columns / 11) * 0.4 + 0.5
    alpha = ((columns - 8) / (WIDTH - 16)).clip(0, 1)
    return np.dstack([red, green, np.sin(columns / 13) * 0.45 + 0.5]), alpha


def picture(bits, channels, *, with_alpha, **described):
    def stored(values):
        if bits == 32:
            return values.astype(np.float32)
        return np.rint(values * (2**bits - 1)).astype(BITS[bits])

    colours, alpha = unit_picture()
    alpha = stored(alpha) if with_alpha else None
    return Image(stored(colours[:, :, :channels]), alpha=alpha, **described)


def in_bits(image, bits):
    return {8: image.eight_bit, 16: image.sixteen_bit, 32: lambda: image}[bits]()


def psnr(found, expected):
    """Of arrays of one type, in dB."""
    top = 1 if found.dtype == np.float32 else np.iinfo(found.dtype).max
    error = np.mean((found.astype(float) - expected) ** 2) / top**2
    return np.inf if error == 0 else -10 * np.log10(error)


def visible(image):
    """Colours where anything is seen: those under alpha 0 need not be kept."""
    return image.pixels if image.alpha is None else image.pixels * (image.alpha > 0)[:, :, None]


def test_the_page_names_every_format():
    assert sorted(each.kind for each in PROMISES) == sorted(READ)


@pytest.mark.parametrize("with_alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("promise", WRITTEN, ids=str)
def test_what_comes_out_is_what_the_page_says(promise, bits, channels, with_alpha):
    given = picture(bits, channels, with_alpha=with_alpha)

    data = codecs.encode(given, format=promise.kind)
    found, header = codecs.decode(data, max_pixels=10**5), codecs.probe(data)

    kept = min(bits, max(promise.bits))
    expected = in_bits(given, kept)
    if promise["alpha"] == "over white" and with_alpha:
        expected = Image(over_white(expected.pixels, expected.alpha))
    assert found.pixels.dtype == BITS[kept]
    assert found.pixels.shape == (HEIGHT, WIDTH, 3 if promise["grey"] == "as RGB" else channels)
    assert (found.alpha is not None) == (with_alpha and promise["alpha"] != "over white")
    assert (header.format, header.height, header.width) == (promise.kind, HEIGHT, WIDTH)
    assert (header.bits, header.frames) == (8 * found.pixels.itemsize, 1)
    if promise["alpha"] == "on or off" and with_alpha:
        assert np.array_equal(found.alpha, np.where(expected.alpha >= 128, 255, 0))
        expected = Image(expected.pixels, alpha=found.alpha)
    assert psnr(visible(found), visible(expected)) >= promise.least_psnr
    if expected.alpha is not None:
        assert psnr(found.alpha, expected.alpha) >= max(50, min(promise.least_psnr, 1000))


@pytest.mark.parametrize("with_alpha", [False, True], ids=["opaque", "alpha"])
def test_lossless_webp_is_exact(with_alpha):
    given = picture(8, 3, with_alpha=with_alpha)

    data = codecs.encode(given, format="webp", options=EncodeConfig(lossless=True))

    assert np.array_equal(visible(codecs.decode(data, max_pixels=10**5)), visible(given))


@pytest.mark.parametrize("promise", WRITTEN, ids=str)
def test_what_a_file_says_is_kept_as_the_page_says(promise, icc, exif_of_a_camera):
    given = picture(
        8, 3, with_alpha=False, icc_profile=icc, exif=exif_of_a_camera, xmp=XMP, dpi=(300.0, 150.0)
    )

    found = codecs.decode(codecs.encode(given, format=promise.kind), max_pixels=10**5)

    assert found.icc_profile == (icc if promise["ICC"] == "kept" else None)
    assert (b"Acme" in (found.exif or b"")) == (promise["EXIF"] == "kept")
    assert (found.xmp == XMP) == (promise["XMP"] == "kept")
    if promise["resolution"] == "kept":
        assert found.dpi == pytest.approx((300, 150), abs=0.02)
    else:
        assert found.dpi is None


@pytest.mark.parametrize("promise", WRITTEN, ids=str)
def test_sides_and_frames_are_as_the_page_says(promise):
    side = int(promise["longest side"])

    assert codecs.largest_side(promise.kind) == side
    assert codecs.can_hold_frames(promise.kind) == (promise["frames"] != "one")
    if side < 10**6:
        with pytest.raises(ImageTooLarge, match=str(side)):
            codecs.encode(Image(np.zeros((1, side + 1, 1), np.uint8)), format=promise.kind)


def test_heic_is_read_only_and_becomes_jpeg():
    assert codecs.output_format("heic") == "jpeg"
    with pytest.raises(RequestError, match="heic"):
        codecs.largest_side("heic")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("promise", WRITTEN, ids=str)
def test_a_dark_picture_keeps_its_depth(promise, bits):
    """No value above 200: who looks at values takes 16 bits for 8."""
    dark = Image(np.tile(np.arange(200, dtype=BITS[bits]), (8, 1))[:, :, None])

    found = codecs.decode(codecs.encode(dark, format=promise.kind), max_pixels=10**5)

    if bits in promise.bits:
        assert found.pixels.dtype == BITS[bits]
    if bits in promise.bits and promise["loss"] == "none":
        assert np.array_equal(found.pixels, dark.pixels)
    if bits == 16 and promise.bits == [8]:
        assert found.pixels.max() <= 1, "a picture that is all but black"
