"""Contrastive distance and data upcycling: what they are made of and where they lead."""

import itertools
from dataclasses import replace

import pytest
import torch

from kdsr.config import OptimizerConfig
from kdsr.degrade import bicubic_lr
from kdsr.errors import RequestError
from kdsr.fit import fit, new_state
from kdsr.models import build_model
from kdsr.objectives import build_objective
from kdsr.objectives.contrastive import LAYER_WEIGHTS, RandomFeatures, contrast
from kdsr.objectives.upcycling import Change
from kdsr.pairs import Cursor, PairBatch, ZoomPair
from kdsr.spec import EspcnSpec
from kdsr.terms import ContrastiveTerm, UpcyclingTerm

SPEC = EspcnSpec(scale=2, num_features=8)


def net(seed=0):
    """Answers around mid-grey, so that nothing is clamped."""
    torch.manual_seed(seed)
    model = build_model(SPEC)
    with torch.no_grad():
        model.body[-2].bias.fill_(0.5)
    return model


@pytest.fixture
def pair():
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(2, 3, 12, 10), hr=torch.rand(2, 3, 24, 20))


def objective_of(student, term, teacher=None):
    torch.manual_seed(1)
    return build_objective(student, [term], teacher=teacher, scale=2)


def test_nearer_to_the_teacher_and_farther_from_the_negatives_is_better():
    space = RandomFeatures(3, 8)
    teacher, negative = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)

    def value(image):
        return contrast(space(image), space(teacher), [space(negative)]).item()

    near, far = 0.9 * teacher + 0.1 * negative, 0.1 * teacher + 0.9 * negative
    assert 0 == value(teacher) < value(near) < value(far)
    halfway = [torch.full_like(features, 1.0) for features in space(teacher)]
    zeros, twos = ([torch.full_like(f, v) for f in halfway] for v in (0.0, 2.0))
    assert contrast(halfway, zeros, [twos, zeros]).item() == pytest.approx(0.5, rel=1e-4)


def test_the_space_is_the_same_everywhere_never_learns_and_does_not_see_plain_colour():
    one, other = RandomFeatures(3, 8), RandomFeatures(3, 8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in one.parameters())
    plain = one(torch.full((1, 3, 16, 16), 0.7))
    assert len(plain) == len(LAYER_WEIGHTS)
    assert plain[0][..., 2:-2, 2:-2].abs().max() < 1e-5


def test_the_history_is_the_student_of_some_steps_ago_and_only_moves_when_it_is_time(pair):
    student = net()
    objective = objective_of(student, ContrastiveTerm(refresh_steps=3), teacher=net(1))
    state = new_state(student, OptimizerConfig(warmup_steps=0), num_steps=4)
    state.train_too(objective)
    history = objective.terms["contrastive"].history
    names = dict(objective.named_parameters())
    assert len(state.optimizer.param_groups) == 1 and names, "nothing of it is trained"
    steps = fit(state, objective, iter([(pair, Cursor())] * 4), until_step=4, after_step=objective.after_step)
    equal = [
        all(torch.equal(a, b) for a, b in zip(history.parameters(), student.parameters(), strict=True))
        for _ in steps
    ]
    assert equal == [False, False, True, False]


@pytest.mark.parametrize("term", [UpcyclingTerm(probability=0, zoom_out=False), UpcyclingTerm(probability=0)])
def test_training_on_upcycled_pairs_alone_brings_the_student_nearer_to_the_teacher(term, pair):
    student, teacher = net(), net(1).requires_grad_(False)
    objective = objective_of(student, term, teacher)
    state = new_state(student, OptimizerConfig(learning_rate=3e-3, warmup_steps=0), num_steps=80)
    state.train_too(objective)

    def distance():
        with torch.no_grad():
            return (student(pair.lr) - teacher(pair.lr).clamp(0, 1)).abs().mean().item()

    before = distance()
    list(fit(state, objective, iter([(pair, Cursor())] * 80), until_step=80, after_step=objective.after_step))
    assert distance() < 0.7 * before


def test_negatives_come_of_input_with_noise_as_strong_as_was_asked_for(pair):
    term = ContrastiveTerm(num_negatives=2, noise=(20.0, 20.0))
    objective = objective_of(net(), term, teacher=net(1))
    seen = []
    history = objective.terms["contrastive"].history
    history.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    grey = replace(pair, lr=torch.full((2, 3, 40, 40), 0.5), hr=torch.full((2, 3, 80, 80), 0.5))
    objective(grey)
    first, second = ((noisy - grey.lr) * 255 for noisy in seen)
    assert first.std().item() == pytest.approx(20, rel=0.05) == second.std().item()
    assert abs(first.mean().item()) < 1 and (first - second).std().item() > 20


def test_training_on_contrast_alone_lowers_it(pair):
    student = net()
    objective = objective_of(student, ContrastiveTerm(), net(1).requires_grad_(False))
    state = new_state(student, OptimizerConfig(learning_rate=3e-3, warmup_steps=0), num_steps=60)
    steps = fit(
        state, objective, iter([(pair, Cursor())] * 60), until_step=60, after_step=objective.after_step
    )
    losses = [report.loss for report in steps]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("choice", list(itertools.product([False, True], repeat=4)))
def test_a_change_is_undone_exactly_by_its_inverse(choice):
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    change = Change(*choice)
    assert torch.allclose(change.undo(change.apply(images)), images)
    assert torch.equal(change.apply(images), images) == (not any(choice))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_zooming_in_without_changes(pair):
    term = UpcyclingTerm(zoom_out=False, probability=0)
    same = net()
    loss = objective_of(same, term, same)(pair)["upcycling"]
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_zooming_out_asks_for_lr_and_for_the_teachers_answer_to_lr_made_smaller(pair):
    student, teacher = net(), net(1).requires_grad_(False)
    loss = objective_of(student, UpcyclingTerm(zoom_in=False), teacher)(pair)["upcycling"]
    even = pair.lr[..., : pair.lr.shape[2] // 2 * 2, : pair.lr.shape[3] // 2 * 2]
    reduced = (bicubic_lr(even, 2).clamp(0, 1) * 255).round() / 255
    with torch.no_grad():
        answer, taught = student(reduced), teacher(reduced).clamp(0, 1)
    expected = (answer - even).abs().mean() + (answer - taught).abs().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_zooming_in_undoes_what_was_done_to_the_students_input_alone(pair):
    student, teacher = net(), net(1).requires_grad_(False)
    loss = objective_of(student, UpcyclingTerm(zoom_out=False, probability=1), teacher)
    crop = torch.rand_like(pair.lr)
    with torch.no_grad():
        taught = teacher(crop).clamp(0, 1)
        turned = student((1 - crop).flip(-1).flip(-2).transpose(-1, -2))
        answer = 1 - turned.transpose(-1, -2).flip(-2).flip(-1)
    zoomed = replace(pair, zoom=ZoomPair(crop, taught))
    expected = (answer - taught).abs().mean().item()
    assert loss(zoomed)["upcycling"].item() == pytest.approx(expected, rel=1e-5)


def test_stored_outputs_do_not_answer_for_other_inputs(pair):
    stored = replace(pair, teacher_sr=torch.rand_like(pair.hr))
    with pytest.raises(RequestError, match=r"needs the teacher itself.*teacher\.uri"):
        objective_of(net(), UpcyclingTerm())(stored)
    objective_of(net(), ContrastiveTerm())(stored)
