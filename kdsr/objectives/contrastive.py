"""Train towards the teacher's output and away from what an earlier student made of noisy input.

Sources: Wang et al., Towards Compact Single Image Super-Resolution via Contrastive Self-distillation, IJCAI
2021, equation 3, for the ratio; DCKD, AAAI 2025, for negatives out of the student's own history; random
convolutions as a space are those of RLFN (Kong et al., CVPRW 2022).
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.objectives.step import Parts, Step, Term
from kdsr.terms import ContrastiveTerm

LAYER_WEIGHTS = (0.25, 0.5, 1.0)
"""First layers count less, as in CSD."""
SEED = 20_210_819
WHITE = 255.0


class RandomFeatures(nn.Module):
    """Three 3x3 convolutions with tanh whose weights are drawn once and never learn: the same everywhere."""

    def __init__(self, channels: int, num_features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        widths = [channels] + [num_features] * len(LAYER_WEIGHTS)
        self.layers = nn.ModuleList(
            nn.Conv2d(wide, num_features, 3, padding=1, bias=False) for wide in widths[:-1]
        )
        for layer in self.layers:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            # Variance 1 / fan-in, and no answer to plain colour: edges are what has to be told apart.
            drawn = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
            weight.data = drawn - drawn.mean(dim=(2, 3), keepdim=True)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to (B, F, H, W) of each layer."""
        found, features = [], 2 * images.float() - 1
        for layer in self.layers:
            features = torch.tanh(4 * layer(features))
            found.append(features)
        return found


class ContrastiveDistance(Term):
    """Sum over layers of |f(S) - f(T)| / sum over negatives of |f(S) - f(N)|."""

    steps: Tensor

    def __init__(self, config: ContrastiveTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._config = config
        # Referred to, not owned: the run keeps the student's own state.
        self._student = [parts.student]
        self.space = RandomFeatures(parts.channels, config.num_features)
        self.history = copy.deepcopy(parts.student).eval().requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        with torch.autocast(step.sr.device.type, enabled=False):
            negatives = [self._negative(step.pair.lr) for _ in range(self._config.num_negatives)]
            with torch.no_grad():
                positive = self.space(step.teacher_sr)
                others = [self.space(negative) for negative in negatives]
            found = self.space(step.sr)
            return contrast(found, positive, others)

    @torch.no_grad()
    def _negative(self, lr: Tensor) -> Tensor:
        least, most = (level / WHITE for level in self._config.noise)
        spread = least + (most - least) * torch.rand(len(lr), 1, 1, 1, device=lr.device)
        noisy: Tensor = self.history((lr + spread * torch.randn_like(lr)).clamp(0, 1))
        return noisy.clamp(0, 1)

    @torch.no_grad()
    def after_step(self, steps: Sequence[Step]) -> dict[str, float]:
        """Take the student into the history when it is time."""
        del steps
        self.steps += 1
        if int(self.steps) % self._config.refresh_steps == 0:
            self.history.load_state_dict(self._student[0].state_dict())
        return {}


def contrast(found: list[Tensor], positive: list[Tensor], negatives: list[list[Tensor]]) -> Tensor:
    """The ratio of distances, layer by layer; 1 / number of negatives where all are equally far."""
    total = found[0].new_zeros(())
    for layer, weight in enumerate(LAYER_WEIGHTS):
        near = F.l1_loss(found[layer], positive[layer])
        far = torch.stack([F.l1_loss(found[layer], negative[layer]) for negative in negatives]).sum()
        total = total + weight * near / (far + 1e-6)
    return total / sum(LAYER_WEIGHTS)
