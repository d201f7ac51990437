import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr import upscale
from kdsr.engine import Engine
from kdsr.errors import Abandoned, DataError, ImageUnsupported, RequestError
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.models.contract import SrModel
from kdsr.spec import (
    BicubicSpec,
    DamSpec,
    EdsrSpec,
    EspcnSpec,
    FsrcnnSpec,
    ImportedSpec,
    MobileSpec,
    MultiScaleSpec,
    RepChainSpec,
    RrdbnetSpec,
    ShuffleSpec,
    SrresnetSpec,
    SwinLightSpec,
    UnetSpec,
)
from kdsr.turns import Claim
from kdsr.upscale import (
    BLEED_LEVELS,
    BYTES_PER_OUTPUT_PIXEL,
    ComputeThreads,
    Upscaler,
    available_bytes,
    bleed,
    fitting,
)
from tests.waiting import wait_for

SPECS = [
    EdsrSpec(scale=2, num_features=8, num_blocks=2),
    EspcnSpec(scale=3, num_features=8),
    FsrcnnSpec(scale=4, num_features=8),
    RepChainSpec(scale=4, num_features=8, num_layers=4),
    MobileSpec(scale=3, num_features=8, num_blocks=2),
    ShuffleSpec(scale=2, num_features=8, num_blocks=3),
    MultiScaleSpec(scale=4, num_features=8, num_blocks=2),
    DamSpec(scale=3, num_features=8, num_blocks=2),
    SrresnetSpec(scale=4, num_features=8, num_blocks=2),
    RrdbnetSpec(scale=3, num_features=8, num_growth=4, num_blocks=1),
    RrdbnetSpec(scale=2, num_features=8, num_growth=4, num_blocks=1, unshuffle=True),
    UnetSpec(scale=3, num_features=4, num_levels=2),
    SwinLightSpec(scale=2, num_features=8, num_heads=2, num_groups=1, num_blocks=2, window_size=4),
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
    assert share < 1e-3


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_a_tile_with_full_halo_equals_the_whole_in_floats(spec):
    from kdsr.tiles import plan

    model = random_net(spec).eval()
    lr = torch.rand(1, 3, 50, 70)
    with torch.inference_mode():
        whole = model(lr)
        grid = getattr(spec, "multiple_of", 1)
        for tile in plan(50, 70, tile_size=20, halo=model.receptive_radius, multiple_of=grid):
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
    with ComputeThreads(3) as threads:
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
    # Many means lie halfway between two levels, and a window adds up in another order in another tile.
    assert differences(tiled, whole)[0] <= 1


# ---------------------------------------------------------------- depth

BICUBIC = BicubicSpec(scale=2)


def ramp(dtype, low, high):
    """(20, 300, 3) from `low` to `high` of `dtype`, so fine that 8 bits would show steps."""
    values = np.linspace(low, high, 300).astype(dtype)
    return Image(np.broadcast_to(values[None, :, None], (20, 300, 3)).copy())


def test_sixteen_bits_go_through_without_a_step_of_eight():
    found = Upscaler(Engine(build_model(BICUBIC)), tile_size=64).upscale(ramp(np.uint16, 1000, 1600)).pixels
    assert found.dtype == np.uint16
    assert len(np.unique(found[20])) > 450
    steps = np.diff(found[20, 10:-10, 0].astype(int))
    assert steps.min() >= 0 and steps.max() <= 3


def test_floats_within_0_and_1_go_through_as_they_are():
    found = Upscaler(Engine(build_model(BICUBIC))).upscale(ramp(np.float32, 0.25, 0.26)).pixels
    assert found.dtype == np.float32
    assert 0.2499 < found.min() < 0.2501
    assert 0.2599 < found.max() < 0.2601


@pytest.mark.parametrize(("low", "high"), [(-3.0, 40.0), (0.5, 1e4), (-1e-3, 0.5)])
def test_floats_of_any_range_keep_it(engine, low, high):
    image = ramp(np.float32, low, high)
    unit = Upscaler(Engine(build_model(BICUBIC)), tile_size=64)
    found = unit.upscale(image).pixels[20, :, 0]
    expected = np.interp((np.arange(600) + 0.5) / 2 - 0.5, np.arange(300), image.pixels[0, :, 0])
    assert np.abs(found - expected)[4:-4].max() < 2e-6 * (high - low) + 1e-6


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(engine, wrong):
    image = ramp(np.float32, 0, 1)
    image.pixels[3, 4, 1] = wrong
    with pytest.raises(ImageUnsupported, match="not finite"):
        Upscaler(engine).upscale(image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_grey_image_of_any_depth_is_the_mean_of_three_channels(engine, dtype):
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    grey = Image((picture(30, 40, channels=1).pixels.astype(np.float32) / 255 * white).astype(dtype))
    found = Upscaler(engine).upscale(grey).pixels
    colour = Upscaler(engine).upscale(Image(grey.pixels.repeat(3, axis=2))).pixels
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype == np.float32 else 0.5001
    assert np.abs(found.astype(float) - colour.astype(float).mean(axis=2, keepdims=True)).max() <= tolerance


# ---------------------------------------------------------------- transparency


def disc(side=120, radius=40, hidden=0):
    """An orange disc with a soft edge; what is fully transparent has the grey level `hidden`."""
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot(rows - side / 2 + 0.5, columns - side / 2 + 0.5)
    alpha = (np.clip((radius - distance) / 3 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    pixels = np.full((side, side, 3), (240, 140, 30), np.uint8)
    pixels[alpha == 0] = hidden
    return Image(pixels, alpha=alpha)


@pytest.mark.parametrize("hidden", [0, 255])
@pytest.mark.parametrize("background", [0, 255])
def test_a_soft_edge_has_no_fringe_over_black_or_white(hidden, background):
    upscaler = Upscaler(Engine(build_model(BicubicSpec(scale=4))))
    found = upscaler.upscale(disc(hidden=hidden))
    weight = found.alpha[:, :, None] / 255
    over = found.pixels * weight + background * (1 - weight)
    # Without a fringe every pixel lies between the disc's colour and the background.
    expected = np.array([240, 140, 30]) * weight + background * (1 - weight)
    assert np.abs(over - expected).max() < 1


def test_the_fringe_is_there_when_nothing_bleeds(monkeypatch):
    monkeypatch.setattr("kdsr.upscale.bleed", lambda pixels, alpha: pixels)
    upscaler = Upscaler(Engine(build_model(BicubicSpec(scale=4))))
    found = upscaler.upscale(disc(hidden=0))
    weight = found.alpha[:, :, None] / 255
    assert np.abs((found.pixels - np.array([240, 140, 30])) * weight).max() > 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (130, 61)])
def test_bleeding_leaves_visible_pixels_exactly_as_they_are(dtype, size):
    random = np.random.default_rng(1)
    pixels = (random.random((*size, 3)) * (1 if dtype == np.float32 else 255)).astype(dtype)
    alpha = (random.random(size) > 0.7).astype(dtype)
    before = pixels.copy()
    bled = bleed(pixels, alpha)
    assert (bled[alpha > 0] == before[alpha > 0]).all()
    assert (pixels == before).all()
    assert bled.dtype == dtype


def test_colours_bleed_into_everything_hidden_within_reach():
    pixels, alpha = np.zeros((200, 300, 3), np.uint8), np.zeros((200, 300), np.uint8)
    pixels[100, 150], alpha[100, 150] = 77, 255
    bled = bleed(pixels, alpha)
    reach = 2 ** (BLEED_LEVELS - 1)
    assert (bled[100 - reach : 101 + reach, 150 - reach : 151 + reach] == 77).all()


def test_a_hidden_pixel_takes_the_colours_beside_it_not_those_far_away():
    pixels, alpha = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), 255, np.uint8)
    pixels[:, :30], pixels[:, 34:] = 50, 200
    alpha[:, 30:34] = 0
    assert (bleed(pixels, alpha)[:, [30, 33]] == np.array([50, 200])[None, :, None]).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_opaque_or_transparent_around_stays_exactly_so(engine, dtype):
    white = dtype(1) if dtype == np.float32 else np.iinfo(dtype).max
    image = disc()
    alpha = (image.alpha.astype(np.float32) / 255 * white).astype(dtype)
    found = Upscaler(engine, tile_size=40).upscale(Image(image.pixels.astype(dtype), alpha=alpha)).alpha
    assert (found[100:140, 100:140] == white).all()
    assert (found[:20] == 0).all()
    assert found.min() >= 0 and found.max() <= white


