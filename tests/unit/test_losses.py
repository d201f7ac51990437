"""Distances: zero for the same, the textbook value otherwise, and in float32 whatever comes in."""

from typing import get_args

import pytest
import torch

from kdsr.errors import ImageTooSmall
from kdsr.losses import CHARBONNIER_EPSILON, LOSSES
from kdsr.metrics import ssim_y
from kdsr.terms import PixelLoss

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


POINTWISE = ["l1", "mse", "charbonnier"]
PHOTO = torch.rand(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
NEAR, FAR = 0.9 * PHOTO + 0.05, 0.5 * PHOTO.flip(-1) + 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_nearer_images_have_a_smaller_loss_and_a_step_downhill_brings_them_nearer(name):
    sr = NEAR.clone().requires_grad_()
    loss = LOSSES[name](sr, PHOTO)
    loss.backward()
    assert 0 < loss.item() < LOSSES[name](FAR, PHOTO).item()
    assert LOSSES[name](sr.detach() - 1e-3 * sr.grad / sr.grad.norm(), PHOTO) < loss
    assert LOSSES[name](PHOTO, PHOTO).item() == pytest.approx(
        CHARBONNIER_EPSILON if name == "charbonnier" else 0, abs=1e-6
    )


def test_ssim_is_that_of_the_metric():
    grey = (PHOTO[:1, :1] * 255).round()
    other = (NEAR[:1, :1] * 255).round()
    as_pixels = [image[0].permute(1, 2, 0).to(torch.uint8).numpy() for image in (other, grey)]
    # The metric squeezes grey into the studio range, which changes its constants' share a little.
    assert 1 - LOSSES["ssim"](other / 255, grey / 255).item() == pytest.approx(
        ssim_y(*as_pixels, border=0), abs=2e-3
    )


def test_ms_ssim_takes_the_scales_that_fit():
    small, large = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 176, 176)
    assert LOSSES["ms_ssim"](small, 1 - small) > 0.5
    assert LOSSES["ms_ssim"](large, large).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
def test_images_smaller_than_the_window_are_refused(name):
    with pytest.raises(ImageTooSmall, match=r"11 x 11 pixels; found images of 10 x 40.*patch_size"):
        LOSSES[name](PHOTO[..., :10, :], PHOTO[..., :10, :])


def test_fft_l1_is_the_distance_of_spectra():
    flat, wave = torch.zeros(1, 1, 8, 8), torch.cos(torch.arange(8) * torch.pi / 2).expand(1, 1, 8, 8)
    # One frequency of strength 64 / 2 in 8 x 5 complex numbers.
    assert LOSSES["fft_l1"](wave, flat).item() == pytest.approx(32 / (8 * 5 * 2), rel=1e-4)


@pytest.mark.parametrize("name", POINTWISE)
def test_the_same_image_is_nearest_and_the_gradient_leads_there(name):
    sr = SR.clone().requires_grad_()
    LOSSES[name](sr, HR).backward()
    assert (sr.grad * (SR - HR) >= 0).all() and (sr.grad * (SR - HR)).sum() > 0
    assert LOSSES[name](HR, HR).item() == pytest.approx(CHARBONNIER_EPSILON if name == "charbonnier" else 0)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_measured_in_float32(name):
    sr = torch.full((1, 1, 64, 64), 0.5, dtype=torch.bfloat16)
    target = torch.full((1, 1, 64, 64), 0.5 + 2**-12)
    value = LOSSES[name](sr, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(LOSSES[name](sr.float(), target).item())
    assert value.item() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_finite_where_nothing_differs(name):
    sr = PHOTO.clone().requires_grad_()
    LOSSES[name](sr, PHOTO).backward()
    assert torch.isfinite(sr.grad).all()
