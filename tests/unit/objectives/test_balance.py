"""What the balancers multiply terms by, and what they report."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kdsr.config import OptimizerConfig
from kdsr.fit import fit, new_state
from kdsr.models import build_model
from kdsr.objectives import build_objective
from kdsr.objectives.balance import ByGradient, build_balancer
from kdsr.pairs import Cursor, PairBatch
from kdsr.spec import EspcnSpec
from kdsr.terms import FeatureTerm, GradientBalance, OutputTerm, PixelTerm, TapPair, UncertaintyBalance

SPEC = EspcnSpec(scale=2, num_features=8)
TERMS = [PixelTerm(), OutputTerm(weight=1), OutputTerm(weight=0.5, loss="mse")]


def net(seed=0):
    torch.manual_seed(seed)
    return build_model(SPEC)


@pytest.fixture
def pair():
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(2, 3, 12, 10), hr=torch.rand(2, 3, 24, 20))


def norm(value, parameters):
    gradients = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def test_every_term_pulls_with_its_share_of_the_pixel_terms(pair):
    student = net()
    parameters = list(student.parameters())
    balance = GradientBalance(share=0.2, gate=False)
    losses = build_objective(student, TERMS, teacher=net(1), balance=balance)(pair)
    whole = norm(losses["pixel_l1"], parameters)
    assert norm(losses["output_l1"], parameters) == pytest.approx(0.2 * whole, rel=1e-4)
    assert norm(losses["output_mse"], parameters) == pytest.approx(0.5 * 0.2 * whole, rel=1e-4)


def test_a_term_at_features_is_measured_by_what_the_pixel_terms_have_there(pair):
    student, teacher = net(), net(1)
    terms = [PixelTerm(), FeatureTerm(taps=[TapPair(student="body.1", teacher="body.1")])]
    balance = GradientBalance(share=0.2, gate=False)
    losses = build_objective(student, terms, teacher=teacher, balance=balance)(pair)
    there = list(student.body[0].parameters())
    there_alone = norm(losses["pixel_l1"], there)
    assert there_alone < 0.8 * norm(losses["pixel_l1"], list(student.parameters()))
    assert norm(losses["features_l1"], there) == pytest.approx(0.2 * there_alone, rel=1e-4)


def test_a_term_has_nothing_to_share_before_the_pixel_terms_reach_it_and_its_share_as_soon_as_they_do(pair):
    student = net()
    tail = student.body[-2]
    with torch.no_grad():
        kernel = tail.weight.clone()
        tail.weight.zero_()  # as a chain begins
    terms = [PixelTerm(), FeatureTerm(taps=[TapPair(student="body.1", teacher="body.1")])]
    balance = GradientBalance(gate=False, memory=0.0, every_steps=1)
    objective = build_objective(student, terms, teacher=net(1), balance=balance)
    objective(pair)
    assert objective.after_step()["weight/features_l1"] == 0
    with torch.no_grad():
        tail.weight.copy_(kernel)
    objective(pair)
    assert objective.after_step()["weight/features_l1"] > 0


def test_kinds_of_the_reference_keep_their_weights(pair):
    student = net()
    terms = [
        PixelTerm(weight=0.5),
        OutputTerm(weight=0.5),
        FeatureTerm(taps=[TapPair(student="body.1", teacher="body.1")]),
    ]
    balance = GradientBalance(share=0.2, reference=("pixel", "output"), gate=False)
    objective = build_objective(student, terms, teacher=net(1), balance=balance)
    losses = objective(pair)
    told = objective.after_step()
    assert told["weight/pixel_l1"] == told["weight/output_l1"] == 0.5
    there = list(student.body[0].parameters())
    together = norm(losses["pixel_l1"] + losses["output_l1"], there)
    assert norm(losses["features_l1"], there) == pytest.approx(0.2 * together, rel=1e-4)


def test_a_term_that_pulls_the_other_way_is_left_out(pair):
    against, student = OutputTerm(loss="l1"), net()
    with torch.no_grad():  # around mid-grey, so that nothing is clamped
        student.body[-2].bias.fill_(0.5)
    pair = replace(pair, hr=0.45 + 0.1 * pair.hr)

    class Opposite(nn.Module):
        """As far from the student as HR is, on the other side."""

        def forward(self, lr):
            with torch.no_grad():
                sr = student(lr)
            return sr - (pair.hr - sr)

    def weights(teacher, balance):
        objective = build_objective(student, [PixelTerm(), against], teacher=teacher, balance=balance)
        objective(pair)
        return objective.after_step()

    class Same(nn.Module):
        def forward(self, lr):
            return pair.hr

    assert weights(Opposite(), GradientBalance())["weight/output_l1"] == 0
    assert weights(Opposite(), GradientBalance(gate=False))["weight/output_l1"] > 0
    assert weights(Same(), GradientBalance(share=0.25))["weight/output_l1"] == pytest.approx(0.25, rel=1e-3)


class Aside(nn.Module):
    """As far from the student as HR is, times `distance`: below zero on the other side."""

    def __init__(self, student, hr):
        super().__init__()
        self._student, self._hr, self.distance = [student], hr, 1.0

    def forward(self, lr):
        with torch.no_grad():
            sr = self._student[0](lr)
        return sr + self.distance * (self._hr - sr)


@pytest.fixture
def aside(pair):
    """A student, a pair and a teacher beside them, all so near to mid-grey that nothing is clamped."""
    student = net()
    with torch.no_grad():
        student.body[-2].weight.mul_(0.1)
        student.body[-2].bias.fill_(0.5)
    pair = replace(pair, hr=0.45 + 0.1 * pair.hr)
    return student, pair, Aside(student, pair.hr)


@pytest.mark.parametrize(
    ("distances", "factors"),
    [
        ([1, -1, 1], [0.3, 0, 0.3]),
        # Twice as far is a gradient twice as long: in the mean although the gate is shut.
        ([1, -2, 1], [0.3, 0, 0.3 / (0.7 + 0.3 * 2)]),
        # Half as far is one half as long, and no reason to pull harder.
        ([1, -0.5, 1], [0.3, 0, 0.3]),
    ],
)
def test_the_gate_shuts_at_once_and_gives_the_factor_back_at_once(aside, distances, factors):
    student, pair, teacher = aside
    terms = [PixelTerm(loss="mse"), OutputTerm(loss="mse")]
    balance = GradientBalance(share=0.3, memory=0.7, every_steps=2)
    objective = build_objective(student, terms, teacher=teacher, balance=balance)
    found, values = [], []
    for distance in distances:
        teacher.distance = distance
        for _ in range(balance.every_steps):
            values.append(objective(pair)["output_mse"].item())
            found.append(objective.after_step()["weight/output_mse"])
    assert found[::2] == found[1::2] == pytest.approx(factors, rel=1e-3)
    assert [value == 0 for value in values] == [False, False, True, True, False, False]


def test_a_term_without_a_gradient_tells_no_factor_and_is_looked_at_again(aside):
    student, pair, teacher = aside
    balance = GradientBalance(share=0.3, gate=False)
    objective = build_objective(student, [PixelTerm(), OutputTerm()], teacher=teacher, balance=balance)
    found = []
    for distance in (0, 1):
        teacher.distance = distance
        objective(pair)
        found.append(objective.after_step()["weight/output_l1"])
    assert found == pytest.approx([1, 0.3], rel=1e-3)


def test_a_term_that_fades_is_not_made_louder_and_one_that_grows_is_kept_at_its_share(aside):
    student, pair, teacher = aside
    balance = GradientBalance(share=0.3, memory=0.0, every_steps=1)
    terms = [PixelTerm(loss="mse"), OutputTerm(loss="mse")]
    objective = build_objective(student, terms, teacher=teacher, balance=balance)
    found = []
    for distance in (1, 0.1, 0.001, 1, 3, 0.1):
        teacher.distance = distance
        objective(pair)
        found.append(objective.after_step()["weight/output_mse"])
    assert found == pytest.approx([0.3, 0.3, 0.3, 0.3, 0.1, 0.1], rel=1e-3)


def test_gradients_are_looked_at_as_often_as_was_asked_for(pair, monkeypatch):
    looks = []
    original = ByGradient._look
    monkeypatch.setattr(ByGradient, "_look", lambda self, *args: looks.append(1) or original(self, *args))
    objective = build_objective(net(), TERMS, teacher=net(1), balance=GradientBalance(every_steps=4))
    for _ in range(9):
        objective(pair)
        objective.after_step()
    assert len(looks) == 3


def test_uncertainty_learns_to_trust_what_is_easy(pair):
    student = net()
    objective = build_objective(student, TERMS, teacher=net(1), balance=UncertaintyBalance())
    state = new_state(student, OptimizerConfig(learning_rate=1e-2, warmup_steps=0), num_steps=60)
    state.train_too(objective)
    reports = list(
        fit(state, objective, iter([(pair, Cursor())] * 60), until_step=60, after_step=objective.after_step)
    )
    told = reports[-1].details
    assert told["weight/output_mse"] / 0.5 > told["weight/pixel_l1"] > 1


def test_uncertainty_is_the_log_density_of_laplace_without_its_constant():
    names, spreads = ["pixel_l1", "output_l1", "output_mse"], torch.tensor([0.5, 2.0, 4.0])
    balancer = build_balancer(UncertaintyBalance(), net(), {name: name[: -len("_l1")] for name in names})
    values, weights = torch.tensor([0.2, 0.7, 3.0]), [1.0, 2.0, 0.5]
    with torch.no_grad():
        balancer.log_spreads.copy_(spreads.log())
    given = dict(zip(names, values, strict=True)), dict(zip(names, weights, strict=True))
    density = torch.distributions.Laplace(0, spreads).log_prob(values) + math.log(2)
    expected = [-weight * density[place].item() for place, weight in enumerate(weights)]
    assert [value.item() for value in balancer(*given).values()] == pytest.approx(expected)
    assert list(balancer.factors().values()) == pytest.approx([2, 0.5, 0.25])
    with torch.no_grad():
        balancer.log_spreads.copy_(values.log())  # a loss of its own size is where it comes to rest
    sum(balancer(*given).values()).backward()
    assert balancer.log_spreads.grad.tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_state_of_a_balancer_goes_on(pair):
    first = build_objective(net(), TERMS, teacher=net(1), balance=GradientBalance())
    first(pair)
    first.balancer.agrees.copy_(torch.tensor([False, True]))
    second = build_objective(net(), TERMS, teacher=net(1), balance=GradientBalance())
    second.load_state_dict(first.state_dict())
    assert second.balancer.factors() == first.balancer.factors()
    assert second.balancer.factors()["output_l1"] == 0 < second.balancer.factors()["output_mse"]


@pytest.mark.parametrize("missing", [(), ("norms",), ("norms", "agrees")])
def test_a_state_with_means_of_another_kind_goes_on_with_new_ones(pair, caplog, missing):
    first, second = (
        build_objective(net(), TERMS, teacher=net(1), balance=GradientBalance(gate=False)) for _ in range(2)
    )
    first(pair)
    older = first.state_dict()
    older["balancer.found"] = 0.5 * older.pop("balancer.peaks")
    for name in missing:
        del older[f"balancer.{name}"]
    second.load_state_dict(older)
    assert second.balancer.factors() == {} and "they are found anew" in caplog.text
    second(pair)
    assert second.balancer.factors() == pytest.approx(first.balancer.factors())


def test_without_a_balancer_weights_are_those_that_were_asked_for(pair):
    objective = build_objective(net(), TERMS, teacher=net(1))
    objective(pair)
    assert objective.after_step() == {
        "weight/pixel_l1": 1,
        "weight/output_l1": 1,
        "weight/output_mse": 0.5,
    }