# ---------------------------------------------------------------- many images, little memory


def test_tiles_of_many_images_share_batches_and_give_the_same_bytes(engine):
    images = [picture(24, 24, seed=seed) for seed in range(40)]
    alone = [Upscaler(engine, batch_size=1).upscale(image).pixels for image in images]
    with ComputeThreads(2) as compute, ThreadPoolExecutor(8) as threads:
        upscaler = Upscaler(engine, compute=compute)
        together = list(threads.map(upscaler.upscale, images))
    for found, expected in zip(together, alone, strict=True):
        assert differences(found.pixels, expected)[0] <= 1


class Faulty(Engine):
    """An engine with room for so many pixels, and that fails for tiles with a marked pixel."""

    room = 10**9
    mark = None

    def run(self, tiles, **options):
        if tiles.shape[0] * tiles.shape[1] * tiles.shape[2] > self.room:
            raise torch.OutOfMemoryError("no room")
        if self.mark is not None and (tiles == self.mark).all(axis=(1, 2, 3)).any():
            raise DataError("not finite")
        return super().run(tiles, **options)


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("room", [8000, 3000, 1200])
def test_less_memory_gives_the_same_image(room, multiple_of):
    engine = Faulty(random_net(FsrcnnSpec(scale=2, num_features=8)))
    engine.multiple_of = multiple_of
    expected = Upscaler(engine, tile_size=64).upscale(picture(150, 170)).pixels
    engine.room = room
    upscaler = Upscaler(engine, tile_size=64)
    assert differences(upscaler.upscale(picture(150, 170)).pixels, expected)[0] <= 1


