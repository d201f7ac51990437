"""A student that looks at LR with its teacher's eyes."""

import pytest
import torch

from kdsr.errors import RequestError
from kdsr.models import SrModel, build_model, fold, share_extractor
from kdsr.models.inherit import dead_leaves, slice_weights
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
    DamSpec(scale=2, num_features=12, num_blocks=2),
    EdsrSpec(scale=2, num_features=12, num_blocks=2),
    RepChainSpec(scale=2, num_features=12, num_layers=4),
    MobileSpec(scale=2, num_features=12, num_blocks=2),
    MultiScaleSpec(scale=2, num_features=12, num_blocks=2),
    ShuffleSpec(scale=2, num_features=12, num_blocks=2),
]
each_kind = pytest.mark.parametrize("spec", LARGE, ids=lambda spec: spec.kind)


def net(spec: ModelSpec, seed: int) -> SrModel:
    torch.manual_seed(seed)
    model = build_model(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def extracted(model: SrModel, lr: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.get_submodule(model.spec.extractor)(lr)
    return found


@each_kind
def test_of_one_width_the_extractor_is_the_teachers_and_learns_no_more(spec: ModelSpec) -> None:
    teacher, student = net(spec, 0), net(spec, 1)
    share_extractor(student, teacher)
    lr = torch.rand(2, 3, 8, 8)
    assert torch.equal(extracted(fold(student), lr), extracted(fold(teacher), lr))
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in student.named_parameters() if name.startswith(spec.extractor + ".")}


@pytest.mark.parametrize("spec", LARGE[:5], ids=lambda spec: spec.kind)
def test_a_narrower_student_takes_whole_channels_also_when_it_is_deeper(spec: ModelSpec) -> None:
    depth = "num_layers" if spec.kind == "rep_chain" else "num_blocks"
    smaller = {"num_features": 6, depth: getattr(spec, depth) + 2}
    teacher, student = net(spec, 0), net(spec.model_copy(update=smaller), 1)
    share_extractor(student, teacher)
    name = next(name for name in fold(student).state_dict() if name.startswith(spec.extractor))
    own, given = fold(student).state_dict()[name], fold(teacher).state_dict()[name]
    assert all(any(torch.equal(kernel, whole) for whole in given) for kernel in own)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("spec", LARGE[:5], ids=lambda spec: spec.kind)
def test_the_choice_of_channels_is_that_of_the_slice(spec: ModelSpec, drawn: bool) -> None:
    teacher, smaller = net(spec, 0), spec.model_copy(update={"num_features": 6})
    sliced, student = fold(net(smaller, 1)), net(smaller, 2)
    pictures = None if drawn else torch.rand(2, 3, 24, 24) ** 3
    slice_weights(sliced, fold(teacher), dead_leaves(teacher.spec.channels) if pictures is None else pictures)
    share_extractor(student, teacher, pictures)
    lr = torch.rand(1, 3, 8, 8)
    assert torch.equal(extracted(fold(student), lr), extracted(sliced, lr))


@pytest.mark.parametrize(
    ("spec", "source", "message"),
    [
        (EspcnSpec(scale=2), EspcnSpec(scale=2), "a espcn has no extractor"),
        (DamSpec(scale=2), EdsrSpec(scale=2), "kind dam, found edsr"),
        (DamSpec(scale=2, channels=1), DamSpec(scale=2), "channels 1, found 3"),
        (DamSpec(scale=2, num_features=32), DamSpec(scale=2), "num_features 32 or more .* at most 24"),
        (ShuffleSpec(scale=2, num_features=12), ShuffleSpec(scale=2), "num_features 12 to share .* 52"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(spec: ModelSpec, source: ModelSpec, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        share_extractor(build_model(spec), build_model(source))
