"""Train the output to look like the target to another network, which never learns.

Sources: Johnson et al., Perceptual Losses for Real-Time Style Transfer and Super-Resolution, ECCV 2016; Ledig
et al., SRGAN, CVPR 2017 (VGG19 behind its activations); Wang et al., ESRGAN, ECCVW 2018 (before them).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.errors import RequestError
from kdsr.objectives.step import Parts, Step, Taps, Term
from kdsr.objectives.teachers import Ensemble
from kdsr.terms import PerceptualTerm

EPSILON = 1e-6


class PerceptualDistance(Term):
    """Distance of features, both divided by the root mean square that the target's have."""

    def __init__(self, config: PerceptualTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._config = config
        self._distance = F.l1_loss if config.loss == "l1" else F.mse_loss
        weights = config.tap_weights or tuple(1 / len(config.taps) for _ in config.taps)
        self._weights = dict(zip(config.taps, weights, strict=True))
        # Referred to, not owned: it never learns and has no place in a checkpoint.
        self._taps = Taps(_network(config, parts), config.taps, who="the perceptual network")

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        with torch.no_grad():
            wanted = self._taps.features(self._target(step).to(step.sr.dtype))
        found = self._taps.features(step.sr)
        return torch.stack([self._at(tap, found[tap], wanted[tap]) for tap in self._weights]).sum()

    def _target(self, step: Step) -> Tensor:
        return step.pair.hr if self._config.target == "hr" else step.teacher_sr

    def _at(self, tap: str, found: Tensor, wanted: Tensor) -> Tensor:
        wanted = wanted.float()
        loudness = torch.rsqrt(wanted.square().mean(dim=(1, 2, 3), keepdim=True) + EPSILON)
        return self._weights[tap] * self._distance(found.float() * loudness, wanted * loudness)


def _network(config: PerceptualTerm, parts: Parts) -> nn.Module:
    """The one that is named, or the teacher. Raises RequestError."""
    if config.network is not None:
        return parts.networks[config.network]
    if parts.teacher is None:
        raise RequestError("the perceptual term looks with the teacher; found none; set its network")
    return parts.teacher.first if isinstance(parts.teacher, Ensemble) else parts.teacher
