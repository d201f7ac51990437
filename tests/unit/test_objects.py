import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import tifffile

from kdsr import codecs, windows
from kdsr import objects as objects_module
from kdsr.config import EncodeConfig, UpscaleConfig
from kdsr.engine import Engine
from kdsr.errors import ImageTooLarge
from kdsr.image import Frame, Image
from kdsr.manifest import Task
from kdsr.models import build_model
from kdsr.objects import ObjectUpscaler, PixelBudget, goal_of
from kdsr.spec import BicubicSpec
from kdsr.store import FileStore, open_store
from kdsr.upscale import Upscaler

CONFIG = UpscaleConfig(input="in", output="out", model="photo-x2", max_pixels=100_000, max_frames=20)


@pytest.fixture
def objects(tmp_path):
    (tmp_path / "in").mkdir()
    return ObjectUpscaler(
        open_store(str(tmp_path / "in")),
        open_store(str(tmp_path / "out")),
        Upscaler(Engine(build_model(BicubicSpec(scale=2))), batch_size=1),
        CONFIG,
        PixelBudget(100_000),
    )


def configured(objects, **options):
    return replace(objects, config=objects.config.model_copy(update=options))


def picture(height=20, width=30, channels=3, dtype=np.uint8):
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / (5 + c)) * np.cos(columns / (7 - c)) for c in range(channels)], axis=2)
    return ((waves * 0.4 + 0.5) * np.iinfo(dtype).max).astype(dtype)


def encoded(format_, height=20, width=30, mode="RGB"):
    buffer = io.BytesIO()
    pixels = picture(height, width, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    PIL.Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(buffer, format_)
    return buffer.getvalue()


def put(objects, key, data, target=None):
    info = objects.source.put(key, data)
    return Task("0" * 32, info.key, info.etag, info.size, target=target or key)


def result(objects, key):
    return codecs.decode(objects.target.get(key), max_pixels=10**8)


# ---------------------------------------------------------------- formats and depth


@pytest.mark.parametrize(
    ("format_", "mode"),
    [("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGBA")],
)
def test_an_object_keeps_format_and_kind(objects, format_, mode):
    key = f"a b/ü+%.{format_.lower()}"
    status = objects.upscale(put(objects, key, encoded(format_, mode=mode)))
    assert (status.status, status.error_class, status.message) == ("done", "", "")
    with PIL.Image.open(io.BytesIO(objects.target.get(key))) as found:
        assert (found.format, found.size, found.mode) == (format_, (60, 40), mode)
    assert status.megapixels == pytest.approx(60 * 40 / 1e6)
    info = objects.target.stat(key)
    assert (status.output_bytes, status.output_etag) == (info.size, info.etag)


def test_a_rotated_photograph_comes_out_upright(objects):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture(20, 30)).save(buffer, "JPEG", exif=exif)
    objects.upscale(put(objects, "r.jpg", buffer.getvalue()))
    with PIL.Image.open(io.BytesIO(objects.target.get("r.jpg"))) as found:
        assert found.size == (40, 60)
        assert found.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("format_", ["png", "tiff"])
def test_sixteen_bits_in_are_sixteen_bits_out(objects, format_):
    image = Image(picture(dtype=np.uint16))
    data = codecs.encode(image, format=format_, options=EncodeConfig())
    objects.upscale(put(objects, "deep", data))
    found = result(objects, "deep").pixels
    assert found.dtype == np.uint16
    assert (found == objects.upscaler.upscale(image).pixels).all()


def test_the_format_asked_for_is_written_under_the_key_of_the_task(objects):
    objects = configured(objects, format="webp")
    assert objects.upscale(put(objects, "a.png", encoded("PNG"), target="b.webp")).status == "done"
    assert codecs.identify(objects.target.get("b.webp")) == "webp"


# ---------------------------------------------------------------- frames


def animation(count=3):
    frames = []
    for number in range(count):
        pixels = np.full((20, 30, 3), 10 * number, np.uint8)
        frames.append(Frame(Image(pixels), seconds=0.1 * (number + 1)))
    return frames


def sequence(format_, count=3):
    return codecs.encode_frames(animation(count), format=format_, loop=0, options=EncodeConfig())


@pytest.mark.parametrize("format_", ["gif", "png", "webp", "tiff"])
def test_all_frames_are_upscaled(objects, format_):
    status = objects.upscale(put(objects, "a", sequence(format_)))
    assert (status.status, status.message) == ("done", "")
    found = list(codecs.decode_frames(objects.target.get("a"), max_pixels=10**6, max_frames=10))
    assert [frame.image.pixels.shape[:2] for frame in found] == [(40, 60)] * 3
    if format_ != "tiff":
        assert [frame.seconds for frame in found] == pytest.approx([0.1, 0.2, 0.3])
    assert status.megapixels == pytest.approx(3 * 40 * 60 / 1e6)


