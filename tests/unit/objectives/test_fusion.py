"""Attention as a weight in the loss, and features of both networks fused into one image."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kdsr.config import OptimizerConfig
from kdsr.degrade import bicubic_upscale
from kdsr.fit import fit, new_state
from kdsr.models import SrModel, build_model
from kdsr.objectives import build_objective, label_columns
from kdsr.objectives.features import standardised
from kdsr.objectives.fusion import AttendedDistance, Fusion, FusionDistance, activity, attention_map
from kdsr.objectives.step import Parts
from kdsr.pairs import Cursor, PairBatch
from kdsr.spec import EdsrSpec, ModelSpec, RepChainSpec, ShardIndex, TeacherRef, UnetSpec
from kdsr.terms import AttendedTerm, FusionTerm

STUDENT = RepChainSpec(scale=2, num_features=6, num_layers=3)
TEACHER = EdsrSpec(scale=2, num_features=8, num_blocks=1)
TAPS = [{"student": "layers.1", "teacher": "trunk"}]


def net(spec: ModelSpec, seed: int = 0) -> SrModel:
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fusion(**fields: object) -> FusionTerm:
    return TypeAdapter(FusionTerm).validate_python({"taps": TAPS, "num_hidden": 8, **fields})


@pytest.fixture
def pair() -> PairBatch:
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(4, 3, 9, 8), hr=torch.rand(4, 3, 18, 16))


def test_an_attention_map_has_mean_1_and_is_flat_where_nothing_stands_out() -> None:
    values = torch.rand(2, 5, 7)
    for temperature in (0.1, 10.0):
        assert attention_map(values, temperature).mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(attention_map(torch.full((1, 3, 3), 8.0), 1.0), torch.ones(1, 3, 3))
    sharp, soft = (attention_map(values, temperature).max() for temperature in (0.1, 10.0))
    assert sharp > 5 * soft


def test_activity_is_a_mean_over_channels_so_that_widths_may_differ() -> None:
    features = torch.randn(2, 4, 3, 3)
    wider = torch.cat([features, features], dim=1)
    assert torch.allclose(activity(features, 2.0), activity(wider, 2.0))


def test_the_same_features_have_no_distance_of_maps_and_places_count_by_their_attention(
    pair: PairBatch,
) -> None:
    """With a projection to nothing, what is left is |F_T| at each place times the place's weight."""
    config = TypeAdapter(AttendedTerm).validate_python({"taps": [{"student": "trunk", "teacher": "trunk"}]})
    objective = build_objective(net(TEACHER), [config], teacher=net(TEACHER), scale=2)
    (term,) = objective.terms.values()
    assert isinstance(term, AttendedDistance)
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.zero_()
    loud = standardised(objective._begin(pair).teacher_features["trunk"])
    weights = attention_map(activity(loud, 1.0), 1.0)
    expected = (weights * loud.abs().mean(dim=1)).mean().item()
    (value,) = objective(pair).values()
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert expected > loud.abs().mean().item()


def test_errors_of_the_output_draw_the_attention_to_where_they_are(pair: PairBatch) -> None:
    config = TypeAdapter(AttendedTerm).validate_python({"by": "error", "taps": TAPS})
    stored = torch.zeros_like(pair.hr)
    objective = build_objective(net(STUDENT), [config], teacher=net(TEACHER, 1), scale=2)
    (term,) = objective.terms.values()
    assert isinstance(term, AttendedDistance)
    step = objective._begin(PairBatch(lr=pair.lr, hr=pair.hr, teacher_sr=stored))
    step.teacher_sr.copy_(step.sr.detach())
    step.teacher_sr[:, :, :2, :2] += 0.5
    weights = term._map(term._error(step, pair.lr))
    assert weights.shape == (4, 9, 8)
    assert (weights.flatten(1).argmax(dim=1) == 0).all() and weights[:, 0, 0].min() > 5


