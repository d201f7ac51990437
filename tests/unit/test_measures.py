"""What is measured tells made-up and real damage from what was there before."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL import ImageFilter

from kdsr.check import MAX_BLOCKINESS, MIN_DETAIL, MIN_FINE_SHARE, MIN_SHARPNESS
from kdsr.measures import content, measure, thumbnail
from kdsr.shards import cut

PHOTOS = sorted((Path(__file__).parents[2] / "jobs/demo/photos").glob("*.jpg"))
COARSE = {"grass.jpg", "gravel.jpg"}
"""Textures that hide the grid of JPEG."""


def photo(path):
    return PIL.Image.open(path).convert("RGB")


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return PIL.Image.open(file).convert("RGB")


def enlarged(image):
    half = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BICUBIC)
    return half.resize(image.size, PIL.Image.Resampling.BICUBIC)


def measured(image, *, skip=0):
    """Of each sub-image, as it is sharded; `skip` pixels are cut off above and at the left first."""
    pixels = np.asarray(image)[skip:, skip:]
    return [measure(pixels[box.slices]) for box in cut(*pixels.shape[:2], 480)]


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_a_photograph_is_nothing_but_itself(path):
    for each in measured(photo(path)):
        assert each.detail > MIN_DETAIL
        assert each.fine_share > MIN_FINE_SHARE
        assert each.blockiness < MAX_BLOCKINESS


def test_only_a_background_out_of_focus_is_blurred_among_the_photographs():
    blurred = [
        path.stem for path in PHOTOS for each in measured(photo(path)) if each.sharpness < MIN_SHARPNESS
    ]
    assert blurred == ["dandelion"]


@pytest.mark.parametrize("path", PHOTOS[::3], ids=lambda path: path.stem)
def test_a_blurred_photograph_is_blurred(path):
    for each in measured(photo(path).filter(ImageFilter.GaussianBlur(2))):
        assert each.sharpness < MIN_SHARPNESS
        assert each.fine_share < MIN_FINE_SHARE


@pytest.mark.parametrize("path", PHOTOS[::3], ids=lambda path: path.stem)
def test_an_enlarged_photograph_has_no_fine_detail_and_no_grid(path):
    for each in measured(enlarged(photo(path))):
        assert each.fine_share < MIN_FINE_SHARE
        assert each.blockiness < MAX_BLOCKINESS


@pytest.mark.parametrize("path", [path for path in PHOTOS if path.name not in COARSE][::2], ids=str)
def test_jpeg_leaves_its_grid_wherever_the_sub_image_begins(path):
    for skip in (0, 3):
        assert all(each.blockiness > MAX_BLOCKINESS for each in measured(jpeg(photo(path), 20), skip=skip))


def test_stripes_are_no_grid():
    stripes = np.zeros((160, 160, 3), np.uint8)
    stripes[:, ::8] = 200
    assert measure(stripes).blockiness < MAX_BLOCKINESS


def test_a_slope_has_no_detail():
    slope = np.repeat(np.linspace(0, 120, 200).astype(np.uint8)[None, :, None], 200, axis=0).repeat(3, axis=2)
    assert measure(slope).detail < MIN_DETAIL


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 300), (17, 63), (65, 64)])
def test_small_sub_images_can_be_measured(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    each = measure(pixels)
    assert np.isfinite([each.sharpness, each.detail, each.blockiness, each.fine_share]).all()
    assert each.thumbnail.shape == (16, 18)


def test_cells_of_a_thumbnail_are_means():
    grey = np.arange(32 * 36, dtype=np.float32).reshape(32, 36) / 8
    expected = grey.reshape(16, 2, 18, 2).mean(axis=(1, 3))
    assert np.abs(thumbnail(grey).astype(np.float32) - expected).max() <= 0.5


def test_content_is_of_pixels_and_size():
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    changed = pixels.copy()
    changed[9, 9, 2] ^= 1
    assert content(pixels) == content(pixels[:, ::-1][:, ::-1])
    assert len({content(pixels), content(changed), content(pixels.reshape(5, 20, 3))}) == 3