@pytest.mark.parametrize(("format_", "asked"), [("gif", "jpeg"), ("tiff", "webp")])
def test_where_frames_cannot_be_kept_the_first_is_taken(objects, format_, asked):
    objects = configured(objects, format=asked)
    status = objects.upscale(put(objects, "a", sequence(format_)))
    assert (status.status, status.message) == ("done", "")
    header = codecs.probe(objects.target.get("a"))
    assert (header.format, header.frames, header.height) == (asked, 1, 40)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"scale": 1.5}, (30, 45)), ({"width": 100}, (67, 100)), ({"megapixels": 0.0054}, (60, 90))],
)
def test_any_size_is_met(objects, options, expected):
    objects = configured(objects, **options)
    status = objects.upscale(put(objects, "a.png", encoded("PNG", mode="RGBA")))
    image = result(objects, "a.png")
    assert (image.height, image.width) == expected
    assert status.megapixels == pytest.approx(expected[0] * expected[1] / 1e6)


@pytest.mark.parametrize("format_", ["jpeg", "png", "gif"])
def test_a_file_is_made_small_enough(objects, format_):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = codecs.encode(Image(noise), format=format_, options=EncodeConfig())
    whole = objects.upscale(put(objects, "a", data)).output_bytes
    objects = configured(objects, max_bytes=whole // 3)
    status = objects.upscale(put(objects, "a", data))
    assert whole // 8 < status.output_bytes <= whole // 3
    image = result(objects, "a")
    assert image.height / image.width == pytest.approx(60 / 80, abs=0.03)


# ---------------------------------------------------------------- what is known from the header


def header(height, width, format_="jpeg", **options):
    return codecs.ImageHeader(format_, height, width, **options)


@pytest.mark.parametrize(("format_", "side"), [("jpeg", 40_000), ("webp", 10_000)])
def test_a_result_beyond_its_format_is_found_from_the_header(format_, side):
    config = CONFIG.model_copy(update={"max_pixels": 10**9})
    with pytest.raises(ImageTooLarge, match=f"{format_} holds at most"):
        goal_of(header(10, side, format_), config, net_scale=2)


@pytest.mark.parametrize("choice", ["tiff", "png"])
def test_a_result_beyond_its_format_takes_the_one_that_was_chosen(choice):
    encode = EncodeConfig(oversize=choice)
    config = CONFIG.model_copy(update={"max_pixels": 10**9, "encode": encode})
    assert goal_of(header(10, 40_000), config, net_scale=2).format == choice
    assert goal_of(header(10, 30_000), config, net_scale=2).format == "jpeg"


def test_the_budget_is_taken_for_the_largest_page_and_for_all_frames_of_an_avif(objects):
    def cost(format_, **options):
        found = header(10, 10, format_, **options)
        return objects._cost(found, goal_of(found, objects.config, net_scale=2))

    alike, mixed = (cost("tiff", frames=2, page_pixels=pixels) for pixels in ((100, 100), (100, 900)))
    assert mixed == 9 * alike
    assert cost("avif", frames=16) == 2 * cost("gif", frames=16)


def test_the_oversized_result_is_written_under_the_key_of_the_task(objects):
    objects = configured(objects, encode=EncodeConfig(oversize="png"), max_pixels=10**6)
    status = objects.upscale(put(objects, "wide.webp", encoded("WEBP", 2, 9000)))
    assert (status.status, status.message) == ("done", "")
    assert codecs.identify(objects.target.get("wide.webp")) == "png"


# ---------------------------------------------------------------- huge ones


@pytest.fixture
def windowed(monkeypatch):
    monkeypatch.setattr(windows, "IN_MEMORY_PIXELS", 1000)
    monkeypatch.setattr(windows, "TIFF_TILE", 64)


@pytest.mark.parametrize("format_", ["tiff", "png"])
@pytest.mark.parametrize("scale", [None, 1.3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_huge_image_is_the_same_in_windows(objects, windowed, monkeypatch, format_, scale, mode):
    objects = configured(objects, format=format_, scale=scale)
    data = encoded("TIFF", 300, 200, mode)
    objects.upscale(put(objects, "windows", data))
    monkeypatch.setattr(windows, "IN_MEMORY_PIXELS", 10**9)
    status = objects.upscale(put(objects, "whole", data))
    assert (status.status, status.message) == ("done", "")
    found, expected = result(objects, "windows"), result(objects, "whole")
    assert found.pixels.dtype == expected.pixels.dtype
    assert (found.pixels == expected.pixels).all()
    assert mode != "RGBA" or (found.alpha == expected.alpha).all()
    assert codecs.probe(objects.target.get("windows")).format == format_


def test_a_large_object_is_read_by_ranges_and_not_whole(objects, windowed, monkeypatch):
    monkeypatch.setattr(objects_module, "LARGE_OBJECT_BYTES", 1000)
    monkeypatch.setattr(objects_module, "RANGE_BYTES", 777)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, picture(100, 120), photometric="rgb", tile=(32, 32))
    task = put(objects, "a.tif", buffer.getvalue())
    monkeypatch.setattr(codecs, "decode", None)
    monkeypatch.setattr(codecs, "probe", None)
    status = objects.upscale(task)
    assert (status.status, status.message) == ("done", "")
    found = tifffile.imread(io.BytesIO(objects.target.get("a.tif")))
    assert (found == objects.upscaler.upscale(Image(picture(100, 120))).pixels).all()


def test_an_object_that_changes_while_it_is_read_is_a_row(objects, monkeypatch):
    monkeypatch.setattr(objects_module, "LARGE_OBJECT_BYTES", 10)
    task = put(objects, "a.png", encoded("PNG"))
    status = objects.upscale(replace(task, etag="another"))
    assert (status.status, status.stage, status.error_class) == ("failed", "download", "store")


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("key", "data", "stage", "error_class"),
    [
        ("cut.jpg", encoded("JPEG", 200, 200)[:3000], "decode", "corrupt"),
        ("empty.png", b"", "decode", "corrupt"),
        ("notes.txt", b"hello", "decode", "unsupported"),
        ("large.png", encoded("PNG", 400, 400), "decode", "too_large"),
    ],
)
def test_what_cannot_be_upscaled_is_a_row_with_its_cause(objects, key, data, stage, error_class):
    status = objects.upscale(put(objects, key, data))
    assert (status.status, status.stage, status.error_class) == ("failed", stage, error_class)
    assert status.key == key
    assert status.message
    assert not objects.target.exists(key)


def test_too_many_frames_are_a_row(objects):
    status = objects.upscale(put(objects, "long.gif", sequence("gif", 21)))
    assert (status.status, status.stage, status.error_class) == ("failed", "decode", "too_large")
    assert "max_frames 20" in status.message


def test_an_object_that_went_away_is_a_row(objects):
    status = objects.upscale(Task("0" * 32, "gone.jpg", "etag", 10, "gone.jpg"))
    assert (status.status, status.stage, status.error_class) == ("failed", "download", "store")


def test_an_object_larger_than_any_image_is_not_even_read(objects):
    status = objects.upscale(Task("0" * 32, "film.mp4", "etag", 10**12, "film.mp4"))
    assert (status.stage, status.error_class) == ("download", "too_large")


def test_a_failed_write_is_a_row(objects, tmp_path):
    (tmp_path / "out").write_text("a file where a folder should be")
    status = objects.upscale(put(objects, "a.jpg", encoded("JPEG")))
    assert (status.status, status.stage, status.error_class) == ("failed", "upload", "store")


@pytest.mark.parametrize(
    ("error", "stage", "error_class"),
    [(ZeroDivisionError(), "upscale", "internal"), (MemoryError(), "upscale", "too_large")],
)
def test_an_error_in_the_engine_is_a_row_as_well(objects, error, stage, error_class):
    def run(tiles, **_):
        raise error

    objects.upscaler.engine.run = run
    status = objects.upscale(put(objects, "a.jpg", encoded("JPEG")))
    assert (status.status, status.stage, status.error_class) == ("failed", stage, error_class)


# ---------------------------------------------------------------- time


class ManualClock:
    """A clock that stands still but for what is told to take a while."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def lasting(self, seconds, work):
        """`work` that takes so long."""

        def worked(*arguments, **options):
            self.now += seconds
            return work(*arguments, **options)

        return worked


def test_every_second_is_booked_to_the_stage_that_took_it(objects, monkeypatch):
    task, clock, frames = put(objects, "a", sequence("gif")), ManualClock(), codecs.decode_frames

    def slow_frames(*arguments, **options):
        for frame in frames(*arguments, **options):
            clock.now += 10
            yield frame

    monkeypatch.setattr("kdsr.encoded.time", clock)
    monkeypatch.setattr(FileStore, "get", clock.lasting(1, FileStore.get))
    monkeypatch.setattr(FileStore, "put", clock.lasting(10_000, FileStore.put))
    monkeypatch.setattr(codecs, "decode_frames", slow_frames)
    monkeypatch.setattr(codecs, "encode_frames", clock.lasting(1000, codecs.encode_frames))
    monkeypatch.setattr(Upscaler, "upscale", clock.lasting(100, Upscaler.upscale))
    status = objects.upscale(task)
    parts = (status.download_seconds, status.decode_seconds, status.net_seconds)
    assert parts == (1, 3 * 10, 3 * 100)
    assert (status.encode_seconds, status.upload_seconds, status.wait_seconds) == (1000, 10_000, 0)
    assert status.seconds == 11_331


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
