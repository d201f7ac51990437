"""Channels that are dropped: where, when, and what is left of it in a model."""

import copy

import pytest
import torch
from torch import nn

from kdsr.models import MODELS, build_model, drop_channels, fold
from kdsr.models.contract import Convolves
from kdsr.spec import BicubicSpec, EspcnSpec
from tests.small_networks import SMALL

TRAINED = [
    spec(scale=2, **SMALL[spec.model_fields["kind"].default]) for spec in MODELS if spec is not BicubicSpec
]


def kind_of(spec):
    return spec.kind


def randomised(spec):
    torch.manual_seed(1)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
    return model.train()


@pytest.mark.parametrize("spec", TRAINED, ids=kind_of)
def test_all_that_is_learned_goes_through_the_last_convolution_and_none_comes_behind_it(spec):
    model, order = randomised(spec), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | Convolves):
            module.register_forward_hook(lambda module, *_: order.append(module))
    last = model.last_convolution
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.zero_()
    model(torch.rand(1, 3, 9, 8)).sum().backward()
    assert order[-1] is last and order.count(last) == 1
    within = {id(parameter) for parameter in last.parameters()}
    for name, parameter in model.named_parameters():
        assert id(parameter) in within or parameter.grad is None or not parameter.grad.any(), name


@pytest.mark.parametrize("spec", TRAINED, ids=kind_of)
def test_channels_are_dropped_in_training_alone_and_from_torchs_generator(spec):
    model, lr = randomised(spec), torch.rand(2, 3, 9, 8)
    plain = model(lr)
    drop_channels(model, 0.5)

    def trained(seed):
        torch.manual_seed(seed)
        return model.train()(lr)

    assert torch.equal(trained(0), trained(0)) and not torch.equal(trained(0), trained(1))
    assert not torch.allclose(trained(0), plain)
    assert torch.equal(model.eval()(lr), plain)
    assert torch.equal(copy.deepcopy(model).eval()(lr), plain)
    assert torch.allclose(fold(model)(lr), plain, atol=1e-5)


def test_whole_channels_are_lost_and_the_mean_stays():
    model, seen = randomised(EspcnSpec(scale=2, num_features=4)), []
    drop_channels(model, 0.25)
    model.last_convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    lr = torch.rand(1, 3, 6, 6).expand(400, -1, -1, -1)
    model(lr)
    model.eval()(lr)
    dropped, plain = seen
    kept = dropped.flatten(2).any(dim=2)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.08)
    assert torch.allclose(dropped[kept], plain[kept] / 0.75)


def test_bicubic_has_no_convolution_and_nothing_to_drop():
    model = build_model(BicubicSpec(scale=2))
    drop_channels(model, 0.5)
    lr = torch.rand(1, 3, 6, 6)
    assert model.last_convolution is None
    assert torch.equal(model.train()(lr), model.eval()(lr))