def test_errors_need_the_stored_output_beside_stored_features() -> None:
    sizes = dict.fromkeys(("num_images", "num_rows", "num_heldout_rows", "num_pixels", "num_rejected"), 0)
    index = ShardIndex(shards=[], options={}, teacher=TeacherRef(name="big", sha256="0" * 64), **sizes)
    by = {
        which: TypeAdapter(AttendedTerm).validate_python({"by": which, "taps": TAPS})
        for which in ("teacher", "error")
    }
    assert label_columns([by["teacher"]], index) == ()
    assert label_columns([by["error"]], index) == ("teacher_sr",)


def gradients(may_look: float, bias: float) -> torch.Tensor:
    """Of the student's features, when the gate is nearly open (a large bias) or nearly shut."""
    torch.manual_seed(0)
    parts = Parts(net(STUDENT), scale=2)
    part = Fusion(6, 8, fusion(), parts)
    with torch.no_grad():
        part.gate.weight.zero_()
        part.gate.bias.fill_(bias)
    student = torch.randn(1, 6, 8, 8, requires_grad=True)
    image = part(student, torch.randn(1, 8, 8, 8), torch.rand(1, 3, 8, 8), torch.full((1, 1, 1, 1), may_look))
    image.square().mean().backward()
    assert student.grad is not None
    return student.grad.abs().mean()


def test_an_open_gate_leaves_the_student_nothing_to_learn_unless_the_teacher_is_left_out() -> None:
    assert gradients(may_look=1, bias=50) == 0
    assert gradients(may_look=0, bias=50) > 0
    assert gradients(may_look=1, bias=0) > 0


def test_an_image_that_may_not_look_owes_nothing_to_the_teacher() -> None:
    torch.manual_seed(0)
    part = Fusion(6, 8, fusion(), Parts(net(STUDENT), scale=2))
    student, lr = torch.randn(2, 6, 8, 8), torch.rand(2, 3, 8, 8)
    may_look = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    one, other = (part(student, torch.randn(2, 8, 8, 8), lr, may_look) for _ in range(2))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    assert (one - bicubic_upscale(lr, 2)).abs().mean() < 0.1


def test_everything_that_learns_in_a_fusion_is_reached(pair: PairBatch) -> None:
    objective = build_objective(net(STUDENT), [fusion()], teacher=net(TEACHER, 1), scale=2)
    (value,) = objective(pair).values()
    value.backward()
    (term,) = objective.terms.values()
    assert isinstance(term, FusionDistance)
    both = [parameter.grad.clone() for parameter in term.parameters() if parameter.grad is not None]
    assert len(both) == len(list(term.parameters()))


def test_a_student_that_sees_fused_images_alone_comes_nearer_to_hr(pair: PairBatch) -> None:
    torch.manual_seed(3)
    darker = PairBatch(lr=pair.lr, hr=0.5 * bicubic_upscale(pair.lr, 2))
    student = net(STUDENT)
    objective = build_objective(student, [fusion()], teacher=net(TEACHER, 1), scale=2)
    state = new_state(student, OptimizerConfig(learning_rate=1e-2, warmup_steps=0), num_steps=80)
    state.train_too(objective)

    def distance() -> float:
        return torch.nn.functional.l1_loss(student(darker.lr), darker.hr).item()

    before = distance()
    list(fit(state, objective, iter([(darker, Cursor())] * 80), until_step=80))
    assert distance() < 0.7 * before


def test_grids_of_another_size_are_brought_to_the_input(pair: PairBatch) -> None:
    unet = UnetSpec(scale=2, num_features=4, num_levels=1)
    taps = [{"student": "layers.1", "teacher": "bottom"}]
    objective = build_objective(net(STUDENT), [fusion(taps=taps)], teacher=net(unet, 1), scale=2)
    (value,) = objective(pair).values()
    assert value.isfinite()


def test_a_fusion_of_the_teacher_alone_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than 1"):
        fusion(teacher_share=1)
