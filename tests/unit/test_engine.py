import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from kdsr.engine import Engine, choose_precision
from kdsr.engine_cuda import pixels_of
from kdsr.errors import DataError, RequestError
from kdsr.models import build_model
from kdsr.models.contract import SrModel
from kdsr.spec import BicubicSpec, EspcnSpec, FsrcnnSpec, RepChainSpec


class Constant(SrModel):
    """Whatever goes in, `value` comes out."""

    def __init__(self, value, *, found_scale=2):
        super().__init__()
        self.spec, self.found_scale = EspcnSpec(scale=2), found_scale
        self.value = torch.nn.Parameter(torch.tensor(float(value)))

    @property
    def receptive_radius(self):
        return 0

    def forward(self, lr):
        return self.value.expand(
            lr.shape[0], lr.shape[1], lr.shape[2] * self.found_scale, lr.shape[3] * self.found_scale
        )


class FailsAtHeight(Constant):
    """Grey, but `value` for inputs of one height in some number types."""

    def __init__(self, height, value, *, in_types):
        super().__init__(0.5)
        self.height, self.bad, self.in_types = height, value, in_types

    def forward(self, lr):
        fails = lr.shape[2] == self.height and lr.dtype in self.in_types
        return super().forward(lr) + (self.bad if fails else 0)


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)


def random_net(spec):
    torch.manual_seed(0)
    return build_model(spec)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_engine_equals_the_plain_forward_pass(tiles, scale, channels_last):
    model = random_net(FsrcnnSpec(scale=scale, num_features=8)).eval()
    with torch.inference_mode():
        unit = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        expected = model(unit).mul(255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = Engine(model, channels_last=channels_last).run(tiles)
    assert found.dtype == np.uint8
    assert found.shape == (3, 20 * scale, 24 * scale, 3)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def test_a_tile_gives_the_same_alone_as_in_a_batch(tiles):
    engine = Engine(random_net(EspcnSpec(scale=2, num_features=8)))
    together = engine.run(tiles)
    for index in range(3):
        alone = engine.run(tiles[index : index + 1])[0]
        assert np.abs(alone.astype(int) - together[index]).max() <= 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-3.0, 0), (0.4999 / 255, 0), (0.5001 / 255, 1), (254.5001 / 255, 255), (7.0, 255)],
)
def test_values_are_rounded_to_the_nearest_and_clamped(tiles, value, expected):
    assert (Engine(Constant(value)).run(tiles) == expected).all()


def test_every_level_survives_the_way_in_and_out(tiles):
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    flat = levels.reshape(256, 1, 1, 3).repeat(8, axis=1).repeat(8, axis=2)
    found = Engine(build_model(BicubicSpec(scale=2))).run(flat)
    assert (found == flat[:, :1, :1]).all()


def test_bfloat16_is_close_to_float32(tiles):
    model = random_net(FsrcnnSpec(scale=2, num_features=8))
    exact, short = Engine(model).run(tiles), Engine(model, precision="bfloat16").run(tiles)
    assert np.abs(exact.astype(int) - short).max() <= 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_output_that_is_not_finite_is_an_error_and_not_a_tile(tiles, value):
    with pytest.raises(DataError, match="not finite"):
        Engine(Constant(value))
    engine = Engine(FailsAtHeight(20, value, in_types=[torch.float32]))
    with pytest.raises(DataError, match="not finite"):
        engine.run(tiles)
    assert (engine.run(tiles[:, :18]) == 128).all()


def test_a_grey_network_takes_one_channel(tiles):
    engine = Engine(random_net(EspcnSpec(scale=2, channels=1, num_features=8)))
    assert engine.channels == 1
    assert engine.run(tiles[..., :1]).shape == (3, 40, 48, 1)
    with pytest.raises(RequestError, match=r"tiles \(N, h, w, 1\)"):
        engine.run(tiles)


def test_other_types_are_refused(tiles):
    with pytest.raises(RequestError, match="found float64"):
        Engine(Constant(0.5)).run(tiles.astype(np.float64))


def test_a_network_that_does_not_keep_its_scale_is_refused():
    with pytest.raises(RequestError, match="scale 2"):
        Engine(Constant(0.5, found_scale=3))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(RequestError, match="device 'no-such-device'"):
        Engine(Constant(0.5), device="no-such-device")


def test_the_given_model_is_left_as_it_is():
    model = random_net(EspcnSpec(scale=2, num_features=8)).train()
    Engine(model, precision="bfloat16")
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