def test_what_was_learnt_about_memory_is_remembered():
    engine = Faulty(random_net(FsrcnnSpec(scale=2, num_features=8)))
    engine.room = 3000
    upscaler = Upscaler(engine, tile_size=64)
    upscaler.upscale(picture(150, 170))
    refused = []
    engine.run = lambda tiles, run=engine.run, **_: (
        refused.append(tiles.shape)
        if (tiles.shape[0] * tiles.shape[1] * tiles.shape[2] > engine.room)
        else run(tiles)
    )
    upscaler.upscale(picture(150, 170))
    assert refused == []


@pytest.mark.parametrize(
    ("room_in_tiles", "expected"),
    [(100, (128, 4)), (4, (128, 4)), (3, (128, 2)), (1, (128, 1)), (0.9, (64, 1)), (0, (16, 1))],
)
def test_batch_and_then_tile_are_smaller_where_memory_is_short(engine, room_in_tiles, expected):
    tile_bytes = ((128 + 2 * engine.receptive_radius) * engine.scale) ** 2 * BYTES_PER_OUTPUT_PIXEL
    memory_bytes = 4 * int(room_in_tiles * tile_bytes)
    assert fitting(128, 4, engine=engine, memory_bytes=memory_bytes) == expected


def test_where_memory_is_not_known_nothing_is_made_smaller(engine):
    assert fitting(128, 4, engine=engine, memory_bytes=None) == (128, 4)


def test_the_memory_of_this_machine_is_plausible():
    found = available_bytes()
    assert found is None or 2**20 < found < 2**50


