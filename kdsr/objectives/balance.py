"""Factors that keep several terms in balance, beside the weights that were asked for.

Sources: Chen et al., GradNorm, ICML 2018; Du et al., Adapting Auxiliary Losses Using Gradient Similarity,
2018; Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from kdsr.terms import Balance, FixedBalance, GradientBalance, UncertaintyBalance

log = logging.getLogger(__name__)

TINY = 1e-12


class Balancer(nn.Module, ABC):
    """Turns values of terms into what is minimised. Its state is a run's, like that of the terms."""

    @abstractmethod
    def forward(
        self, values: Mapping[str, Tensor], weights: Mapping[str, float], share: float | None = 1.0
    ) -> dict[str, Tensor]:
        """Each scalar with its weight and its factor.

        `share` is what the batch counts for among those of all workers, None for further micro-batches of a
        step, whose first one has told what there is to find.
        """

    @abstractmethod
    def factors(self) -> dict[str, float]:
        """What each term was multiplied by in the last pass, its own weight left out."""


class Fixed(Balancer):
    """The weights that were asked for, and nothing else."""

    def forward(
        self, values: Mapping[str, Tensor], weights: Mapping[str, float], share: float | None = 1.0
    ) -> dict[str, Tensor]:
        """See `Balancer`."""
        del share
        return {name: weights[name] * value for name, value in values.items()}

    def factors(self) -> dict[str, float]:
        """See `Balancer`."""
        return {}


class ByGradient(Balancer):
    """See `GradientBalance`. All workers find the same."""

    norms: Tensor
    """(2, n): of the gradient of the reference terms where each term has one too, and of the term's own, in
    the mean over its looks; NaN before."""
    peaks: Tensor
    """(n,): the most that the mean norm of each term has been; NaN before its first look."""
    agrees: Tensor
    """Whether the gate was open to each term at the last look."""
    steps: Tensor

    def __init__(self, config: GradientBalance, student: nn.Module, kinds: Mapping[str, str]) -> None:
        super().__init__()
        self._config = config
        self._reference = [name for name, kind in kinds.items() if kind in config.reference]
        self._others = [name for name in kinds if name not in self._reference]
        self._student = [student]  # referred to, not owned
        self.register_buffer("norms", torch.full((2, len(self._others)), torch.nan))
        self.register_buffer("peaks", torch.full((len(self._others),), torch.nan))
        self.register_buffer("agrees", torch.ones(len(self._others), dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_forget_other_means)

    def forward(
        self, values: Mapping[str, Tensor], weights: Mapping[str, float], share: float | None = 1.0
    ) -> dict[str, Tensor]:
        """See `Balancer`."""
        if share is not None:
            if int(self.steps) % self._config.every_steps == 0 or self._is_new(values):
                self._look(values, weights, share)
            self.steps += 1
        factors = self.factors()
        return {name: weights[name] * factors.get(name, 1.0) * value for name, value in values.items()}

    def factors(self) -> dict[str, float]:
        """See `Balancer`."""
        found = self._config.share * self.norms[0] / self.peaks
        told = zip(self._others, found.tolist(), self.agrees.tolist(), strict=True)
        return {name: factor if agrees else 0.0 for name, factor, agrees in told if not math.isnan(factor)}

    def _is_new(self, values: Mapping[str, Tensor]) -> bool:
        """Whether a term takes part for the first time."""
        return any(name in values and name not in self.factors() for name in self._others)

    def _look(self, values: Mapping[str, Tensor], weights: Mapping[str, float], share: float) -> None:
        reference_terms = [weights[name] * values[name] for name in self._reference if name in values]
        if not reference_terms:
            return
        reference = self._gradient(torch.stack(reference_terms).sum(), share)
        for place, name in enumerate(self._others):
            if name not in values:
                continue
            gradient = self._gradient(values[name], share)
            norm = gradient.norm().item()
            if norm < TINY:  # nothing to compare: a term that is new is looked at again in the next step
                continue
            self.agrees[place] = not self._config.gate or bool(torch.dot(reference, gradient) > 0)
            self._remember(place, reference[gradient != 0].norm().item(), norm)

    def _remember(self, place: int, reference: float, norm: float) -> None:
        """Take what one look found into the means; the gate is apart from them, and so acts at once.

        Both norms are of the parameters that the term reaches. One with taps in the first layers would get,
        of a whole network's gradient, many times what the reference terms have there.
        """
        before, now = self.norms[:, place], self.norms.new_tensor([reference, norm])
        kept = 0.0 if before.isnan().any() else self._config.memory
        self.norms[:, place] = kept * before.nan_to_num() + (1 - kept) * now
        # A term whose gradient fades has been learned: with a factor that gave it its share again, what is
        # left of it, mostly noise, would pull as hard as it did.
        self.peaks[place] = torch.fmax(self.peaks[place], self.norms[1, place])

    def _gradient(self, value: Tensor, share: float) -> Tensor:
        """Of the student's parameters, in one row: the mean over all workers, as the optimiser sees it."""
        parameters = [parameter for parameter in self._student[0].parameters() if parameter.requires_grad]
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        row = torch.cat(
            [
                (torch.zeros_like(parameter) if gradient is None else gradient).flatten().float()
                for parameter, gradient in zip(parameters, found, strict=True)
            ]
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Shares need not have a mean of 1: those of first micro-batches have not.
            row = torch.cat([share * row, row.new_tensor([share])])
            torch.distributed.all_reduce(row)
            row = row[:-1] / row[-1]
        return row


def _forget_other_means(balancer: ByGradient, state: dict[str, Any], prefix: str, *_others: object) -> None:
    """Let a state of other means load: those of factors, or of norms over all parameters, are found anew."""
    if state.pop(f"{prefix}found", None) is None:
        return
    log.warning("the checkpoint has means of another kind in its gradient balance: they are found anew")
    for name, fresh in (("norms", torch.nan), ("peaks", torch.nan), ("agrees", True)):
        state[f"{prefix}{name}"] = torch.full_like(getattr(balancer, name), fresh)


class ByUncertainty(Balancer):
    """See `UncertaintyBalance`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)
        self._used = torch.ones(len(names))
        self.log_spreads = nn.Parameter(torch.zeros(len(names)))

    def forward(
        self, values: Mapping[str, Tensor], weights: Mapping[str, float], share: float | None = 1.0
    ) -> dict[str, Tensor]:
        """See `Balancer`."""
        del share
        places = {name: place for place, name in enumerate(self._names)}
        spreads = self.log_spreads.float()
        self._used = torch.exp(-spreads.detach())
        return {
            name: weights[name] * (value * torch.exp(-spreads[places[name]]) + spreads[places[name]])
            for name, value in values.items()
        }

    def factors(self) -> dict[str, float]:
        """See `Balancer`."""
        return dict(zip(self._names, self._used.tolist(), strict=True))


def build_balancer(config: Balance, student: nn.Module, kinds: Mapping[str, str]) -> Balancer:
    """The one that `config` asks for; `kinds` are those of the terms, by their names."""
    match config:
        case GradientBalance():
            return ByGradient(config, student, kinds)
        case UncertaintyBalance():
            return ByUncertainty(list(kinds))
        case FixedBalance():
            return Fixed()
