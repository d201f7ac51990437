"""What the terms of one training step share: each network runs once, and only when a term asks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.errors import RequestError
from kdsr.memory import without_gradients
from kdsr.models import build_model
from kdsr.objectives.teachers import Ensemble
from kdsr.pairs import PairBatch
from kdsr.spec import ModelSpec

PROBE_SIZE = 16
"""Height and width of the input with which the width of features is found."""
MOST_LISTED = 40
"""Taps that an error names one by one."""


class _SeenAllError(Exception):
    """Ends a forward pass behind the last tap."""


class Taps:
    """Reads what chosen submodules of a network give. Raises RequestError for one that does not exist."""

    def __init__(self, network: nn.Module, names: Iterable[str], *, who: str) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._network, self._who = network, who
        self._read: dict[str, Tensor] | None = None
        self._stops = False
        modules = dict(network.named_modules())
        for name in self._names:
            require_tap(name, tap_names(network), who=who)
            modules[name].register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._read is not None:
                self._read[name] = output
                if self._stops and len(self._read) == len(self._names):
                    raise _SeenAllError

        return keep

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """What the taps give for `images` (B, C, H, W); the network runs no further than the last of them."""
        read: dict[str, Tensor] = {}
        self._read, self._stops = read, True
        try:
            self._network(images)
        except _SeenAllError:
            pass
        finally:
            self._read, self._stops = None, False
        self._require_maps(read)
        return read

    def read(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's output when `run` runs it, and features (B, F, h, w) by the name of their tap."""
        self._read = {}
        try:
            output, read = run(), self._read
        finally:
            self._read = None
        self._require_maps(read)
        return output, read

    def _require_maps(self, read: Mapping[str, Tensor]) -> None:
        for name in self._names:
            features = read.get(name)
            if name not in read:
                raise RequestError(f"tap {name!r} of {self._who} is never run by itself; choose another")
            if not isinstance(features, Tensor) or features.dim() != 4:
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise RequestError(
                    f"tap {name!r} of {self._who} gives {shape}; expected features (B, F, h, w); "
                    f"choose another"
                )

    @torch.no_grad()
    def widths(self, channels: int) -> dict[str, int]:
        """Number of features F of each tap, found with a small grey input."""
        if not self._names:
            return {}
        device = next(self._network.parameters()).device
        grey = torch.full((1, channels, PROBE_SIZE, PROBE_SIZE), 0.5, device=device)
        _, read = self.read(lambda: self._network(grey))
        return {name: features.shape[1] for name, features in read.items()}


def tap_names(network: nn.Module) -> tuple[str, ...]:
    """Names of a network's taps: those of its spec, or for an imported network all submodules."""
    taps: tuple[str, ...] = getattr(getattr(network, "spec", None), "taps", ())
    return taps or tuple(name for name, _ in network.named_modules() if name)


@torch.no_grad()
def tap_grids(spec: ModelSpec, names: Iterable[str], *, size: int) -> dict[str, tuple[int, int]]:
    """Height and width of the features that taps of a network give for LR patches of `size` pixels."""
    network = build_model(spec)
    read = Taps(network, names, who=f"the {spec.kind}").features(torch.zeros(1, spec.channels, size, size))
    return {name: (features.shape[2], features.shape[3]) for name, features in read.items()}


