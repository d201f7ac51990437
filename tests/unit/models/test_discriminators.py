"""Discriminators: a logit for each place, gradients everywhere, layers that stretch nothing."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from kdsr.errors import RequestError
from kdsr.models.discriminators import DISCRIMINATORS, build_discriminator
from kdsr.spec import (
    DiscriminatorSpec,
    PatchDiscriminatorSpec,
    SrganDiscriminatorSpec,
    UnetDiscriminatorSpec,
)

SPECS = [kind(num_features=4) for kind in DISCRIMINATORS]  # type: ignore[call-arg]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
with_and_without = pytest.mark.parametrize("spectral_norm", [True, False])


def build(spec, **changes):
    torch.manual_seed(0)
    return build_discriminator(spec.model_copy(update=changes))


@with_and_without
@pytest.mark.parametrize(
    ("spec", "size", "logits"),
    [
        (SrganDiscriminatorSpec(num_features=4), (48, 33), (1, 1)),
        (SrganDiscriminatorSpec(num_features=4), (16, 16), (1, 1)),
        (PatchDiscriminatorSpec(num_features=4), (256, 64), (30, 6)),
        (PatchDiscriminatorSpec(num_features=4), (24, 33), (1, 2)),
        (PatchDiscriminatorSpec(num_features=4, num_levels=1), (6, 7), (1, 1)),
        (UnetDiscriminatorSpec(num_features=4), (48, 64), (48, 64)),
        (UnetDiscriminatorSpec(num_features=4), (8, 13), (8, 13)),
    ],
)
def test_logits_have_the_size_that_is_promised(spec, size, logits, spectral_norm):
    found = build(spec, spectral_norm=spectral_norm)(torch.rand(2, 3, *size))
    assert found.shape == (2, 1, *logits)


@each_spec
def test_the_smallest_size_is_enough_and_one_pixel_less_is_refused(spec):
    discriminator, least = build(spec), spec.min_size
    assert torch.isfinite(discriminator(torch.rand(1, 3, least, least))).all()
    with pytest.raises(RequestError, match=rf"{spec.kind}: .* at least {least}, found .*{least - 1}\)"):
        discriminator(torch.rand(1, 3, least + 5, least - 1))


@each_spec
def test_other_channels_are_refused_with_both_numbers(spec):
    with pytest.raises(RequestError, match=r"\(B, 3, h, w\).*\(1, 1, 64, 64\)"):
        build(spec)(torch.rand(1, 1, 64, 64))
    assert build(spec, channels=20)(torch.rand(1, 20, 32, 32)).shape[1] == 1


@each_spec
@with_and_without
def test_one_backward_pass_over_real_and_false_reaches_everything(spec, spectral_norm):
    discriminator = build(spec, spectral_norm=spectral_norm)
    false = torch.rand(2, 3, 48, 48, requires_grad=True)
    real = discriminator(torch.rand(2, 3, 48, 48))
    (discriminator(false) - real).square().mean().backward()
    assert false.grad is not None and false.grad.abs().max() > 0
    weights = [p for name, p in discriminator.named_parameters() if "bias" not in name]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in weights)


@each_spec
def test_a_penalty_on_the_gradient_can_be_minimised(spec):
    discriminator = build(spec)
    real = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    gradient.square().sum().backward()
    reached = [p.grad is not None and p.grad.abs().max() > 0 for p in discriminator.parameters()]
    assert any(reached)


def largest_singular_values(discriminator):
    layers = [layer for layer in discriminator.modules() if isinstance(layer, torch.nn.Conv2d)]
    return torch.stack([torch.linalg.matrix_norm(layer.weight.flatten(1), 2) for layer in layers])


@each_spec
def test_spectral_normalisation_holds_every_layer_at_one(spec):
    discriminator = build(spec).train()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(7)
        for _ in range(60):
            discriminator(torch.rand(1, 3, 32, 32))
        assert (largest_singular_values(discriminator) - 1).abs().max() < 0.05
        without = build(spec, spectral_norm=False)
        for parameter in without.parameters():
            parameter.mul_(7)
        assert (largest_singular_values(without) - 1).abs().max() > 0.5


@each_spec
def test_one_sample_is_judged_without_the_others_of_its_batch(spec):
    discriminator = build(spec).eval()
    batch = torch.rand(3, 3, 32, 32)
    assert torch.allclose(discriminator(batch)[:1], discriminator(batch[:1]), atol=1e-6)


@each_spec
def test_a_spec_comes_back_from_json_by_its_kind(spec):
    adapter = TypeAdapter(DiscriminatorSpec)
    assert adapter.validate_json(spec.model_dump_json()) == spec


def test_an_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match="'srgan', 'patch', 'unet'"):
        TypeAdapter(DiscriminatorSpec).validate_python({"kind": "vgg"})
