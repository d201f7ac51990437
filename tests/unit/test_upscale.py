import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.engine import Engine
from kdsr.errors import ImageUnsupported, RequestError
from kdsr.image import Image
from kdsr.manifest import Task
from kdsr.models import build_model
from kdsr.models.contract import SrModel
from kdsr.spec import BicubicSpec, EdsrSpec, EspcnSpec, FsrcnnSpec, ImportedSpec, RepChainSpec
from kdsr.store import open_store
from kdsr.upscale import ObjectUpscaler, PixelBudget, Upscaler, compute_threads

SPECS = [
    EdsrSpec(scale=2, num_features=8, num_blocks=2),
    EspcnSpec(scale=3, num_features=8),
    FsrcnnSpec(scale=4, num_features=8),
    RepChainSpec(scale=4, num_features=8, num_layers=4),
    BicubicSpec(scale=4),
]


def picture(height, width, channels=3, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image(noise)


def random_net(spec, gain=1.0):
    torch.manual_seed(0)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            # Also those layers that begin at zero, or tiles could not be told from bicubic.
            parameter.copy_(torch.randn_like(parameter) * gain / max(1, parameter[0].numel()) ** 0.5)
    return model


def differences(found, expected):
    """Largest difference in grey levels, and share of values that differ."""
    levels = np.abs(found.astype(int) - expected)
    return levels.max(), (levels > 0).mean()


@pytest.fixture(scope="module")
def engine():
    return Engine(random_net(FsrcnnSpec(scale=2, num_features=8)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
@pytest.mark.parametrize("size", [(61, 77), (130, 40)])
def test_tiled_equals_untiled(spec, size):
    engine = Engine(random_net(spec))
    image = picture(*size)
    whole = Upscaler(engine, tile_size=1000).upscale(image).pixels
    tiled = Upscaler(engine, tile_size=24).upscale(image).pixels
    largest, share = differences(tiled, whole)
    assert largest <= 1
    assert share < 1e-4


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_tile_with_full_halo_equals_the_whole_in_floats(spec):
    from kdsr.tiles import plan

    model = random_net(spec).eval()
    lr = torch.rand(1, 3, 50, 70)
    with torch.inference_mode():
        whole = model(lr)
        for tile in plan(50, 70, tile_size=20, halo=model.receptive_radius):
            crop = model(lr[:, :, *tile.read.slices])
            core = crop[:, :, *tile.core.within(tile.read).scaled(spec.scale).slices]
            expected = whole[:, :, *tile.core.scaled(spec.scale).slices]
            assert torch.allclose(core, expected, atol=1e-5)


def test_a_halo_that_is_too_small_would_be_noticed():
    engine = Engine(random_net(FsrcnnSpec(scale=2, num_features=8)))
    image = picture(61, 77)
    whole = Upscaler(engine, tile_size=1000).upscale(image).pixels
    engine.receptive_radius = 0
    assert differences(Upscaler(engine, tile_size=24).upscale(image).pixels, whole)[0] > 1


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(7, 17), st.integers(1, 5))
def test_any_size_is_upscaled_whole(engine, height, width, tile_size, batch_size):
    image = picture(height, width)
    whole = Upscaler(engine, tile_size=1000).upscale(image).pixels
    tiled = Upscaler(engine, tile_size=tile_size, batch_size=batch_size).upscale(image).pixels
    assert tiled.shape == (2 * height, 2 * width, 3)
    assert differences(tiled, whole)[0] <= 1


def test_tiles_in_threads_equal_tiles_in_turn(engine):
    image = picture(150, 90)
    with compute_threads(3) as threads:
        in_threads = Upscaler(engine, tile_size=32, compute=threads).upscale(image).pixels
    assert differences(in_threads, Upscaler(engine, tile_size=32).upscale(image).pixels)[0] <= 1


# ---------------------------------------------------------------- channels


def test_a_grey_image_stays_grey(engine):
    grey = picture(30, 40, channels=1)
    found = Upscaler(engine).upscale(grey).pixels
    colour = Upscaler(engine).upscale(Image(grey.pixels.repeat(3, axis=2))).pixels
    assert found.shape == (60, 80, 1)
    assert (found == np.floor(colour.mean(axis=2, keepdims=True) + 0.5)).all()


def test_a_grey_network_upscales_grey_images_and_refuses_colours():
    upscaler = Upscaler(Engine(random_net(EspcnSpec(scale=2, channels=1, num_features=8))))
    assert upscaler.upscale(picture(30, 40, channels=1)).pixels.shape == (60, 80, 1)
    with pytest.raises(RequestError, match="grey"):
        upscaler.upscale(picture(30, 40))


def test_alpha_goes_through_the_same_network(engine):
    mask = picture(30, 40, channels=1, seed=1).pixels
    found = Upscaler(engine).upscale(replace(picture(30, 40), alpha=mask[:, :, 0])).alpha
    assert (found == Upscaler(engine).upscale(Image(mask)).pixels[:, :, 0]).all()


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_plain_alpha_stays_exactly_as_it_is(engine, level):
    image = replace(picture(30, 40), alpha=np.full((30, 40), level, dtype=np.uint8))
    alpha = Upscaler(engine).upscale(image).alpha
    assert alpha.shape == (60, 80)
    assert alpha.dtype == np.uint8
    assert (alpha == level).all()


def test_metadata_is_carried(engine):
    image = replace(picture(8, 8), icc_profile=b"profile", exif=b"exif")
    found = Upscaler(engine).upscale(image)
    assert (found.icc_profile, found.exif) == (b"profile", b"exif")


def test_sixteen_bits_are_refused_rather_than_cut(engine):
    with pytest.raises(ImageUnsupported, match="uint16"):
        Upscaler(engine).upscale(Image(np.zeros((8, 8, 3), dtype=np.uint16)))


class Windowed(SrModel):
    """Takes multiples of 8 only, and mixes all pixels of an 8 x 8 window, like windowed attention."""

    def __init__(self):
        super().__init__()
        self.spec = ImportedSpec(scale=2, architecture="windowed", multiple_of=8)

    @property
    def receptive_radius(self):
        return 8

    def forward(self, lr):
        batch, channels, height, width = lr.shape
        assert height % 8 == width % 8 == 0
        windows = lr.reshape(batch, channels, height // 8, 8, width // 8, 8)
        mixed = (windows + windows.mean(dim=(3, 5), keepdim=True)) / 2
        return torch.nn.functional.interpolate(mixed.reshape(lr.shape), scale_factor=2)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (64, 64), (61, 43)])
def test_a_network_with_windows_meets_them_where_it_would_in_the_whole_image(size):
    engine = Engine(Windowed())
    image = picture(*size)
    whole = Upscaler(engine, tile_size=1000).upscale(image).pixels
    tiled = Upscaler(engine, tile_size=13).upscale(image).pixels
    assert whole.shape == (2 * size[0], 2 * size[1], 3)
    assert differences(tiled, whole)[0] == 0


# ---------------------------------------------------------------- objects


@pytest.fixture
def objects(tmp_path, engine):
    (tmp_path / "in").mkdir()
    return ObjectUpscaler(
        source=open_store(str(tmp_path / "in")),
        target=open_store(str(tmp_path / "out")),
        upscaler=Upscaler(engine),
        max_pixels=100_000,
        quality=95,
        budget=PixelBudget(100_000),
    )


def encoded(format_, height=20, width=30, mode="RGB"):
    buffer = io.BytesIO()
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = picture(height, width, channels=3).pixels
    if channels == 4:
        pixels = np.dstack([pixels, pixels[..., :1]])
    PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format_)
    return buffer.getvalue()


