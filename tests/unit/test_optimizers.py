"""What moves the weights, against torch's own optimizers."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kdsr.config import DataConfig, MemoryConfig, OptimizerConfig, TeacherTrainingConfig
from kdsr.models import build_model
from kdsr.optimizers import RMS_OF_ADAM, build_optimizer, orthogonal_steps
from kdsr.spec import EdsrSpec, MobileSpec

RATE, DECAY = 1e-2, 0.1


def moved(network, optimizer, gradients):
    """Weights of `network` after a step with each of `gradients`, lists of one tensor a parameter."""
    for given in gradients:
        for parameter, gradient in zip(network.parameters(), given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def gradients_of(network, *, num_steps, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = [parameter.shape for parameter in network.parameters()]
    return [[torch.randn(shape, generator=random) for shape in shapes] for _ in range(num_steps)]


@pytest.mark.parametrize("shape", [(4, 30), (30, 4), (12, 12), (8, 3, 3, 3), (48, 2, 1, 1)])
def test_a_direction_becomes_the_nearest_orthogonal_matrix_of_adams_size(shape):
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (step,) = orthogonal_steps([1e3 * direction])
    assert step.shape == direction.shape and step.dtype == direction.dtype
    left, _, right = torch.linalg.svd(direction.flatten(1), full_matrices=False)
    nearest = left @ right
    assert torch.cosine_similarity(step.flatten(), nearest.flatten(), dim=0) > 0.97
    spread = torch.linalg.svdvals(step.flatten(1)) / (RMS_OF_ADAM * max(step.flatten(1).shape) ** 0.5)
    assert spread.min() > 0.6 and spread.max() < 1.3
    assert step.square().mean().sqrt().item() == pytest.approx(RMS_OF_ADAM, rel=0.25)


def test_directions_become_what_each_becomes_alone_in_their_order():
    random = torch.Generator().manual_seed(0)
    shapes = [(6, 4, 3, 3), (5, 7), (6, 4, 3, 3), (7, 5), (6, 36)]
    directions = [torch.randn(shape, generator=random) for shape in shapes]
    together = orthogonal_steps(directions)
    for direction, step in zip(directions, together, strict=True):
        assert step.shape == direction.shape
        assert torch.allclose(step, orthogonal_steps([direction])[0], atol=1e-5)


def test_a_direction_of_nothing_is_no_step():
    assert not orthogonal_steps([torch.zeros(4, 5, 3, 3)])[0].any()


def test_matrices_move_as_those_of_torchs_muon_and_the_rest_as_those_of_its_adamw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 30))
    plain = copy.deepcopy(network)
    config = OptimizerConfig(
        kind="muon", learning_rate=RATE, weight_decay=DECAY, momentum=0.9, betas=(0.5, 0.6)
    )
    gradients = gradients_of(network, num_steps=4)
    own = moved(network, build_optimizer(network, config), gradients)
    matrices = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in plain.parameters() if parameter.dim() == 1]
    muon = torch.optim.Muon(
        matrices, lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(biases, lr=RATE, betas=(0.5, 0.6), weight_decay=0)
    for given in gradients:
        for parameter, gradient in zip(plain.parameters(), given, strict=True):
            parameter.grad = gradient.clone()
        muon.step()
        adamw.step()
    for name, theirs in plain.named_parameters():
        # Torch's own steps are of bfloat16, of which a thousandth of a step of 0.01 is left after four.
        tolerance = 4 * RATE * 0.02 if theirs.dim() > 1 else 1e-7
        assert (own[name] - theirs).abs().max() < tolerance, name


def test_kernels_of_single_channels_move_as_those_of_adamw():
    torch.manual_seed(0)
    network = build_model(MobileSpec(scale=2, num_features=6, num_blocks=1))
    plain, gradients = copy.deepcopy(network), gradients_of(network, num_steps=3)
    own = moved(network, build_optimizer(network, OptimizerConfig(kind="muon")), gradients)
    theirs = moved(plain, build_optimizer(plain, OptimizerConfig(kind="adamw")), gradients)
    equal = {name for name, weights in own.items() if torch.equal(weights, theirs[name])}
    assert equal == {name for name, weights in own.items() if weights.dim() < 2 or weights.shape[1] == 1}
    assert any(own[name].dim() == 4 for name in equal)


def test_parameters_without_a_gradient_stay_what_they_are():
    network = nn.Linear(3, 4)
    optimizer = build_optimizer(network, OptimizerConfig(kind="muon", weight_decay=DECAY))
    before = copy.deepcopy(network.state_dict())
    optimizer.step()
    assert all(torch.equal(before[name], weights) for name, weights in network.state_dict().items())


def test_muon_is_refused_where_no_worker_has_a_whole_gradient():
    with pytest.raises(
        ValidationError, match="optimizer muon takes .* memory.shard_teacher .* adam or adamw"
    ):
        TeacherTrainingConfig(
            name="parts",
            output="out",
            data=DataConfig(shards="shards"),
            model=EdsrSpec(scale=2),
            optimizer=OptimizerConfig(kind="muon"),
            memory=MemoryConfig(shard_teacher=True),
        )
