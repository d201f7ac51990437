"""Distances: zero for the same, the textbook value otherwise, and in float32 whatever comes in."""

from typing import get_args

import pytest
import torch

from kdsr.config import PixelLoss
from kdsr.losses import CHARBONNIER_EPSILON, LOSSES

SR = torch.tensor([[0.0, 0.5], [1.0, 0.25]])
HR = torch.tensor([[0.0, 0.0], [0.0, 0.75]])


def test_every_loss_that_a_config_can_ask_for_is_there():
    assert set(LOSSES) == set(get_args(PixelLoss))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l1", (0.5 + 1 + 0.5) / 4),
        ("mse", (0.25 + 1 + 0.25) / 4),
        ("charbonnier", (1e-3 + 2 * (0.25 + 1e-6) ** 0.5 + (1 + 1e-6) ** 0.5) / 4),
    ],
)
def test_values_are_those_of_the_formula(name, expected):
    assert LOSSES[name](SR, HR).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_image_is_nearest_and_the_gradient_leads_there(name):
    sr = SR.clone().requires_grad_()
    LOSSES[name](sr, HR).backward()
    assert (sr.grad * (SR - HR) >= 0).all() and (sr.grad * (SR - HR)).sum() > 0
    assert LOSSES[name](HR, HR).item() == pytest.approx(CHARBONNIER_EPSILON if name == "charbonnier" else 0)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_measured_in_float32(name):
    sr = torch.full((64, 64), 0.5, dtype=torch.bfloat16)
    target = torch.full((64, 64), 0.5 + 2**-12)
    value = LOSSES[name](sr, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(LOSSES[name](sr.float(), target).item())
    assert value.item() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_finite_where_nothing_differs(name):
    sr = HR.clone().requires_grad_()
    LOSSES[name](sr, HR).backward()
    assert torch.isfinite(sr.grad).all()
