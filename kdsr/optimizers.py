"""What moves the weights: Adam, AdamW, and Muon for kernels."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """One that moves what learns of `model`. Weight decay is for kernels and matrices, and nothing else."""
    groups = _groups(model, config)
    if config.kind == "muon":
        return Muon(groups, lr=config.learning_rate, momentum=config.momentum, betas=config.betas)
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.learning_rate, betas=config.betas, weight_decay=0.0, foreach=True)


def _groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters that decay, those that do not (biases, gains, slopes, and biases of positions), and kernels.

    Kernels are a group of their own where the optimizer moves them in another way than the rest.
    """
    orthogonal: list[nn.Parameter] = []
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2 or "bias" in name.rpartition(".")[-1]:
            others.append(parameter)
        elif config.kind == "muon" and parameter.shape[1] > 1:
            orthogonal.append(parameter)
        else:
            (decaying if config.weight_decay > 0 else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": orthogonal, "weight_decay": config.weight_decay, "is_orthogonal": True},
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others},
    ]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.AdamW):
    """Moves groups with `is_orthogonal` by the nearest orthogonal matrix to their momentum, others by AdamW.

    Every direction of a kernel so moves equally far, the seldom ones too, which plain momentum leaves behind.
    A kernel (num_out, num_in, h, w) is a matrix of num_out rows. The step is scaled to the root mean square
    that Adam's has, so that one learning rate does for both.

    Sources: Jordan et al., Muon, 2024 (Nesterov momentum, Newton-Schulz with five steps); Liu et al., Muon is
    Scalable for LLM Training, arXiv:2502.16982 (the scale, decoupled decay). torch.optim.Muon has no room for
    kernels, which are of four dimensions.
    """

    def __init__(
        self, params: list[dict[str, Any]], *, lr: float, momentum: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=0.0, foreach=True)
        self._momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient. The gradient of those moved here is gone afterwards."""
        assert closure is None
        for group in self.param_groups:
            if group.get("is_orthogonal"):
                self._move(group["params"], rate=group["lr"], weight_decay=group["weight_decay"])
        super().step()

    def _move(self, parameters: Iterable[nn.Parameter], *, rate: float, weight_decay: float) -> None:
        ahead: dict[nn.Parameter, Tensor] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                # AdamW's own names, for it reads the state of every parameter that it is given.
                state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(parameter.grad, 1 - self._momentum)
            ahead[parameter] = parameter.grad.lerp(state["exp_avg"], self._momentum)
            parameter.grad = None  # AdamW passes over it
        for parameter, step in zip(ahead, orthogonal_steps(list(ahead.values())), strict=True):
            parameter.mul_(1 - rate * weight_decay)
            parameter.sub_(step, alpha=rate)


RMS_OF_ADAM = 0.2
"""What Adam's steps have in practice, for a learning rate of one."""

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Draws singular values between a hundredth and one to between 0.68 and 1.14 in five steps."""

NUM_QUINTIC_STEPS = 5


def orthogonal_steps(directions: Sequence[Tensor]) -> list[Tensor]:
    """About the nearest matrix to each that has equal singular values, of a root mean square of 0.2.

    A direction is (num_out, num_in, ...), and everything behind num_out is one dimension of the matrix. Those
    of one shape, as most layers of a chain are, pass together: the products are small, and many.
    """
    places: dict[torch.Size, list[int]] = {}
    for place, direction in enumerate(directions):
        places.setdefault(direction.shape, []).append(place)
    steps = list(directions)
    for same in places.values():
        matrices = torch.stack([directions[place].flatten(1).float() for place in same])
        for place, matrix in zip(same, _orthogonal(matrices), strict=True):
            steps[place] = matrix.view(directions[place].shape).to(directions[place].dtype)
    return steps


def _orthogonal(matrices: Tensor) -> Tensor:
    """(n, rows, columns) with a polynomial that leads all singular values to about one, and scaled."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-12)
    linear, cubic, quintic = QUINTIC
    for _ in range(NUM_QUINTIC_STEPS):
        square = x @ x.mT
        x = linear * x + (cubic * square + quintic * square @ square) @ x
    return RMS_OF_ADAM * math.sqrt(max(x.shape[1:])) * (x.mT if is_tall else x).contiguous()