class OverflowsIn16Bits(Constant):
    """Right in float32, infinite in a narrower type."""

    def forward(self, lr):
        sr = super().forward(lr)
        return sr if lr.dtype == torch.float32 else sr / 0


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deeper_tiles_never_pass_8_bits(dtype):
    white = 65535 if dtype == np.uint16 else 1
    tiles = (np.random.default_rng(0).random((1, 20, 24, 3)) * white).astype(dtype)
    model = random_net(FsrcnnSpec(scale=2, num_features=8)).eval()
    with torch.inference_mode():
        unit = torch.from_numpy(tiles.astype(np.float32)).permute(0, 3, 1, 2) / white
        expected = model(unit).permute(0, 2, 3, 1).numpy() * white
    found = Engine(model, precision="bfloat16").run(tiles)
    assert found.dtype == dtype
    if dtype == np.uint16:
        expected = expected.clip(0, white)
    assert np.abs(found.astype(np.float64) - expected).max() <= (1 if dtype == np.uint16 else 1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rounding_before_the_shuffle_changes_no_picture(tiles, scale, precision):
    model = random_net(RepChainSpec(scale=scale, num_features=16, num_layers=4)).eval()
    torch.nn.init.normal_(model.layers[-1].kernel, std=0.05)
    with torch.inference_mode():
        unit = torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255
        expected = model(unit).mul(255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = Engine(model, precision=precision).run(tiles).astype(int)
    assert np.abs(found - expected).max() <= (1 if precision == "float32" else 4)


def test_a_type_that_overflows_is_replaced_and_said():
    engine = Engine(OverflowsIn16Bits(0.5), precision="bfloat16")
    assert engine.precision == "float32"
    assert "not finite" in engine.note


def test_a_type_that_changes_the_picture_is_replaced_and_said():
    model = random_net(FsrcnnSpec(scale=2, num_features=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    engine = Engine(model, precision="bfloat16")
    assert engine.precision == "float32"
    assert "grey levels" in engine.note


def test_a_tile_that_is_not_finite_is_done_again_in_float32(tiles):
    engine = Engine(FailsAtHeight(20, float("nan"), in_types=[torch.bfloat16]), precision="bfloat16")
    assert engine.precision == "bfloat16"
    assert (engine.run(tiles) == 128).all()


def test_a_tile_that_fails_in_float32_too_is_an_error(tiles):
    fails = FailsAtHeight(20, float("nan"), in_types=[torch.bfloat16, torch.float32])
    engine = Engine(fails, precision="bfloat16")
    with pytest.raises(DataError, match="in float32 too"):
        engine.run(tiles)


def test_auto_names_a_type_that_runs():
    engine = Engine(random_net(EspcnSpec(scale=2, num_features=8)), precision="auto")
    assert engine.precision in ("float32", "bfloat16")
    assert engine.note is None or engine.precision == "float32"


def trained_like(scale, *, channels=3):
    """A chain whose tail adds something to the residual, as after training."""
    model = random_net(RepChainSpec(scale=scale, channels=channels, num_features=16, num_layers=4)).eval()
    with torch.no_grad():
        model.layers[-1].kernel.normal_(std=0.05)
        model.layers[-1].bias.normal_(std=0.05)
    return model


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_chain_before_its_shuffle_is_the_chain(scale, channels):
    model = trained_like(scale, channels=channels)
    levels = torch.randint(0, 256, (2, channels, 21, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(levels / 255) * 255
        blocks = model.before_shuffle(torch.float32, torch.channels_last)(levels.byte(), 0.25)
    found = blocks.permute(0, 1, 3, 2, 4).reshape(2, 21 * scale, 17 * scale, channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(found - 0.25, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 5, 7, 20, 21, 40])
def test_strips_of_a_chain_join_to_the_whole(rows):
    chain = trained_like(2).before_shuffle(torch.float32, torch.channels_last)
    levels = torch.randint(0, 256, (1, 3, 21, 17), generator=torch.Generator().manual_seed(0)).byte()
    with torch.inference_mode():
        whole = chain(levels, 0.5)
        strips = list(chain.strips(levels, 0.5, rows=rows))
    assert [top for top, _ in strips] == [0, *np.cumsum([part.shape[1] for _, part in strips])[:-1]]
    torch.testing.assert_close(torch.cat([part for _, part in strips], dim=1), whole, rtol=0, atol=1e-3)


def test_a_tile_larger_than_the_cache_equals_the_plain_forward_pass():
    model = trained_like(2)
    tiles = np.random.default_rng(0).integers(0, 256, (1, 300, 180, 3), dtype=np.uint8)
    with torch.inference_mode():
        sr = model(torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255)
    expected = sr.mul(255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    found = Engine(model).run(tiles)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3


def test_a_tile_has_the_same_bytes_in_any_batch(tiles):
    engine = Engine(trained_like(3), precision="bfloat16")
    together = engine.run(tiles)
    assert all((engine.run(tiles[i : i + 1])[0] == together[i]).all() for i in range(3))


def test_threads_that_share_an_engine_get_their_own_pictures():
    engine = Engine(trained_like(2), precision="bfloat16")
    batches = np.random.default_rng(0).integers(0, 256, (24, 1, 40, 40, 3), dtype=np.uint8)

    def in_threads(number):
        with ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            return list(threads.map(engine.run, batches))

    found, expected = in_threads(4), in_threads(1)
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_read_only_and_strided_tiles_are_taken(tiles):
    engine = Engine(trained_like(2))
    flipped = tiles[:, ::-1]
    flipped.flags.writeable = False
    assert (engine.run(flipped) == engine.run(flipped.copy())).all()


def test_a_dark_16_bit_tile_keeps_its_steps():
    """Steps of a 256th of a grey level, which 8 bits would make one flat area."""
    tiles = np.arange(64, dtype=np.uint16).repeat(8).reshape(1, 1, 512, 1).repeat(8, axis=1).repeat(3, axis=3)
    found = Engine(build_model(RepChainSpec(scale=2, num_features=4, num_layers=2))).run(tiles)
    assert len(np.unique(found)) >= 64


def test_the_choice_is_a_type_that_runs_and_the_engine_says_why_not():
    assert choose_precision(trained_like(2)) in ("float32", "bfloat16")
    # The probe reduces its photograph, 192 pixels high, by the network's scale of 2.
    engine = Engine(FailsAtHeight(96, float("inf"), in_types=[torch.bfloat16]), precision="auto")
    assert engine.precision == "float32"
    assert "bfloat16 gives values that are not finite" in str(engine.note)


def test_levels_become_pixels_on_the_device_as_they_do_here(tiles):
    model = trained_like(2)
    blocks = model.before_shuffle(torch.float32, torch.channels_last)
    with torch.inference_mode():
        levels = blocks(torch.from_numpy(tiles).permute(0, 3, 1, 2), 0.5)
        levels[1, 0, 0, 0, 0] = float("nan")
        pixels, finite = pixels_of(levels)
    assert finite.tolist() == [True, False, True]
    found = Engine(model).run(tiles)
    # A batch may add up in another order than its tiles, which turns what is halfway between two levels.
    apart = np.abs(pixels.numpy()[[0, 2]].astype(int) - found[[0, 2]])
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


class ThreadsShow(Constant):
    """As grey as torch has threads."""

    def forward(self, lr):
        return super().forward(lr) * torch.get_num_threads() / 8


def test_an_engine_tells_whether_its_bytes_depend_on_the_number_of_cores():
    before = torch.get_num_threads()
    assert Engine(Constant(0.5)).same_on_many_cores(2)
    assert not Engine(ThreadsShow(0.5)).same_on_many_cores(2)
    assert torch.get_num_threads() == before


MANY_SIZES = """
import sys
import torch
from kdsr.engine import expect_any_size

if sys.argv[1] == "any":
    expect_any_size()
layer = torch.nn.Conv2d(48, 48, 3, padding=1)
with torch.inference_mode():
    for _ in range(2):
        for side in range(40, 140):
            layer(torch.zeros(1, 48, 16, side))
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize(("expected", "made"), [("one", 100), ("any", 200)])
def test_layers_made_for_a_hundred_sizes_are_kept_only_where_one_size_is_expected(expected, made):
    """Seen in oneDNN's own log; what they take of the memory differs from processor to processor."""
    command = [sys.executable, "-c", MANY_SIZES, expected]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    environment["ONEDNN_VERBOSE"] = "profile_create"
    log = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert log.count("create:cache_miss,cpu,convolution") == made


HOLES = """
import os
import numpy as np
from kdsr.engine import give_back_memory, keep_freed_memory

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

keep_freed_memory()
blocks = [np.ones(2**20, np.uint8) for number in range(400)]
del blocks[1::2]
before = resident_mb()
give_back_memory()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to give memory back")
def test_memory_that_is_free_between_blocks_in_use_is_given_back():
    command = [sys.executable, "-c", HOLES]
    returned = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert float(returned) > 150  # of 200 MB in holes
