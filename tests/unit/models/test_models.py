"""Every network in the table keeps the contract; a new row is tested on arrival."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from kdsr.degrade import bicubic_upscale
from kdsr.errors import RequestError
from kdsr.models import MODELS, SrModel, build_model, fold, inherit_weights
from kdsr.models.rep_chain import RepChain, RepConv
from kdsr.spec import BicubicSpec, EdsrSpec, ModelSpec, RepChainSpec
from tests.small_networks import SMALL

NAMES = Path(__file__).with_name("state_dict_names.json")


def specs() -> list[ModelSpec]:
    kinds = [(spec, spec.model_fields["kind"].default) for spec in MODELS]
    return [
        spec(scale=scale, channels=channels, **SMALL[kind])  # type: ignore[arg-type]
        for spec, kind in kinds
        for scale in (2, 3, 4)
        for channels in (1, 3)
    ]


def spec_id(spec: ModelSpec) -> str:
    return f"{spec.kind}-x{spec.scale}-{spec.channels}c"


def randomised(spec: ModelSpec) -> SrModel:
    """No weight at zero, so that everything that could matter does."""
    torch.manual_seed(1)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


each_spec = pytest.mark.parametrize("spec", specs(), ids=spec_id)
trainable = pytest.mark.parametrize("spec", [s for s in specs() if s.kind != "bicubic"], ids=spec_id)


def test_every_kind_in_the_table_is_tested() -> None:
    assert {spec.model_fields["kind"].default for spec in MODELS} == SMALL.keys()


@each_spec
@pytest.mark.parametrize("size", [(5, 7), (12, 9), (16, 16)])
def test_output_is_scale_times_the_input_for_any_size(spec: ModelSpec, size: tuple[int, int]) -> None:
    height, width = size
    sr = build_model(spec)(torch.rand(2, spec.channels, height, width))
    assert sr.shape == (2, spec.channels, height * spec.scale, width * spec.scale)


@each_spec
def test_wrong_channels_are_refused_with_both_numbers(spec: ModelSpec) -> None:
    with pytest.raises(RequestError, match=rf"\(B, {spec.channels}, h, w\).*\(1, 2, 8, 8\)"):
        build_model(spec)(torch.rand(1, 2, 8, 8))


@trainable
def test_gradient_reaches_every_parameter(spec: ModelSpec) -> None:
    model = randomised(spec)
    model(torch.rand(1, spec.channels, 12, 12)).square().mean().backward()
    missed = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert missed == []


@each_spec
def test_weights_come_back_bit_exact(spec: ModelSpec) -> None:
    model, other = randomised(spec), build_model(spec)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in model.state_dict().items()})))
    lr = torch.rand(1, spec.channels, 9, 11)
    assert torch.equal(model(lr), other(lr))


@each_spec
def test_a_pickled_checkpoint_loads_without_running_code(spec: ModelSpec) -> None:
    buffer = io.BytesIO()
    torch.save(build_model(spec).state_dict(), buffer)
    buffer.seek(0)
    build_model(spec).load_state_dict(torch.load(buffer, weights_only=True))


@trainable
def test_every_tap_gives_features(spec: ModelSpec) -> None:
    found: dict[str, torch.Size] = {}
    model = build_model(spec)
    for tap in spec.taps:
        model.get_submodule(tap).register_forward_hook(
            lambda _module, _inputs, output, tap=tap: found.update({tap: output.shape})
        )
    model(torch.rand(2, spec.channels, 8, 8))
    assert len(spec.taps) >= 2 and found.keys() == set(spec.taps)
    assert all(len(shape) == 4 and shape[0] == 2 for shape in found.values())


def test_names_of_stored_weights_are_stable() -> None:
    """Stored models depend on them; a deliberate change needs a new spec version and this file made anew."""
    found = {spec_id(spec): sorted(build_model(spec).state_dict()) for spec in specs() if spec.channels == 3}
    assert found == json.loads(NAMES.read_text())


@each_spec
def test_receptive_radius_is_reached_and_never_passed(spec: ModelSpec) -> None:
    """Change one LR pixel: outputs change up to the radius away and not beyond.

    A network with a grid of its own need not reach it from every place in the grid.
    """
    model = randomised(spec).double().eval()
    radius, grid = model.receptive_radius, getattr(spec, "multiple_of", 1)
    size = -(-(2 * radius + 8 + grid) // grid) * grid
    lr = torch.rand(1, spec.channels, size, size, dtype=torch.float64)
    reached = []
    for middle in range(radius + 4, radius + 4 + grid):
        changed = lr.clone()
        changed[..., middle, middle] += 0.5
        with torch.no_grad():
            difference = (model(changed) - model(lr)).abs().amax(dim=(0, 1))
        blocks = difference.reshape(size, spec.scale, size, spec.scale).amax(dim=(1, 3)) > 0
        rows = blocks.any(dim=1).nonzero().flatten()
        reached.append(max(middle - int(rows.min()), int(rows.max()) - middle))
    assert max(reached) == radius


@each_spec
def test_folding_does_not_change_the_output(spec: ModelSpec) -> None:
    model = randomised(spec).double().eval()
    lr = torch.rand(1, spec.channels, 13, 10, dtype=torch.float64)
    with torch.no_grad():
        assert (fold(model).double()(lr) - model(lr)).abs().max() < 1e-5


@pytest.mark.parametrize("widths", [(8, 8), (3, 8)])
def test_a_folded_convolution_equals_its_branches(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = RepConv(*widths, expansion=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    features = torch.rand(2, widths[0], 7, 6, dtype=torch.float64)
    branches = F.conv2d(features, layer.kernel, layer.bias, padding=1) + F.conv2d(features, layer.point)
    expanded = F.conv2d(features, layer.expand[:, :, None, None])
    branches = branches + F.conv2d(expanded, layer.wide, padding=1)
    assert torch.allclose(layer(features), branches, atol=1e-9)


def test_a_folded_chain_has_single_convolutions_only() -> None:
    folded = fold(build_model(RepChainSpec(scale=4, num_features=48, num_layers=8)))
    assert isinstance(folded, RepChain) and folded.spec.folded
    assert all(isinstance(layer, torch.nn.Conv2d) for layer in folded.layers)
    assert sum(p.numel() for p in folded.parameters()) == 3 * 9 * 48 + 48 + 7 * (48 * 9 * 48 + 48)


@pytest.mark.parametrize("kind", ["rep_chain", "mobile", "unet", "swin_light", "bicubic"])
def test_the_bicubic_part_keeps_its_bits_where_the_rest_is_in_bfloat16(kind: str) -> None:
    (spec,) = (spec for spec in MODELS if spec.model_fields["kind"].default == kind)
    model, lr = build_model(spec(scale=2, **SMALL[kind])), torch.rand(1, 3, 8, 8)  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        sr = model(lr)
    assert torch.equal(sr, bicubic_upscale(lr, 2))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_untrained_chain_is_bicubic(scale: int) -> None:
    lr = torch.rand(1, 3, 8, 8)
    chain = build_model(RepChainSpec(scale=scale, num_features=8, num_layers=3))  # type: ignore[arg-type]
    assert torch.equal(chain(lr), bicubic_upscale(lr, scale))
    assert torch.equal(build_model(BicubicSpec(scale=scale))(lr), bicubic_upscale(lr, scale))  # type: ignore[arg-type]


def test_an_x4_chain_takes_the_trunk_of_a_folded_x2_one() -> None:
    source = fold(randomised(RepChainSpec(scale=2, num_features=8, num_layers=4)))
    model = build_model(RepChainSpec(scale=4, num_features=8, num_layers=4))
    assert inherit_weights(model, source) == 3
    own, given = fold(model), source
    assert isinstance(own, RepChain) and isinstance(given, RepChain)
    for taken, original in zip(own.layers[:-1], given.layers[:-1], strict=True):
        assert torch.allclose(taken.weight, original.weight, atol=1e-6)


def test_an_x4_edsr_takes_the_trunk_of_an_x2_one() -> None:
    source = randomised(EdsrSpec(scale=2, num_features=8, num_blocks=2))
    model = build_model(EdsrSpec(scale=4, num_features=8, num_blocks=2))
    assert inherit_weights(model, source) > 0
    assert torch.equal(model.state_dict()["head.weight"], source.state_dict()["head.weight"])