@pytest.mark.skipif(available_bytes() is None, reason="Linux alone tells how much memory is free")
def test_what_a_container_keeps_of_files_is_no_memory_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(upscale, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text("anon 290\ninactive_file 400\nactive_file 300\n")
    assert available_bytes() == 710
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 2**20


def test_no_room_for_the_smallest_tile_is_an_error():
    engine = Faulty(random_net(FsrcnnSpec(scale=2, num_features=8)))
    engine.room = 10
    with pytest.raises(torch.OutOfMemoryError):
        Upscaler(engine).upscale(picture(20, 20))


def test_one_bad_image_does_not_fail_its_neighbours():
    engine = Faulty(random_net(FsrcnnSpec(scale=2, num_features=8)))
    engine.mark = 13
    bad = Image(np.full((24, 24, 3), 13, np.uint8))

    def outcome(image):
        try:
            return upscaler.upscale(image).pixels.shape
        except DataError:
            return "failed"

    images = [bad if number == 11 else picture(24, 24, seed=number) for number in range(30)]
    with ComputeThreads(1) as compute, ThreadPoolExecutor(30) as threads:
        upscaler = Upscaler(engine, compute=compute)
        found = list(threads.map(outcome, images))
    assert found == ["failed" if number == 11 else (48, 48, 3) for number in range(30)]


# ---------------------------------------------------------------- turns


class Counting(Engine):
    """Counts tiles, and lets each wait until it may go on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen, self.gate = [], threading.Semaphore(0)

    def run(self, tiles, **options):
        self.gate.acquire(timeout=60)
        self.seen.append(tiles.shape[1])
        return super().run(tiles, **options)


@pytest.fixture
def slow():
    engine = Counting(random_net(FsrcnnSpec(scale=2, num_features=8)))
    with ComputeThreads(1) as compute, ThreadPoolExecutor(4) as threads:
        yield engine, Upscaler(engine, tile_size=32, compute=compute), threads
        engine.gate.release(1000)


def test_a_small_image_passes_a_huge_one_and_both_are_as_when_alone(slow):
    engine, upscaler, threads = slow
    huge, small = picture(320, 320, seed=1), picture(20, 20, seed=2)
    first = threads.submit(upscaler.upscale, huge, Claim())
    wait_for(lambda: len(upscaler._compute.turns) == 99)
    second = threads.submit(upscaler.upscale, small, Claim())
    wait_for(lambda: len(upscaler._compute.turns) == 100)
    engine.gate.release(3)
    assert second.result(60).pixels.shape == (40, 40, 3)
    assert len(engine.seen) <= 3
    engine.gate.release(1000)
    assert first.result(60).pixels.shape == (640, 640, 3)


@pytest.mark.parametrize("ending", ["withdrawn", "past its deadline"])
def test_an_image_that_nobody_waits_for_costs_no_more_tiles(slow, ending):
    engine, upscaler, threads = slow
    claim = Claim()
    image = threads.submit(upscaler.upscale, picture(320, 320, seed=1), claim)
    wait_for(lambda: len(upscaler._compute.turns) == 99)
    if ending == "withdrawn":
        claim.withdraw()
    else:
        claim.deadline = time.monotonic()
    engine.gate.release(1000)
    with pytest.raises(Abandoned):
        image.result(60)
    assert len(engine.seen) == 1


def test_upscalers_that_share_threads_take_turns_too(slow):
    engine, upscaler, threads = slow
    other = Upscaler(engine, tile_size=32, compute=upscaler._compute)
    first = threads.submit(upscaler.upscale, picture(320, 320, seed=1), Claim())
    wait_for(lambda: len(upscaler._compute.turns) == 99)
    second = threads.submit(other.upscale, picture(20, 20, seed=2), Claim())
    wait_for(lambda: len(upscaler._compute.turns) == 100)
    engine.gate.release(3)
    second.result(60)
    assert not first.done()


def test_a_claim_knows_what_its_tiles_took(engine):
    claim = Claim()
    Upscaler(engine, tile_size=16).upscale(picture(40, 40, seed=1), claim)
    assert claim.seconds > 0 and claim.largest_batch == 1 and claim.began is not None


def test_small_images_of_several_callers_share_the_threads_and_not_one_batch(slow):
    engine, upscaler, threads = slow
    claims = [Claim() for _ in range(4)]
    images = [
        threads.submit(upscaler.upscale, picture(20, 20, seed=seed), claim)
        for seed, claim in enumerate(claims)
    ]
    wait_for(lambda: len(upscaler._compute.turns) == 3)
    engine.gate.release(1000)
    for image in images:
        image.result(60)
    assert {claim.largest_batch for claim in claims} == {1}


def test_a_small_image_passes_between_strips_of_a_large_tile_and_changes_no_byte(monkeypatch):
    engine = Engine(random_net(RepChainSpec(scale=2, num_features=8, num_layers=4)))
    monkeypatch.setattr("kdsr.engine.CACHED_PIXELS", 64 * 64)
    large, small = picture(256, 256, seed=1), picture(20, 20, seed=2)
    with ComputeThreads(1) as compute:
        expected = [Upscaler(engine, compute=compute).upscale(image).pixels for image in (large, small)]
    began, order, strips = threading.Event(), [], type(engine._exact).strips

    def told_strips(network, lr, offset):
        is_large = lr.shape[3] > 200
        if is_large:
            began.set()
            wait_for(lambda: len(compute.turns) or len(order) > 1)
        for strip in strips(network, lr, offset):
            order.append("strip of the large" if is_large else "small")
            yield strip

    monkeypatch.setattr(type(engine._exact), "strips", told_strips)
    with ComputeThreads(1) as compute, ThreadPoolExecutor(2) as threads:
        upscaler = Upscaler(engine, compute=compute)
        first = threads.submit(upscaler.upscale, large, Claim())
        began.wait(60)
        second = threads.submit(upscaler.upscale, small, Claim())
        found = [image.result(60).pixels for image in (first, second)]
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))
    assert order.index("small") == 1
    assert order.count("strip of the large") > 10


# ---------------------------------------------------------------- cores


class Threaded(Engine):
    """Notes the threads that torch has: when a tile begins, and when another one has come meanwhile."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.began, self.later, self.gate = [], [], threading.Semaphore(0)

    def run(self, tiles, *, pause=None):
        self.began.append(torch.get_num_threads())
        self.gate.acquire(timeout=60)
        pause()
        self.later.append(torch.get_num_threads())
        return super().run(tiles)


@pytest.mark.parametrize(("splits", "alone"), [(True, 4), (False, 1)])
def test_a_tile_has_the_cores_that_no_other_needs_and_leaves_them_to_the_next(splits, alone):
    engine = Threaded(random_net(FsrcnnSpec(scale=2, num_features=8)))
    with ComputeThreads(4, splits_lone_tiles=splits) as compute, ThreadPoolExecutor(2) as threads:
        upscaler = Upscaler(engine, compute=compute)
        images = []
        for number in range(2):
            images.append(threads.submit(upscaler.upscale, picture(20, 20, seed=number), Claim()))
            wait_for(lambda: len(engine.began) == len(images))
        engine.gate.release(2)
        assert all(image.result(60).pixels.shape == (40, 40, 3) for image in images)
    assert engine.began == [alone, max(1, alone // 2)]
    assert max(engine.later[0], engine.began[1]) == max(1, alone // 2)


def test_more_tiles_than_cores_have_one_each():
    engine = Threaded(random_net(FsrcnnSpec(scale=2, num_features=8)))
    engine.gate.release(1000)
    with ComputeThreads(2, splits_lone_tiles=True) as compute:
        Upscaler(engine, tile_size=32, compute=compute).upscale(picture(96, 96, seed=0))
    assert engine.began[:7] == [1] * 7
