import numpy as np
import pytest
import torch

from kdsr.engine import Engine
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
    engine = Engine(Constant(0.5))
    with torch.inference_mode():
        engine._exact.value.fill_(value)
    with pytest.raises(DataError, match="not finite"):
        engine.run(tiles)


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
    engine = Engine(Constant(0.5), precision="bfloat16")
    assert engine.precision == "bfloat16"
    with torch.inference_mode():
        engine._fast.value.fill_(float("nan"))
    assert (engine.run(tiles) == 128).all()


def test_auto_names_a_type_that_runs():
    engine = Engine(random_net(EspcnSpec(scale=2, num_features=8)), precision="auto")
    assert engine.precision in ("float32", "bfloat16")
    assert engine.note is None or engine.precision == "float32"
