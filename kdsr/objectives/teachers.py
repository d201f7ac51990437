"""Several teachers that answer as one.

Sources: You et al., Learning from Multiple Teacher Networks, KDD 2017; Zhang et al., Confidence-aware
Multi-teacher Knowledge Distillation, ICASSP 2022, for weights by the error where the truth is known.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Teachers of one scale. `temperature` is the error that lowers a teacher's weight by the factor e."""

    def __init__(self, teachers: Sequence[nn.Module], *, temperature: float) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self._temperature = temperature

    @property
    def first(self) -> nn.Module:
        """The one whose features are looked at."""
        return self.teachers[0]

    def forward(self, lr: Tensor) -> Tensor:
        """One answer (B, C, H, W) in [0, 1], each teacher weighted by how near it is to the mean of all."""
        answers = self._answers(lr)
        return self._mixed(answers, answers.mean(dim=0))

    def knowing(self, lr: Tensor, hr: Tensor) -> Tensor:
        """One answer (B, C, H, W) in [0, 1], each teacher weighted by how near it is to HR."""
        return self._mixed(self._answers(lr), hr)

    def _answers(self, lr: Tensor) -> Tensor:
        return torch.stack([teacher(lr).float().clamp(0, 1) for teacher in self.teachers])

    def _mixed(self, answers: Tensor, truth: Tensor) -> Tensor:
        """Answers (K, B, C, H, W) with weights that all channels of a pixel share."""
        error = (answers - truth.float()).abs().mean(dim=2, keepdim=True)
        return (torch.softmax(-error / self._temperature, dim=0) * answers).sum(dim=0)