def require_tap(name: str, known: Iterable[str], *, who: str) -> None:
    """Raise RequestError, with the taps that there are, for another one."""
    if name not in (names := tuple(known)):
        raise RequestError(f"{who} has no tap {name!r}; it has {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    """All names where they are few, else the outer ones: an imported network has hundreds of submodules."""
    depth = max((name.count(".") for name in names), default=0)
    shown = names
    while len(shown) > MOST_LISTED and depth > 0:
        depth -= 1
        shown = [name for name in names if name.count(".") <= depth]
    inner = len(names) - len(shown)
    return (", ".join(shown) or "none") + (f", and {inner} more inside these" if inner else "")


class Step:
    """One batch on its way through the student, and the teacher where a term wants to know what it says."""

    def __init__(
        self,
        pair: PairBatch,
        *,
        student: Callable[[Tensor], Tensor],
        student_taps: Taps | None = None,
        teacher: nn.Module | None = None,
        teacher_taps: Taps | None = None,
    ) -> None:
        self.pair = pair
        self._student, self._teacher, self._teacher_taps = student, teacher, teacher_taps
        self.features: Mapping[str, Tensor] = {}
        """The student's, by the name of their tap."""
        if student_taps is None:
            self.sr = student(pair.lr)
            """The student's output (B, C, H, W)."""
        else:
            self.sr, self.features = student_taps.read(lambda: student(pair.lr))

    def settle(self) -> None:
        """Let go of what only a backward pass needs, which is most of a step's memory."""
        self.sr, self.features = self.sr.detach(), {}
        if "_taught" in self.__dict__:
            self._taught = self._taught[0], {}

    def upscale(self, lr: Tensor) -> Tensor:
        """The student's output for another input, through which gradients flow too."""
        return self._student(lr)

    def teach(self, lr: Tensor) -> Tensor:
        """The teacher's output for another input, without a gradient, in [0, 1]. Raises RequestError."""
        if self._teacher is None:
            raise RequestError(
                "a term needs the teacher itself, not what is stored of it; found none; set teacher.uri"
            )
        with without_gradients(self._teacher):
            sr = self._teacher(lr)
        return _usable(sr).clamp(0, 1)

    @cached_property
    def teacher_sr(self) -> Tensor:
        """The teacher's output for the batch, in [0, 1]: the stored one where there is one."""
        if self.pair.teacher_sr is not None:
            return self.pair.teacher_sr
        if self._teacher is None:
            raise RequestError("an output term needs a teacher, or shards with its outputs; found neither")
        return self._taught[0]

    @property
    def teacher_features(self) -> Mapping[str, Tensor]:
        """The teacher's features for the batch, by the name of their tap: stored, or live."""
        if self._teacher_taps is not None:
            return self._taught[1]
        if self.pair.teacher_features is None:
            raise RequestError("a term needs the teacher's features, and they are neither live nor stored")
        return self.pair.teacher_features

    @cached_property
    def _taught(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._teacher is not None
        features: dict[str, Tensor] = {}
        with without_gradients(self._teacher):
            if self._teacher_taps is None:
                sr = self._answer()
            else:
                sr, features = self._teacher_taps.read(self._answer)
        return _usable(sr).clamp(0, 1), {name: _usable(tensor) for name, tensor in features.items()}

    def _answer(self) -> Tensor:
        """For the batch, whose HR several teachers may know."""
        assert self._teacher is not None
        if isinstance(self._teacher, Ensemble):
            return self._teacher.knowing(self.pair.lr, self.pair.hr)
        sr: Tensor = self._teacher(self.pair.lr)
        return sr


def _usable(tensor: Tensor) -> Tensor:
    """An inference tensor may not be saved for a backward pass; its copy may."""
    return tensor.float().clone()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Of all gradients that there are, together: not finite when any of them is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True).item()


Wrap = Callable[[nn.Module], Callable[..., Tensor]]
"""Makes a network data-parallel."""


@dataclass(frozen=True)
class Parts:
    """What terms are built from."""

    student: nn.Module
    """Not wrapped."""
    scale: int = 4
    channels: int = 3
    student_widths: Mapping[str, int] = field(default_factory=dict)
    """Number of features of each of the student's taps."""
    teacher_widths: Mapping[str, int] = field(default_factory=dict)
    """Number of features of each of the teacher's taps; of those that are stored, their rank."""
    teacher: nn.Module | None = None
    networks: Mapping[str, nn.Module] = field(default_factory=dict)
    """Frozen ones that terms look at images with, by the reference that they have in a config."""


class Term(nn.Module, ABC):
    """One part of what is minimised. Its parameters are trained with the student, by the same optimiser."""

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__()
        del config, parts

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """A scalar in float32, not weighted."""

    def after_step(self, steps: Sequence[Step]) -> dict[str, float]:
        """Called when the weights have moved: for what learns on its own. Returns what is worth logging.

        `steps` are those of all micro-batches that moved them, of which the last still has its features.
        Raises NonFiniteLoss, before anything has learned, for a loss or a gradient that is NaN or infinite.
        """
        del steps
        return {}