def put(objects, key, data):
    info = objects.source.put(key, data)
    return Task("0" * 32, info.key, info.etag, info.size, target=key)


@pytest.mark.parametrize(
    ("format_", "mode"),
    [("JPEG", "L"), ("JPEG", "RGB"), *product(("PNG", "WEBP"), ("L", "RGB", "RGBA"))],
)
def test_an_object_keeps_format_and_kind(objects, format_, mode):
    key = f"a b/ü+%.{format_.lower()}"
    status = objects.upscale(put(objects, key, encoded(format_, mode=mode)))
    assert (status.status, status.error_class, status.message) == ("done", "", "")
    with PIL.Image.open(io.BytesIO(objects.target.get(key))) as found:
        assert (found.format, found.size) == (format_, (60, 40))
        assert found.mode == ("RGB" if (format_, mode) == ("WEBP", "L") else mode)
    assert status.megapixels == pytest.approx(60 * 40 / 1e6)
    info = objects.target.stat(key)
    assert (status.output_bytes, status.output_etag) == (info.size, info.etag)


def test_a_rotated_photograph_comes_out_upright(objects):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(20, 30).pixels).save(buffer, "JPEG", exif=exif)
    objects.upscale(put(objects, "r.jpg", buffer.getvalue()))
    with PIL.Image.open(io.BytesIO(objects.target.get("r.jpg"))) as found:
        assert found.size == (40, 60)
        assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("key", "data", "stage", "error_class"),
    [
        ("cut.jpg", encoded("JPEG", 200, 200)[:3000], "decode", "corrupt"),
        ("empty.png", b"", "decode", "corrupt"),
        ("notes.txt", b"hello", "decode", "unsupported"),
        ("moving.gif", encoded("GIF"), "decode", "unsupported"),
        ("large.png", encoded("PNG", 400, 400), "decode", "too_large"),
    ],
)
def test_what_cannot_be_upscaled_is_a_row_with_its_cause(objects, key, data, stage, error_class):
    status = objects.upscale(put(objects, key, data))
    assert (status.status, status.stage, status.error_class) == ("failed", stage, error_class)
    assert status.key == key
    assert status.message
    assert not objects.target.exists(key)


def test_an_object_that_went_away_is_a_row(objects):
    status = objects.upscale(Task("0" * 32, "gone.jpg", "etag", 10, "gone.jpg"))
    assert (status.status, status.stage, status.error_class) == ("failed", "download", "missing")


def test_an_object_larger_than_any_image_is_not_even_read(objects):
    status = objects.upscale(Task("0" * 32, "film.mp4", "etag", 10**12, "film.mp4"))
    assert (status.stage, status.error_class) == ("download", "too_large")


def test_a_failed_write_is_a_row(objects, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    status = objects.upscale(put(objects, "a.jpg", encoded("JPEG")))
    assert (status.status, status.stage, status.error_class) == ("failed", "upload", "store")


def test_a_programming_error_is_a_row_as_well(objects):
    broken = replace(objects, quality=object())
    status = broken.upscale(put(objects, "a.jpg", encoded("JPEG")))
    assert (status.status, status.stage, status.error_class) == ("failed", "encode", "internal")


# ---------------------------------------------------------------- budget


def test_images_together_never_hold_more_pixels_than_the_budget():
    budget, lock = PixelBudget(100), threading.Lock()
    held, most = 0, 0

    def use(pixels):
        nonlocal held, most
        with budget.take(pixels):
            with lock:
                held += pixels
                most = max(most, held)
            with lock:
                held -= pixels

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, [60, 30, 10, 90] * 50))
    assert 0 < most <= 100


def test_an_image_beyond_the_budget_is_let_in_alone():
    budget = PixelBudget(100)
    with budget.take(1000):
        pass
    with budget.take(100):
        pass
