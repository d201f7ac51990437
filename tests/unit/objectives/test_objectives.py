"""What is minimised: weighted terms, a teacher that is asked only when it counts and never taught."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kdsr.errors import RequestError
from kdsr.losses import LOSSES
from kdsr.models import build_model
from kdsr.objectives import build_objective, needs_teacher
from kdsr.pairs import PairBatch
from kdsr.spec import EspcnSpec
from kdsr.terms import OutputTerm, PixelTerm


class Counting(nn.Module):
    """Answers with what it was given, times `factor`; counts."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, lr):
        self.calls += 1
        return self.factor * lr


def net(seed):
    torch.manual_seed(seed)
    return build_model(EspcnSpec(scale=2, num_features=4))


@pytest.fixture
def pair():
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(2, 3, 7, 6), hr=torch.rand(2, 3, 14, 12))


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("loss", LOSSES)
def test_terms_are_the_weighted_distances_to_hr_and_to_the_teacher(pair, loss):
    student, teacher = net(0), net(1)
    terms = [PixelTerm(loss=loss, weight=0.25), OutputTerm(loss=loss, weight=2)]
    losses = build_objective(student, terms, teacher=teacher)(pair)
    sr, target = student(pair.lr), teacher(pair.lr).detach().clamp(0, 1)
    assert values(losses) == {
        f"pixel_{loss}": pytest.approx(0.25 * LOSSES[loss](sr, pair.hr).item()),
        f"output_{loss}": pytest.approx(2 * LOSSES[loss](sr, target).item()),
    }


def test_both_terms_together_are_the_sum_of_each_alone(pair):
    student, teacher = net(0), net(1)
    terms = [PixelTerm(weight=0.3, loss="charbonnier"), OutputTerm(weight=0.7, loss="mse")]
    alone = [build_objective(student, [term], teacher=teacher)(pair) for term in terms]
    assert values(build_objective(student, terms, teacher=teacher)(pair)) == values(alone[0] | alone[1])


def test_gradients_add_up_as_the_terms_do(pair):
    terms = [PixelTerm(weight=0.3), OutputTerm(weight=0.7)]

    def gradient(terms):
        student = net(0)
        sum(build_objective(student, terms, teacher=net(1))(pair).values()).backward()
        return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    assert torch.allclose(gradient(terms), gradient(terms[:1]) + gradient(terms[1:]), atol=1e-6)


def test_equal_terms_count_each(pair):
    terms = [PixelTerm(weight=1), PixelTerm(weight=2), PixelTerm(weight=4, loss="mse")]
    losses = values(build_objective(net(0), terms)(pair))
    assert set(losses) == {"pixel_l1", "pixel_l1_2", "pixel_mse"}
    assert losses["pixel_l1_2"] == pytest.approx(2 * losses["pixel_l1"])


def test_the_student_runs_once_for_all_terms(pair):
    student = Counting()
    pair = replace(pair, hr=pair.lr)
    build_objective(student, [PixelTerm(), OutputTerm()], teacher=Counting())(pair)
    assert student.calls == 1


def test_a_weight_follows_its_schedule_and_at_zero_the_teacher_is_not_asked(pair):
    teacher = Counting()
    pair = replace(pair, hr=pair.lr)
    terms = [PixelTerm(), OutputTerm(weight=0, final_weight=1, ramp=(0.5, 0.75))]
    objective = build_objective(nn.Identity(), terms, teacher=teacher)
    for progress in (0.0, 0.3, 0.5):
        assert set(objective(replace(pair, progress=progress))) == {"pixel_l1"}
    assert teacher.calls == 0
    at = {p: objective(replace(pair, progress=p))["output_l1"].item() for p in (0.625, 0.75, 1.0)}
    assert teacher.calls == 3
    assert at[0.625] == pytest.approx(at[1.0] / 2) and at[0.75] == at[1.0] > 0


def test_a_stored_output_wins_over_the_live_teacher(pair):
    teacher = Counting()
    stored = replace(pair, teacher_sr=torch.rand_like(pair.hr))
    student = net(0)
    losses = build_objective(student, [OutputTerm()], teacher=teacher)(stored)
    assert teacher.calls == 0
    assert losses["output_l1"].item() == pytest.approx(
        LOSSES["l1"](student(pair.lr), stored.teacher_sr).item()
    )
    assert values(build_objective(student, [OutputTerm()])(stored)) == values(losses)


def test_a_live_teacher_is_neither_taught_nor_changed(pair):
    student, teacher = net(0), net(1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    sum(build_objective(student, [OutputTerm()], teacher=teacher)(pair).values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_live_teacher_says_what_a_stored_output_could_hold(pair):
    """Stored outputs are 8 bit, so they lie in 0..1; a live one must not pull the student beyond."""
    pair = replace(pair, hr=pair.lr)
    losses = build_objective(torch.ones_like, [OutputTerm()], teacher=Counting(factor=1000.0))(pair)
    assert losses["output_l1"].item() < 0.05


def test_an_output_term_without_any_teacher_is_refused(pair):
    objective = build_objective(net(0), [PixelTerm(), OutputTerm()])
    with pytest.raises(RequestError, match="needs a teacher, or shards with its outputs; found neither"):
        objective(pair)


def test_only_terms_that_look_at_the_teacher_need_one():
    assert needs_teacher([PixelTerm(), OutputTerm()])
    assert not needs_teacher([PixelTerm()])
