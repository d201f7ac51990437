import io

import imagecodecs
import numpy as np
import pytest
import tifffile

from kdsr.config import EncodeConfig
from kdsr.engine import Engine
from kdsr.errors import ImageCorrupt
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.resize import resize
from kdsr.spec import RepChainSpec
from kdsr.upscale import Upscaler
from kdsr.windows import ArrayRows, TiffRows, can_read, upscaled_rows, write_png, write_tiff

LAYOUTS = [
    {"tile": (64, 48)},
    {"rowsperstrip": 7},
    {"rowsperstrip": 200},
    {"tile": (32, 32), "predictor": True},
]


def picture(height=200, width=150, channels=3, dtype=np.uint8):
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (5 + c)) * np.cos(columns / (7 - c)) for c in range(channels)], axis=2)
    unit = waves * 0.4 + 0.5
    if dtype == np.float32:
        return unit.astype(np.float32)
    return (unit * np.iinfo(dtype).max).astype(dtype)


def tiff(pixels, **options):
    file = io.BytesIO()
    shape = {1: pixels[:, :, 0]}.get(pixels.shape[2], pixels)
    extra = ["unassalpha"] if pixels.shape[2] in (2, 4) else None
    kind = "rgb" if pixels.shape[2] >= 3 else "minisblack"
    planar = "contig" if pixels.shape[2] > 1 else None
    options = {"compression": "deflate", **options}
    tifffile.imwrite(file, shape, photometric=kind, extrasamples=extra, planarconfig=planar, **options)
    return tifffile.TiffFile(io.BytesIO(file.getvalue()))


@pytest.fixture(scope="module")
def upscaler():
    return Upscaler(
        Engine(build_model(RepChainSpec(scale=2, num_features=8, num_layers=2))), tile_size=40, batch_size=1
    )


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (3, np.uint16), (4, np.uint16)]
)
def test_any_rows_of_a_tiff_are_those_of_the_image(layout, channels, dtype):
    pixels = picture(channels=channels, dtype=dtype)
    file = tiff(pixels, **layout)
    assert can_read(file)
    source = TiffRows(file)
    assert (source.height, source.width, source.has_alpha) == (200, 150, channels == 4)
    for top, bottom in [(0, 1), (0, 200), (190, 200), (30, 130), (63, 65), (0, 64)]:
        rows = source.rows(top, bottom)
        found = rows.pixels if rows.alpha is None else np.dstack([rows.pixels, rows.alpha])
        assert (found == pixels[top:bottom]).all()


def test_a_float_tiff_is_read():
    pixels = picture(dtype=np.float32)
    assert (TiffRows(tiff(pixels, tile=(64, 64))).rows(10, 90).pixels == pixels[10:90]).all()


def test_metadata_of_a_tiff_is_kept():
    file = tiff(picture(), resolution=(300, 150), resolutionunit="inch", iccprofile=b"profile")
    rows = TiffRows(file).rows(0, 10)
    assert (rows.dpi, rows.icc_profile) == ((300, 150), b"profile")


@pytest.mark.parametrize(
    "options",
    [{"extratags": [(274, "H", 1, 6, True)]}, {"planarconfig": "separate"}, {"photometric": "ycbcr"}],
)
def test_a_tiff_of_another_kind_is_left_to_the_codecs(options):
    pixels = picture()
    pixels = pixels.transpose(2, 0, 1).copy() if "planarconfig" in options else pixels
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **{"photometric": "rgb", **options})
    assert not can_read(tifffile.TiffFile(io.BytesIO(file.getvalue())))


def test_a_broken_segment_is_corrupt():
    file = io.BytesIO()
    tifffile.imwrite(file, picture(), photometric="rgb", compression="deflate", tile=(64, 64))
    broken = bytearray(file.getvalue())
    start = tifffile.TiffFile(io.BytesIO(bytes(broken))).pages[0].dataoffsets[2]
    broken[start : start + 20] = bytes(20)
    with pytest.raises(ImageCorrupt, match="segment 2"):
        TiffRows(tifffile.TiffFile(io.BytesIO(bytes(broken)))).rows(0, 10)


# ---------------------------------------------------------------- upscaling


def soft_disc(height, width, dtype):
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - height / 2, columns - width / 2)
    return (np.clip((50 - distance) / 6, 0, 1) * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize(
    "image",
    [
        Image(picture()),
        Image(picture(channels=1, dtype=np.uint16)),
        Image(picture(dtype=np.float32) * 3 - 1),
        Image(picture(), alpha=soft_disc(200, 150, np.uint8)),
        Image(picture(700, 60), alpha=soft_disc(700, 60, np.uint8)),
    ],
    ids=["colour", "grey16", "float", "alpha", "alpha-high"],
)
@pytest.mark.parametrize("scale", [2, 1.3])
def test_windows_give_the_bytes_of_the_whole_image(upscaler, image, scale):
    target = int(image.height * scale), int(image.width * scale)
    bands = list(upscaled_rows(ArrayRows(image), upscaler, target))
    whole = resize(upscaler.upscale(image), *target)
    assert len(bands) > 2
    assert (np.concatenate([band.pixels for band in bands]) == whole.pixels).all()
    if whole.alpha is not None:
        assert (np.concatenate([band.alpha for band in bands]) == whole.alpha).all()


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none"])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (4, np.uint8), (3, np.uint16), (3, np.float32)]
)
def test_a_tiff_written_in_bands_is_read_back(compression, channels, dtype):
    pixels = picture(700, 1100, channels, dtype)
    image = Image(pixels) if channels < 4 else Image(pixels[..., :3].copy(), alpha=pixels[..., 3].copy())
    image = Image(image.pixels, image.alpha, icc_profile=b"profile", dpi=(300.0, 300.0))
    source = ArrayRows(image)
    bands = [source.rows(top, min(top + 90, 700)) for top in range(0, 700, 90)]
    file = io.BytesIO()
    write_tiff(file, bands, (700, 1100), EncodeConfig(tiff_compression=compression))
    page = tifffile.TiffFile(io.BytesIO(file.getvalue())).pages[0]
    assert (page.asarray().reshape(pixels.shape) == pixels).all()
    assert page.is_tiled
    found = TiffRows(page.parent).rows(0, 1)
    assert (found.icc_profile, found.dpi, found.alpha is None) == (b"profile", (300, 300), channels < 4)


@pytest.mark.parametrize("level", [1, 6])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (4, np.uint8), (1, np.uint16), (3, np.float32)]
)
def test_a_png_written_in_bands_is_read_back(level, channels, dtype):
    pixels = picture(300, 210, channels, dtype)
    image = Image(pixels) if channels < 4 else Image(pixels[..., :3].copy(), alpha=pixels[..., 3].copy())
    image = Image(image.pixels, image.alpha, dpi=(300.0, 300.0))
    source = ArrayRows(image)
    bands = [source.rows(top, min(top + 90, 300)) for top in range(0, 300, 90)]
    file = io.BytesIO()
    write_png(file, bands, (300, 210), EncodeConfig(png_level=level))
    found = imagecodecs.png_decode(file.getvalue()).reshape(pixels.shape)
    if dtype == np.float32:
        assert np.abs(found / 65535 - pixels).max() < 1e-5
    else:
        assert (found == pixels).all()
