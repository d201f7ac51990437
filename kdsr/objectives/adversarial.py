"""Train outputs that a discriminator cannot tell from real ones; it learns after each step of the student.

Sources: Goodfellow et al., NeurIPS 2014 (non-saturating); Lim and Ye, 2017 (hinge); Jolicoeur-Martineau, ICLR
2019, and Wang et al., ESRGAN, ECCVW 2018 (relativistic); Mescheder et al., ICML 2018 (R1).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from kdsr.errors import NonFiniteLoss
from kdsr.models.discriminators import build_discriminator
from kdsr.objectives.step import Parts, Step, Term, gradient_norm
from kdsr.terms import AdversarialTerm

BETAS = (0.0, 0.99)


class AdversarialDistance(Term):
    """How well the discriminator tells the student's outputs apart. It is never the student's ally."""

    def __init__(self, config: AdversarialTerm, parts: Parts) -> None:
        super().__init__(config, parts)
        self._config = config
        spec = config.discriminator.model_copy(update={"channels": parts.channels})
        # Without a gradient but for its own step, so that the student's optimiser never moves it.
        self.discriminator = build_discriminator(spec).requires_grad_(False)
        self._optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.learning_rate, betas=BETAS, foreach=True
        )

    def forward(self, step: Step) -> Tensor:
        """See `Term`."""
        with torch.autocast(step.sr.device.type, enabled=False):
            fake = self._judged(step.sr, step)
            if self._config.loss != "relativistic":
                return -fake.mean() if self._config.loss == "hinge" else F.softplus(-fake).mean()
            with torch.no_grad():
                real = self._judged(self._real(step), step)
            return relativistic(fake, real)

    def after_step(self, steps: Sequence[Step]) -> dict[str, float]:
        """One step of the discriminator; returns its loss, and how often it was right. See `Term`."""
        told = {"discriminator": 0.0, "told_apart": 0.0}
        whole = sum(step.pair.weight for step in steps)
        self.discriminator.requires_grad_(True)
        try:
            for step in steps:
                for name, value in self._learn(step).items():
                    told[name] += value * step.pair.weight / whole
            self._share_gradients()
            self._require_finite(told["discriminator"])
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        finally:
            self.discriminator.requires_grad_(False)
        self._share_buffers()
        return told

    def _require_finite(self, loss: float) -> None:
        name = f"the discriminator's {self._config.loss} loss"
        gradient = gradient_norm(self.discriminator.parameters())
        for what, value in ((name, loss), (f"the gradient of {name}", gradient)):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"{what} is {value}")

    def _learn(self, step: Step) -> dict[str, float]:
        """Add what one batch asks of the discriminator to its gradients."""
        with torch.autocast(step.sr.device.type, enabled=False):
            real_images = self._real(step).clone().requires_grad_(self._config.r1 > 0)
            real = self._judged(real_images, step)
            fake = self._judged(step.sr.detach(), step)
            loss = self._loss(real, fake)
            if self._config.r1 > 0:
                loss = loss + 0.5 * self._config.r1 * squared_gradient(real, real_images)
            (loss * step.pair.weight).backward()
        return {"discriminator": loss.item(), "told_apart": self._told_apart(real, fake).item()}

    def _told_apart(self, real: Tensor, fake: Tensor) -> Tensor:
        """Share of right verdicts; where differences alone are learned, zero is no border between them."""
        if self._config.loss == "relativistic":
            real, fake = real - fake.mean(), fake - real.mean()
        return 0.5 * ((real > 0).float().mean() + (fake <= 0).float().mean())

    def _real(self, step: Step) -> Tensor:
        return (step.pair.hr if self._config.real == "hr" else step.teacher_sr).float()

    def _judged(self, images: Tensor, step: Step) -> Tensor:
        images = 2 * images.float() - 1
        spread = 2 * self._config.noise * (1 - step.pair.progress)
        if spread > 0:
            images = images + spread * torch.randn_like(images)
        logits: Tensor = self.discriminator(images)
        return logits

    def _loss(self, real: Tensor, fake: Tensor) -> Tensor:
        match self._config.loss:
            case "hinge":
                return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            case "relativistic":
                return relativistic(real, fake)
            case _:
                return F.softplus(-real).mean() + F.softplus(fake).mean()

    def _share_gradients(self) -> None:
        """The mean over all workers, whose discriminators then stay alike."""
        if not _has_peers():
            return
        for parameter in self.discriminator.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()

    def _share_buffers(self) -> None:
        """Those of the first worker, which are saved: spectral norms come nearer with every micro-batch."""
        if _has_peers():
            for buffer in self.discriminator.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def get_extra_state(self) -> dict[str, Any]:
        """The discriminator's optimiser."""
        return self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_extra_state` gave."""
        self._optimizer.load_state_dict(state)


def _has_peers() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def relativistic(better: Tensor, worse: Tensor) -> Tensor:
    """Low when `better` looks more real than the mean of `worse`, and `worse` less than that of `better`."""
    return 0.5 * (F.softplus(worse.mean() - better).mean() + F.softplus(worse - better.mean()).mean())


def squared_gradient(logits: Tensor, images: Tensor) -> Tensor:
    """Mean over images of the squared norm of the logits' gradient."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()
