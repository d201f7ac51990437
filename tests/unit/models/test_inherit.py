"""A network begins as a slice of a larger one of its kind."""

import pytest
import torch

from kdsr.checkpoint import load_model
from kdsr.degrade import bicubic_lr
from kdsr.errors import RequestError
from kdsr.models import SrModel, build_model, fold, inherit_slice
from kdsr.models.inherit import dead_leaves
from kdsr.spec import (
    DamSpec,
    EdsrSpec,
    EspcnSpec,
    MobileSpec,
    ModelSpec,
    MultiScaleSpec,
    RepChainSpec,
    ShuffleSpec,
)

LARGE = [
    EdsrSpec(scale=4, num_features=12, num_blocks=3),
    EdsrSpec(scale=3, num_features=12, num_blocks=3, channels=1),
    RepChainSpec(scale=4, num_features=12, num_layers=5),
    MobileSpec(scale=4, num_features=12, num_blocks=3),
    MultiScaleSpec(scale=2, num_features=12, num_blocks=3),
    DamSpec(scale=4, num_features=20, num_blocks=3),
]


def trained(spec: ModelSpec) -> SrModel:
    """Weights like those of a trained network: none at zero, and an output close to the picture's."""
    torch.manual_seed(3)
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def distance(model: SrModel, other: SrModel) -> float:
    """Mean absolute difference of the outputs for pictures that no layer was fitted on."""
    torch.manual_seed(9)
    lr = torch.nn.functional.avg_pool2d(torch.rand(2, model.spec.channels, 60, 60), 3)
    with torch.no_grad():
        return (model(lr) - other(lr)).abs().mean().item()


def named(spec: ModelSpec) -> str:
    return f"{spec.kind}-x{spec.scale}-{spec.channels}c"


each_kind = pytest.mark.parametrize("spec", LARGE, ids=named)


@each_kind
def test_a_slice_of_everything_is_the_same_network(spec: ModelSpec) -> None:
    source, model = trained(spec), build_model(spec).eval()
    assert inherit_slice(model, source) == len(fold(source).state_dict())
    if spec.kind == "rep_chain":
        assert distance(model, source) < 1e-6
    else:
        assert all(torch.equal(own, source.state_dict()[name]) for name, own in model.state_dict().items())


@each_kind
@pytest.mark.parametrize("smaller", [{"width": 6}, {"depth": 2}, {"width": 7, "depth": 1}], ids=str)
def test_a_slice_begins_closer_to_its_source_than_a_new_network(
    spec: ModelSpec, smaller: dict[str, int]
) -> None:
    depth = "num_layers" if spec.kind == "rep_chain" else "num_blocks"
    names = {"width": "num_features", "depth": depth}
    sizes = {names[what]: size + (2 if names[what] == "num_layers" else 0) for what, size in smaller.items()}
    source = trained(spec)
    torch.manual_seed(5)
    model = build_model(spec.model_copy(update=sizes)).eval()
    before = distance(model, source)
    assert inherit_slice(model, source) == len(fold(model).state_dict())
    assert distance(model, source) < before


@each_kind
def test_the_same_slice_every_time(spec: ModelSpec) -> None:
    source = trained(spec)
    first, second = (build_model(spec.model_copy(update={"num_features": 6})).eval() for _ in range(2))
    for model in (first, second):
        inherit_slice(model, source)
    assert distance(first, second) < 1e-5


@pytest.mark.parametrize("spec", [s for s in LARGE if s.kind in ("edsr", "mobile")], ids=named)
def test_channels_without_weight_are_the_ones_that_go(spec: ModelSpec) -> None:
    """Put a narrow network into a wide one, between channels of nothing: the slice finds it again."""
    narrow = trained(spec.model_copy(update={"num_features": 6}))
    wide = build_model(spec)
    state = {}
    for name, tensor in wide.state_dict().items():
        small = narrow.state_dict()[name]
        state[name] = torch.zeros_like(tensor)
        # A shuffled channel keeps its sub-pixels together.
        group = spec.scale if name.startswith("upsampler") else 1
        repeats = [group**2 if spec.scale != 4 else 4 if group > 1 else 1] + [1] * (tensor.dim() - 1)
        index = [
            (torch.arange(have // r)[:, None] * (2 if want != have else 1) * r + torch.arange(r)).flatten()
            for have, want, r in zip(small.shape, tensor.shape, repeats, strict=True)
        ]
        state[name][torch.meshgrid(*index, indexing="ij")] = small
    wide.load_state_dict(state)
    assert distance(wide.eval(), narrow) < 1e-5
    model = build_model(narrow.spec).eval()
    inherit_slice(model, wide)
    assert distance(model, narrow) < 1e-3


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("edsr-small-x4", {"num_features": 16}),
        ("edsr-small-x4", {"num_blocks": 4}),
        ("photo-x4", {"num_features": 24, "folded": False}),
        ("photo-x4", {"num_layers": 6, "folded": False}),
    ],
)
def test_half_a_bundled_network_begins_nearer_to_the_picture(name: str, smaller: dict[str, int]) -> None:
    source = load_model(name).model
    torch.manual_seed(0)
    model = build_model(source.spec.model_copy(update=smaller)).eval()
    hr = dead_leaves(3)[:2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    lr = bicubic_lr(hr, 4)

    def error() -> float:
        with torch.no_grad():
            return (model(lr) - hr).abs().mean().item()

    before = error()
    inherit_slice(model, source)
    assert error() < before


def test_a_slice_for_another_scale_keeps_its_own_tail() -> None:
    source = trained(MultiScaleSpec(scale=2, num_features=12, num_blocks=3))
    model = build_model(MultiScaleSpec(scale=4, num_features=6, num_blocks=2))
    taken = inherit_slice(model, source)
    assert taken == len(model.state_dict()) - 2
    assert not model.state_dict()["tail.weight"].any()


@pytest.mark.parametrize(
    ("spec", "source", "message"),
    [
        (MobileSpec(scale=2), EspcnSpec(scale=2), "kind mobile, found espcn"),
        (ShuffleSpec(scale=2), ShuffleSpec(scale=2), "a shuffle cannot be cut .* rep_chain, mobile"),
        (EdsrSpec(scale=2, channels=1), EdsrSpec(scale=2), "channels 1, found 3"),
        (EdsrSpec(scale=2, num_features=48), EdsrSpec(scale=2, num_features=32), "num_features 48 or more"),
        (MobileSpec(scale=2, num_blocks=9), MobileSpec(scale=2, num_blocks=8), "make num_blocks at most 8"),
        (MobileSpec(scale=2, expansion=3), MobileSpec(scale=2), "expansion 3 or more, found 2"),
        (RepChainSpec(scale=2, num_layers=9), RepChainSpec(scale=2), "num_layers 9 or more, found 8"),
    ],
)
def test_what_cannot_be_cut_out_is_refused_by_name(spec: ModelSpec, source: ModelSpec, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        inherit_slice(build_model(spec), build_model(source))


def test_the_expansion_of_a_chain_is_free() -> None:
    source = trained(RepChainSpec(scale=2, num_features=8, num_layers=3, expansion=1))
    model = build_model(RepChainSpec(scale=2, num_features=8, num_layers=3, expansion=3)).eval()
    inherit_slice(model, source)
    assert distance(model, source) < 1e-6
