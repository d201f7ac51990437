"""A student and its opponent: who moves whom, and that both come back from a checkpoint."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from kdsr.config import OptimizerConfig
from kdsr.errors import NonFiniteLoss
from kdsr.fit import fit, new_state
from kdsr.models import build_model
from kdsr.objectives import build_objective, needs_teacher
from kdsr.objectives.adversarial import relativistic, squared_gradient
from kdsr.pairs import Cursor, PairBatch
from kdsr.spec import EspcnSpec
from kdsr.terms import AdversarialTerm, DistillTerms, PixelTerm, TeacherTerms

SPEC = EspcnSpec(scale=2, num_features=8)
LOSSES = ["non_saturating", "hinge", "relativistic"]
each_loss = pytest.mark.parametrize("loss", LOSSES)


SMALL = {"kind": "patch", "num_features": 8, "num_levels": 1}
STILL = {**SMALL, "spectral_norm": False}
"""Moves with nothing but its own steps."""


def term(**fields):
    return TypeAdapter(AdversarialTerm).validate_python({"discriminator": SMALL, **fields})


def judge_of(objective):
    (found,) = objective.terms.values()
    return found.discriminator


def weights_of(network):
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def start(terms, seed=0):
    torch.manual_seed(seed)
    student = build_model(SPEC)
    objective = build_objective(student, terms, scale=2)
    state = new_state(student, OptimizerConfig(learning_rate=1e-3, warmup_steps=0), num_steps=40)
    state.train_too(objective)
    return state, objective


def train(state, objective, until_step, pair):
    steps = iter([(pair, Cursor())] * until_step)
    return list(fit(state, objective, steps, until_step=until_step, after_step=objective.after_step))


@pytest.fixture
def pair():
    torch.manual_seed(7)
    hr = torch.rand(4, 3, 32, 32)
    return PairBatch(lr=torch.nn.functional.avg_pool2d(hr, 2), hr=hr)


@each_loss
def test_the_student_is_pulled_and_the_discriminator_moves_only_in_its_own_step(loss, pair):
    state, objective = start([term(loss=loss)])
    judge = objective.terms[f"adversarial_{loss}"].discriminator
    before = copy.deepcopy(judge.state_dict())
    sum(objective(pair).values()).backward()
    assert all(parameter.grad is not None for parameter in state.model.parameters())
    assert all(parameter.grad is None for parameter in judge.parameters())
    state.optimizer.step()
    assert len(state.optimizer.param_groups) == 1
    weights = [name for name in before if "weight" in name and "_u" not in name and "_v" not in name]
    assert all(torch.equal(before[name], judge.state_dict()[name]) for name in weights)
    objective.after_step()
    after = judge.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in weights)


@each_loss
def test_the_student_learns_what_a_still_discriminator_takes_for_real(loss, pair):
    state, objective = start([term(loss=loss, discriminator=STILL)])

    @torch.no_grad()
    def judged():
        return judge_of(objective)(2 * state.model(pair.lr) - 1).mean().item()

    before, judge = judged(), weights_of(judge_of(objective))
    list(fit(state, objective, iter([(pair, Cursor())] * 10), until_step=10))
    assert judged() > before + 0.01
    assert all(torch.equal(judge[name], now) for name, now in weights_of(judge_of(objective)).items())


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_noise_is_on_all_that_is_judged_and_fades_to_none(progress, pair):
    state, objective = start([term(noise=0.2, discriminator=STILL)])
    seen = []
    judge_of(objective).register_forward_pre_hook(lambda _, images: seen.append(images[0].detach()))
    objective(replace(pair, progress=progress))
    objective.after_step()
    with torch.no_grad():
        sr = state.model(pair.lr)
    # For the student, then the real ones and the student's for the discriminator.
    noise = [judged - (2 * images - 1) for judged, images in zip(seen, (sr, pair.hr, sr), strict=True)]
    for added in noise:
        # Pictures are judged in -1..1, which is twice the range that the term counts in.
        assert added.std().item() == pytest.approx(2 * 0.2 * (1 - progress), rel=0.05, abs=1e-6)
        assert abs(added.mean().item()) < 0.02
    assert torch.equal(noise[0], noise[2]) == (progress == 1)


@each_loss
def test_against_a_student_that_stands_still_the_discriminator_learns_to_tell(loss, pair):
    _, objective = start([term(loss=loss, learning_rate=2e-3)])
    told = []
    for _ in range(60):
        objective(pair)
        told.append(objective.after_step())
    name = f"adversarial_{loss}/discriminator"
    assert sum(t[name] for t in told[-5:]) < 0.8 * sum(t[name] for t in told[:5])


def test_r1_is_the_squared_gradient_at_real_images():
    images = torch.rand(3, 1, 4, 4, requires_grad=True)
    logits = (images * 2).flatten(1).sum(dim=1)
    assert squared_gradient(logits, images).item() == pytest.approx(4 * 16)
    pair = PairBatch(lr=torch.rand(2, 3, 16, 16), hr=torch.rand(2, 3, 32, 32))
    values = []
    for r1 in (0.0, 10.0):
        _, objective = start([term(r1=r1)])
        objective(pair)
        values.append(objective.after_step()["adversarial_non_saturating/discriminator"])
    assert values[1] > values[0]


def test_relativistic_compares_with_the_mean_of_the_other_side():
    high, low = torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), -4.0)
    assert relativistic(high, low) < 0.01
    assert relativistic(low, high) > 4


@pytest.mark.parametrize(("loss", "told"), [("hinge", 0.5), ("relativistic", 1.0)])
def test_where_differences_alone_are_learned_no_level_of_the_logits_is_a_border(loss, told, pair):
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(100.0))

        def forward(self, images):
            return self.level + images.mean(dim=(1, 2, 3), keepdim=True)

    _, objective = start([term(loss=loss)])
    objective.terms[f"adversarial_{loss}"].discriminator = Brightness()
    objective(replace(pair, hr=torch.full_like(pair.hr, 5.0)))
    assert objective.after_step()[f"adversarial_{loss}/told_apart"] == told


def test_both_go_on_from_a_saved_state(pair):
    terms = [PixelTerm(), term(weight=0.1)]
    whole, objective = start(terms)
    train(whole, objective, 6, pair)
    first, objective = start(terms)
    train(first, objective, 3, pair)
    saved = copy.deepcopy(first.state_dict())
    second, objective = start(terms, seed=1)
    second.load_state_dict(saved)
    train(second, objective, 6, pair)
    for mine, theirs in ((second.model, whole.model), (second.auxiliary, whole.auxiliary)):
        pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def last_of_two(state, objective, second, first):
    """Reports of two steps, the first of which is done."""
    batches = iter([(first, Cursor(1)), (second, Cursor(2))])
    reports = fit(state, objective, batches, until_step=2, after_step=objective.after_step)
    next(reports)
    return reports


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_a_discriminator_learns_nothing_from_a_loss_that_is_not_finite(loss, pair):
    """Relativistic losses of the student look at HR too, and are refused before."""
    state, objective = start([term(loss=loss)])
    reports = last_of_two(state, objective, replace(pair, hr=pair.hr * math.nan), pair)
    before = weights_of(judge_of(objective))
    words = rf"step 2: the discriminator's {loss} loss is nan for batch 2 of the data; .*of another name"
    with pytest.raises(NonFiniteLoss, match=words):
        next(reports)
    assert all(torch.equal(before[name], now) for name, now in weights_of(judge_of(objective)).items())


def test_a_discriminator_learns_nothing_from_a_gradient_that_is_not_finite(pair):
    state, objective = start([term()])
    reports = last_of_two(state, objective, pair, pair)
    before = weights_of(judge_of(objective))

    def steep(judge, _inputs, logits):
        learns = next(judge.parameters()).requires_grad
        # sqrt is finite at 0 and its derivative is not.
        return logits + (logits - logits.detach()).abs().sqrt() if learns else logits

    judge_of(objective).register_forward_hook(steep)
    with pytest.raises(
        NonFiniteLoss, match="step 2: the gradient of the discriminator's .* loss is nan for batch 2"
    ):
        next(reports)
    assert all(torch.equal(before[name], now) for name, now in weights_of(judge_of(objective)).items())


def test_only_a_term_against_the_teacher_needs_one_and_teachers_are_trained_against_hr():
    assert not needs_teacher([PixelTerm(), term()])
    assert needs_teacher([term(real="teacher")])
    TypeAdapter(DistillTerms).validate_python([{"kind": "adversarial", "real": "teacher"}])
    TypeAdapter(TeacherTerms).validate_python([{"kind": "adversarial"}])
    with pytest.raises(ValidationError, match="real is teacher, and there is none"):
        TypeAdapter(TeacherTerms).validate_python([{"kind": "adversarial", "real": "teacher"}])
